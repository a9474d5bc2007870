"""What a benchmark measured, as JSON, tables, markdown and a picture: all of it is there."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from messages import check_raised
from rich.cells import cell_len
from rich.console import Console

from parallama.bench import profile
from parallama.bench.plot import plot
from parallama.bench.report_markdown import markdown
from parallama.bench.report_view import render
from parallama.bench.rows import Machine, PeerResult, Profile, Report, Row, Speed, Start, What
from parallama.errors import RunError, UsageError

WIDTHS = (80, 100, 120, 200)
REASON = "RuntimeError: Dynamo gave up at its cache_size_limit"
MACHINE = Machine(cpu="Some CPU @ 2.70GHz", bandwidth_bytes_per_s=19.8e9, gemm_flops_per_s=141.2e9)
START = Start(
    mesh="1x2",
    import_s=4.21,
    load_s=1.32,
    load_bytes_read=800_000_000,
    load_baseline_rss_bytes=700_000_000,
    load_peak_rss_bytes=1_600_000_000,
    trace_s=2.25,
    compile_s=7.95,
    first_token_s=0.31,
    cold_ttft_s=16.04,
    warm_ttft_s=0.05,
    programs=3,
    param_bytes_per_device=(411_000_000, 411_000_000),
    peak_rss_bytes=2_310_000_000,
)


def speed(median: float) -> Speed:
    return Speed(median=median, min=median * 0.9, max=median * 1.05, samples=32)


def peer(
    name: str, median: float, ours: float, *, processes: int = 1, same_tokens: bool | None = True
) -> PeerResult:
    return PeerResult(
        peer=name,
        processes=processes,
        tokens_per_s=speed(median),
        ratio=ours / median,
        same_tokens=same_tokens,
        peak_rss_bytes=10**9,
    )


def row(what: What, median: float, *peers: PeerResult, **more: Any) -> Row:
    share = {"mbu": 0.621, "host_ms_per_step": 0.41} if what == "decode" else {"mfu": 0.483}
    return Row(
        **{
            "what": what,
            "mesh": "1x2",
            "batch": 1,
            "prompt": 16,
            "tokens_per_s": speed(median),
            "peers": peers,
            **share,
            **more,
        }
    )


def report(*rows: Row, starts: tuple[Start, ...] = (START,), model: str = "l200") -> Report:
    return Report(
        command="parallama bench --shape l200",
        date="2026-11-02",
        model=model,
        dtype="float32",
        backend="cpu",
        threads=2,
        machine=MACHINE,
        versions={"torch": "2.9.1", "torch_xla": "2.9.0"},
        starts=starts,
        rows=rows,
    )


FULL = report(
    row(
        "prefill",
        310.0,
        peer("transformers", 134.5, 310.0),
        PeerResult(peer="compiled", processes=1, error=REASON),
    ),
    row(
        "decode",
        23.1,
        peer("transformers", 10.0, 23.1),
        peer("compiled", 16.5, 23.1, same_tokens=False),
        peak_rss_bytes=2 * 10**9,
    ),
    row(
        "decode",
        60.5,
        peer("transformers", 20.25, 60.5),
        peer("split", 33.5, 60.5, processes=2),
        batch=4,
        prompt=512,
    ),
    Row(
        what="prefill", mesh="1x8", batch=4, prompt=4096, skipped="needs 3.1 GB more than there is"
    ),
)


def rendered(what: Report, width: int = 120, encoding: str = "utf-8") -> str:
    written = io.BytesIO()
    console = Console(
        file=io.TextIOWrapper(written, encoding=encoding, write_through=True), width=width
    )
    render(what, console)
    return written.getvalue().decode(encoding)


def one_line(text: str) -> str:
    return " ".join(text.split())


def bars(text: str, title: str) -> list[tuple[str, int, float]]:
    """Label, length and number of every bar of one chart."""
    found: list[tuple[str, int, float]] = []
    for line in text.split(f"{title}, tokens/s")[1].split("\n\n")[0].splitlines():
        length = sum(line.count(letter) for letter in "█▒")
        if length:
            found.append((line.split()[0], length, float(line.split()[-1].replace(",", ""))))
    return found


def table_cells(text: str) -> list[list[str]]:
    """The cells of a markdown table, as a reader sees them."""
    cells: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        if token.type == "tr_open":
            cells.append([])
        elif token.type == "inline" and token.level > 2:
            cells[-1].append(seen(token.children or []))
    return cells


def seen(tokens: list[Any]) -> str:
    return "".join(token.content if token.type == "text" else " " for token in tokens)


def paragraphs(text: str) -> list[str]:
    parsed = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    return [
        seen(token.children or [])
        for token in parsed
        if token.type == "inline" and token.level == 1
    ]


SECONDS = st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=40)


@given(tokens=st.integers(1, 10**6), seconds=SECONDS)
def test_a_median_speed_lies_between_the_slowest_and_the_fastest(
    tokens: int, seconds: list[float]
) -> None:
    measured = Speed.of(tokens, seconds)
    assert 0 < measured.min <= measured.median <= measured.max
    assert measured.min == tokens / max(seconds) and measured.max == tokens / min(seconds)
    assert measured.samples == len(seconds)


@given(tokens=st.integers(1, 10**6), seconds=SECONDS, data=st.data())
def test_a_speed_does_not_depend_on_the_order_of_its_repetitions(
    tokens: int, seconds: list[float], data: st.DataObject
) -> None:
    assert Speed.of(tokens, data.draw(st.permutations(seconds))) == Speed.of(tokens, seconds)


@given(tokens=st.integers(1, 10**6), seconds=SECONDS)
def test_twice_the_tokens_in_the_same_time_are_twice_the_speed(
    tokens: int, seconds: list[float]
) -> None:
    once, twice = Speed.of(tokens, seconds), Speed.of(2 * tokens, seconds)
    assert (twice.median, twice.min, twice.max) == (2 * once.median, 2 * once.min, 2 * once.max)


def test_the_json_document_holds_everything_that_was_measured() -> None:
    document = json.loads(json.dumps(FULL.to_dict(), allow_nan=False))
    assert document.keys() >= {
        "command",
        "date",
        "model",
        "dtype",
        "backend",
        "threads",
        "machine",
        "versions",
        "starts",
        "rows",
    }
    assert document["machine"].keys() == {"cpu", "bandwidth_bytes_per_s", "gemm_flops_per_s"}
    assert document["starts"][0]["param_bytes_per_device"] == [411_000_000, 411_000_000]
    prefill, decode, _, skipped = document["rows"]
    keys = {field.name for field in fields(Row)}
    assert len(keys) == 12
    assert all(row.keys() == keys | {"versions", "threads"} for row in document["rows"])
    assert (prefill["threads"], prefill["versions"]) == (2, document["versions"])
    assert decode["tokens_per_s"] == {
        "median": 23.1,
        "min": 23.1 * 0.9,
        "max": 23.1 * 1.05,
        "samples": 32,
    }
    assert (decode["what"], decode["mesh"], decode["batch"], decode["mbu"], decode["mfu"]) == (
        "decode",
        "1x2",
        1,
        0.621,
        None,
    )
    assert (prefill["mbu"], prefill["mfu"], decode["peak_rss_bytes"]) == (None, 0.483, 2 * 10**9)
    assert prefill["peers"][1]["error"] == REASON and prefill["peers"][1]["tokens_per_s"] is None
    assert decode["peers"][1]["same_tokens"] is False and decode["peers"][1]["ratio"] == 23.1 / 16.5
    assert (
        skipped["skipped"] == "needs 3.1 GB more than there is" and skipped["tokens_per_s"] is None
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_the_terminal_shows_what_was_measured_on_what(width: int) -> None:
    text = one_line(rendered(FULL, width))
    for told in (
        "l200",
        "float32",
        "Some CPU @ 2.70GHz, 2 threads",
        "19.8 GB/s",
        "141.2 GFLOP/s",
        "torch_xla 2.9.0",
        "parallama bench --shape",
    ):
        assert told in text


@pytest.mark.parametrize("width", WIDTHS)
def test_the_terminal_shows_every_part_of_a_start(width: int) -> None:
    text = one_line(rendered(FULL, width))
    assert "1x2 4.21 1.32 2.25 7.95 0.31 16.04 0.05 2 x 411.0 MB 2.31 GB" in text
    for part in ("import", "load", "trace", "compile", "token", "TTFT", "bytes per", "RSS"):
        assert part in text


def test_devices_that_hold_different_amounts_are_shown_from_the_least_to_the_most() -> None:
    text = rendered(
        report(starts=(replace(START, param_bytes_per_device=(98_000_000, 131_000_000)),))
    )
    assert "2 x 98.0 MB" in text and "to 131.0 MB" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_speeds_ratios_and_utilisations_are_printed_whole_at_any_width(width: int) -> None:
    text = rendered(FULL, width)
    for told in (
        "310.0 (279.0-325.5)",
        "MFU 48.3%",
        "2.30x 134.5",
        "23.1 (20.8-24.3)",
        "MBU 62.1%",
        "0.41",
        "2.31x 10.0",
        "1.40x 16.5",
        "2.99x 20.2",
    ):
        assert told in text
    assert "1.81x 33.5 (2p)" in text, "a peer in two processes says so"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_peer_that_could_not_run_is_named_with_its_reason(width: int) -> None:
    text = rendered(FULL, width)
    assert f"[1] compiled: {REASON}" in one_line(text)
    assert text.count("n/a [1]") == 2, "in the table and in the chart"
    cells = table_cells(markdown(FULL))
    assert cells[1][cells[0].index("compiled")] == "n/a [1]"
    assert f"[1] compiled: {REASON}" in paragraphs(markdown(FULL))


def test_a_peer_without_result_and_without_reason_is_not_passed_over() -> None:
    silent = report(row("decode", 20.0, PeerResult(peer="silent", processes=2)))
    assert "[1] silent, 2 processes: no reason given" in rendered(silent)
    assert "[1] silent, 2 processes: no reason given" in paragraphs(markdown(silent))


def test_a_skipped_row_without_reason_is_not_passed_over() -> None:
    silent = report(Row(what="decode", mesh="1x2", batch=1, prompt=16))
    assert "[1] decode 1x2, batch 1, prompt 16: no reason given" in rendered(silent)


def test_the_same_reason_is_one_footnote() -> None:
    failed = PeerResult(peer="compiled", processes=1, error=REASON)
    twice = report(row("prefill", 20.0, failed), row("decode", 20.0, failed))
    assert rendered(twice).count(REASON) == 1 and markdown(twice).count("n/a [1]") == 2


def test_a_peer_that_was_not_run_on_a_row_says_so() -> None:
    cells = table_cells(markdown(FULL))
    assert cells[3][cells[0].index("compiled")] == "not run"
    assert "not run" in rendered(FULL)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_peer_with_other_tokens_is_marked(width: int) -> None:
    assert rendered(FULL, width).count("tokens differ") == 1
    cells = table_cells(markdown(FULL))
    assert cells[2][cells[0].index("compiled")] == "1.40x 16.5 tokens differ"


def test_a_peer_whose_tokens_were_not_compared_is_not_taken_for_one_with_the_same() -> None:
    unknown = report(row("decode", 20.0, peer("other", 10.0, 20.0, same_tokens=None)))
    for text in (rendered(unknown), markdown(unknown)):
        assert "2.00x 10.0 [1]" in text and "[1] its tokens were not compared with ours" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_a_skipped_row_shows_why(width: int) -> None:
    why = "prefill 1x8, batch 4, prompt 4096: needs 3.1 GB more than there is"
    text = rendered(FULL, width)
    assert "skipped [2]" in text and f"[2] {why}" in one_line(text)
    assert table_cells(markdown(FULL))[4][:5] == ["prefill", "1x8", "4", "4096", "skipped [2]"]
    assert f"[2] {why}" in paragraphs(markdown(FULL))


@pytest.mark.parametrize("width", WIDTHS)
def test_bars_are_as_long_as_the_speeds_are_high(width: int) -> None:
    text = rendered(FULL, width)
    assert [(label, number) for label, _, number in bars(text, "prefill")] == [
        ("parallama", 310.0),
        ("transformers", 134.5),
    ]
    decode = bars(text, "decode")
    expected = [
        ("parallama", 23.1),
        ("transformers", 10.0),
        ("compiled", 16.5),
        ("parallama", 60.5),
        ("transformers", 20.2),
        ("split,", 33.5),
    ]
    assert [(label, number) for label, _, number in decode] == expected
    for chart in (bars(text, "prefill"), decode):
        longest, highest = (
            max(length for _, length, _ in chart),
            max(number for _, _, number in chart),
        )
        assert longest > width / 2
        assert all(abs(length - longest * number / highest) <= 0.55 for _, length, number in chart)


def test_our_bars_are_told_from_the_peers_without_colour() -> None:
    for encoding, ours, theirs in (("utf-8", "█", "▒"), ("ascii", "#", "=")):
        lines = rendered(FULL, encoding=encoding).split("decode, tokens/s")[1].splitlines()
        assert all(
            (ours in line) == line.startswith("  parallama")
            and not (ours in line and theirs in line)
            for line in lines
        )
        assert any(theirs in line for line in lines)


def test_a_terminal_that_knows_only_ascii_gets_ascii() -> None:
    assert "tokens differ" in rendered(FULL, encoding="ascii")


def test_the_markdown_table_has_the_columns_of_the_terminals() -> None:
    heads = [
        "what",
        "mesh",
        "batch",
        "prompt",
        "tokens/s (min-max)",
        "MBU or MFU",
        "host ms/step",
        "transformers",
        "compiled",
        "split",
    ]
    cells = table_cells(markdown(FULL))
    assert cells[0] == heads
    assert cells[2] == [
        "decode",
        "1x2",
        "1",
        "16",
        "23.1 (20.8-24.3)",
        "MBU 62.1%",
        "0.41",
        "2.31x 10.0",
        "1.40x 16.5 tokens differ",
        "not run",
    ]
    text = one_line(rendered(FULL, 200))
    assert all(word in text for head in heads for word in head.split())


def test_the_markdown_says_where_its_figures_come_from() -> None:
    last = paragraphs(markdown(FULL))[-1]
    for told in (
        "l200, float32, cpu backend",
        "Some CPU",
        "19.8 GB/s",
        "torch_xla 2.9.0",
        "2026-11-02: parallama bench --shape l200",
    ):
        assert told in last


@pytest.mark.parametrize("rows", [(), (FULL.rows[3],)], ids=["no rows", "all skipped"])
def test_a_run_that_measured_no_speed_is_still_a_report(rows: tuple[Row, ...]) -> None:
    empty = report(*rows, starts=())
    assert "l200" in rendered(empty) and "prefill, tokens/s" not in rendered(empty)
    assert table_cells(markdown(empty))[0][0] == "what"


# What other programs say comes with markup of rich and markdown, control characters and newlines.
WILD = st.text(
    st.one_of(
        st.sampled_from("[]|*_`<>&$~\\/()!#\n\t\x1b:1a "), st.characters(exclude_categories=["Cs"])
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(name=WILD, reason=WILD, width=st.integers(80, 200))
def test_no_message_of_a_peer_breaks_the_report(name: str, reason: str, width: int) -> None:
    failed = PeerResult(peer=name, processes=1, error=reason)
    wild = report(
        row("decode", 20.0, failed, peer("other", 10.0, 20.0)),
        row("decode", 30.0, peer(name, 10.0, 30.0)),
        model=reason,
    )
    text = rendered(wild, width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text
    name, reason = (
        one_line("".join(letter if letter.isprintable() else " " for letter in text))
        for text in (name, reason)
    )
    assert {len(cells) for cells in table_cells(markdown(wild))} == {8 if name == "other" else 9}
    assert f"[1] {name}: {reason or 'no reason given'}" in paragraphs(markdown(wild))


def pixels(path: Path) -> Any:
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def has(picture: Any, colour: str) -> Any:
    return (picture == [int(colour[start : start + 2], 16) for start in (0, 2, 4)]).all(axis=-1)


def test_the_plot_is_a_png_with_bars_as_high_as_the_speeds(tmp_path: Path) -> None:
    half_as_fast = replace(
        peer("half", 20.0, 40.0), tokens_per_s=Speed(median=20.0, min=19.0, max=39.0, samples=3)
    )
    plot(
        report(row("decode", 40.0, half_as_fast, peer("quarter", 10.0, 40.0))),
        tmp_path / "bench.png",
    )
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = pixels(tmp_path / "bench.png")
    ours, half, quarter = (has(picture, colour).sum() for colour in ("0072B2", "E69F00", "009E73"))
    assert ours / half == pytest.approx(2, rel=0.1) and ours / quarter == pytest.approx(4, rel=0.1)


def test_the_plot_shows_the_span_from_min_to_max(tmp_path: Path) -> None:
    plot(
        report(row("decode", 40.0, tokens_per_s=Speed(median=40.0, min=10.0, max=60.0, samples=3))),
        tmp_path / "bench.png",
    )
    picture = pixels(tmp_path / "bench.png")
    bar, span = (has(picture, colour).sum(axis=0).max() for colour in ("0072B2", "333333"))
    assert span / bar == pytest.approx(50 / 40, rel=0.05)


def test_the_plot_has_a_panel_for_each_thing_that_was_measured(tmp_path: Path) -> None:
    plot(FULL, tmp_path / "both.png")
    plot(report(*(row for row in FULL.rows if row.what == "decode")), tmp_path / "one.png")
    assert pixels(tmp_path / "both.png").shape[0] > 1.5 * pixels(tmp_path / "one.png").shape[0]


def test_a_name_that_looks_like_a_formula_is_plotted_as_it_stands(tmp_path: Path) -> None:
    plot(
        report(row("decode", 40.0, peer(r"$\frac", 20.0, 40.0)), model=r"$\broken{$"),
        tmp_path / "bench.png",
    )
    assert has(pixels(tmp_path / "bench.png"), "0072B2").any()


@pytest.mark.parametrize("where", ["no/such/folder/bench.png", "file/bench.png", "."])
def test_a_plot_that_cannot_be_written_is_an_error_with_its_path(
    where: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError) as error:
        plot(FULL, tmp_path / where)
    check_raised(error.value, 2, f"--plot {tmp_path / where}")


def test_a_long_name_does_not_run_out_of_the_plot(tmp_path: Path) -> None:
    plot(report(FULL.rows[1], model="/some/folder/" + "deeper/" * 40), tmp_path / "bench.png")
    picture = pixels(tmp_path / "bench.png")
    assert (picture[:, [0, -1]] == 255).all(), "white to both sides"


def test_a_plot_of_nothing_is_an_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no case was measured"):
        plot(report(FULL.rows[3]), tmp_path / "bench.png")
    assert not list(tmp_path.iterdir())


def test_a_plot_without_matplotlib_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This is how Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"matplotlib\nrun: pip install 'parallama\[bench\]'"):
        plot(FULL, tmp_path / "bench.png")


def test_reporting_imports_neither_torch_nor_matplotlib() -> None:
    heavy = "{'torch', 'torch_xla', 'matplotlib'}"
    imports = "import sys, parallama.bench.report_view, parallama.bench.plot"
    code = f"{imports}; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_where_the_time_goes_is_told_by_what_a_core_runs() -> None:
    xla = "_XLAC.cpython-311-x86_64-linux-gnu.so"
    printed = f"""
           812  [JIT] tid 4711                          [.] jit_avx512_common_gemm_f32_xbyak_gemm.9
             3  {xla}   [.] Eigen::internal::gebp_kernel<float, float, long>::operator()(float*)
            41  {xla}   [.] Eigen::internal::gemm_pack_colmajor_block<float>::operator()(float*)
            30  [JIT] tid 4711                          [.] 0x00007fe3e25e00e3
             7  {xla}   [.] xla::cpu::(anonymous namespace)::ReduceScatter<(xla::PrimitiveType)11>
             5  {xla}   [.] Eigen::ThreadPoolTempl<tsl::thread::EigenEnvironment>::MaybeGetTask
             9  [kernel.kallsyms]                       [k] clear_page_erms
           100  libtorch_cpu.so                         [.] mkl_blas_avx512_sgemm_kernel_0
            20  libtorch_cpu.so                         [.] mkl_blas_avx512_sgemm_scopy_right48_ea
            11  libtorch_cpu.so                         [.] at::native::AVX512::VectorizedLoop2d
             4  libgomp.so.1                            [.] 0x000000000001de62
             2  libpython3.11.so.1.0                    [.] _PyEval_EvalFrameDefault
    """
    assert profile.count(printed) == {
        "products": 915,
        "packing": 61,
        "compiled": 30,
        "collectives": 7,
        "waiting": 9,
        "system": 9,
        "torch": 11,
        "other": 2,
    }


def test_a_profile_adds_up_to_all_cores_over_the_passes_and_not_what_lies_between_them() -> None:
    taken = profile.Recording()
    taken.counted = profile.count(
        "1999 libtorch_cpu.so [.] at::add\n 999 [kernel.kallsyms] [k] clear_page_erms"
    )
    told = taken.profile([0.5, 0.3, 0.6, 0.6], cores=2)
    assert told.samples == 2998
    assert told.ms_per_pass == 500
    assert told.core_ms_per_pass["torch"] == 250
    assert sum(told.core_ms_per_pass.values()) == pytest.approx(1000)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_terminal_shows_where_the_time_goes(width: int) -> None:
    spent = {kind: 0.0 for kind in profile.KINDS} | {"products": 71.5, "idle": 33.25}
    taken = Profile(samples=9, ms_per_pass=81.5, core_ms_per_pass=spent)
    shown = rendered(
        report(
            row(
                "decode",
                23.1,
                replace(peer("transformers", 10.0, 23.1), profile=taken),
                profile=taken,
            )
        ),
        width,
    )
    _, _, table = shown.partition("Where the time goes")
    assert table.count("81.5") == 2 and table.count("71.5") == 2 and table.count("33.2") == 2
    assert all(kind in table for kind in profile.KINDS)
    assert "Where the time goes" not in rendered(FULL, width)
