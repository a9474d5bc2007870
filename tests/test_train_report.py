"""The log of a training run, and what `parallama report` makes of it, pictures included."""

from __future__ import annotations

import io
import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from parallama.__main__ import run
from parallama.errors import ParallamaError, RunError
from parallama.train import logs
from parallama.train.logs import JsonLog, TensorBoard, WandB, closing, read_log


def entry(step: int, **more: Any) -> dict[str, Any]:
    usual = {
        "step": step,
        "loss": 5.0 / step,
        "lr": 1e-4,
        "grad_norm": 2.0,
        "tokens_per_s": 100.0 + step,
        "step_time_s": 0.5,
        "mfu": 0.25,
        "tokens": 64,
    }
    return usual | {"target_tokens": 60, "epoch": 0, "bytes_per_device": [1000, 1000]} | more


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A run of eight steps; the fourth was skipped, and the last was validated and sampled."""
    made = JsonLog(tmp_path, 0)
    for step in range(1, 9):
        more: dict[str, Any] = (
            {"loss": math.nan, "grad_norm": math.inf, "skipped": True} if step == 4 else {}
        )
        if step == 8:
            more = {
                "eval_loss": 0.5,
                "eval_perplexity": math.exp(0.5),
                "eval_tokens": 9,
                "samples": [{"prompt": "<Once>", "text": " & more"}],
            }
        made.write(entry(step, **more))
    made.sync()
    made.close()
    return tmp_path


def test_the_log_is_one_json_object_a_step(log: Path) -> None:
    written = [json.loads(line) for line in (log / "log.jsonl").read_text().splitlines()]
    assert [each["step"] for each in written] == list(range(1, 9))
    assert all({"step", "loss", "lr", "grad_norm", "tokens_per_s"} <= set(each) for each in written)
    assert (
        written[3]["loss"] is None
        and written[3]["grad_norm"] is None
        and written[3]["skipped"] is True
    )


def test_a_resumed_log_is_cut_back_to_the_checkpoint_and_goes_on(log: Path) -> None:
    with (log / "log.jsonl").open("a") as stream:
        stream.write('{"step": 9, "los')  # torn by a kill
    resumed = JsonLog(log, 6)
    resumed.write(entry(7))
    resumed.close()
    assert [each["step"] for each in read_log(log)] == list(range(1, 8))
    JsonLog(log, 0).close()
    with pytest.raises(ParallamaError, match=r"log\.jsonl"):
        read_log(log)


def test_a_log_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(ParallamaError, match="Is a directory"):
        JsonLog(tmp_path, 0)


def test_report_sums_up_and_draws_a_page_with_everything_in_it(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(log)]) == 0
    said = capsys.readouterr().out
    assert (
        "8 (1 skipped)" in said
        and "5 to 0.625, least 0.625" in said
        and "loss 0.5, perplexity 1.649" in said
        and "25.0%" in said
    )
    page = (log / "report.html").read_text()
    assert (
        "<svg" in page and "&lt;Once&gt;" in page and " &amp; more" in page and "<Once>" not in page
    )
    assert "http" not in page.split("<svg")[0] and "<script" not in page and "<img" not in page
    for words in ("loss (nats a token)", "learning rate", "gradient norm", "tokens/s"):
        assert words in page or words.replace(" ", "") in page or f"<!-- {words} -->" in page
    assert "validation" in page


def test_report_draws_a_png_and_prints_json(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = log / "curves.png"
    assert run(["report", str(log), "--plot", str(target), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["steps"] == 8
        and found["last_loss"] == 0.625
        and found["skipped"] == 1
        and found["tokens"] == 512
        and found["mfu"] == 0.25
    )
    assert (
        found["bytes_per_device"] == [1000, 1000]
        and found["tokens_per_s"] == 104.5
        and found["eval_loss"] == 0.5
    )
    picture = Image.open(io.BytesIO(target.read_bytes())).convert("RGB")
    colours = {colour for _, colour in picture.getcolors(10**6)}
    assert (
        picture.size == (1500, 1050) and {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours
    )  # both curves show
    assert not (log / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "run 'nowhere' has no log.jsonl that can be read: No such file or directory"),
        (["LOG", "--plot", "LOG/curves.gif"], "curves.gif is of no known kind"),
        (["LOG", "--plot", "LOG/none/curves.png"], "cannot be written"),
    ],
)
def test_report_says_what_is_wrong(
    arguments: list[str], message: str, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", *(argument.replace("LOG", str(log)) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_tensorboard_gets_every_number_under_its_step(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    board = TensorBoard(tmp_path, 0)
    board.write(entry(3, samples=[{"prompt": "Once", "text": " more"}]))
    board.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, found, texts = file.read_bytes(), {}, []
    while content:  # records of TFRecord: length, its checksum, data, their checksum
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        for value in event.summary.value:
            if value.HasField("tensor"):
                texts.append(value.tensor.string_val[0])
            else:
                found[value.tag] = (event.step, value.simple_value)
    assert found["train/loss"] == (3, pytest.approx(5 / 3)) and found["train/tokens_per_s"] == (
        3,
        103.0,
    )
    assert texts == [b"Once more"]


def test_events_that_cannot_be_written_end_the_run_and_do_not_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file may be larger than the first few events are."""
    first, second, third = (TensorBoard(tmp_path, step) for step in (0, 8, 9))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = r"tensorboard' .*File too large[\s\S]*make room"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(RunError, match=said), closing([first]):
            first.write(entry(1))
        monkeypatch.setattr(logs, "FLUSH_S", math.inf)
        second.write(entry(9))
        with pytest.raises(RunError, match=said), closing([second]):
            pass
        third.write(entry(10))
        with pytest.raises(RunError, match="what came first"), closing([third]):
            raise RunError("what came first")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Not a directory"):
        TensorBoard(tmp_path / "file", 0)


def test_without_wandb_it_says_how_to_get_it(tmp_path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed here")
    with pytest.raises(ParallamaError, match=r"'wandb'\npip install 'parallama\[wandb\]'"):
        WandB(tmp_path, {})
