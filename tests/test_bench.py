"""`parallama bench`: what it measures with, what it refuses, and a run from outside beside real peers."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from parallama.bench import profile, shapes
from parallama.bench.processes import EngineProcess
from parallama.bench.run import Options
from parallama.bench.training import TrainOptions
from parallama.errors import CheckpointError, RunError, UsageError
from parallama.host import usable_cores
from parallama.model.spec import ModelSpec
from parallama.plan import cost
from parallama.plan.mesh_shape import MeshShape

ONE = MeshShape(data=1, model=1)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "parallama", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    done = bench("--make", "tiny", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"folder": str(folder), "shape": "tiny", "parameters": 158016}
    return str(folder)


# -- sizes


@pytest.mark.parametrize("name", sorted(shapes.SHAPES))
def test_every_named_shape_is_a_model_that_can_be_loaded(name: str) -> None:
    spec = ModelSpec.from_config(shapes.SHAPES[name])
    assert spec.query_heads % spec.kv_heads == 0


def test_l200_has_two_hundred_million_parameters() -> None:
    spec = ModelSpec.from_config(shapes.SHAPES["l200"])
    assert sum(math.prod(shape) for _, shape in spec.parameters()) == 207_119_360


def test_a_made_checkpoint_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shapes.make("tiny", tmp_path / name, seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_decode_step_must_read_every_weight_and_the_cache_once() -> None:
    spec = ModelSpec.from_config(shapes.SHAPES["tiny"])
    parameters = sum(math.prod(shape) for _, shape in spec.parameters())
    embedding = 512 * 64
    one = cost.decode_bytes(spec, 1, 0, 4)
    assert one == 4 * (parameters - embedding + 64)
    assert cost.decode_bytes(spec, 3, 10, 4) - cost.decode_bytes(spec, 3, 0, 4) == 4 * 3 * 10 * (
        2 * 2 * 4 * 8
    )
    assert cost.decode_bytes(spec, 1, 7, 2) * 2 == cost.decode_bytes(spec, 1, 7, 4)


def test_a_prefill_computes_two_flops_a_weight_and_token_and_causal_attention() -> None:
    spec = ModelSpec.from_config(shapes.SHAPES["tiny"])
    parameters = sum(math.prod(shape) for _, shape in spec.parameters())
    head = 512 * 64
    inside = parameters - 2 * head
    scores_and_values = (
        2 * 2 * 8 * 8 * 2
    )  # two products of two FLOPs, query heads, head dim, layers
    assert cost.prefill_flops(spec, 1, 1) == 2 * inside + scores_and_values + 2 * head
    at_the_end = 64 * 64 + 3 * 64 * 176  # the last layer's o_proj and MLP
    assert cost.prefill_flops(spec, 2, 5) == 2 * (
        2 * inside * 5 - 2 * at_the_end * 4 + scores_and_values * 15 + 2 * head
    )


# -- refusals


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ["--peers", "vllm"],
            2,
            "peer 'vllm' is unknown\nexpected one of hf, hf-compile, hf-tp, recipe, recipe-openxla",
        ),
        (
            ["--batch", "1,x"],
            2,
            "--batch '1,x' cannot be read\nexpected whole numbers with commas, as 1,4,16",
        ),
        (["--batch", "0"], 2, "batch is 0\nexpected at least 1"),
        (
            ["--prompt-tokens", "8,8"],
            2,
            "--prompt-tokens 8,8 names a number twice\nexpected each once",
        ),
        (["--mesh", "1x1,1x1"], 2, "--mesh 1x1,1x1 names a mesh twice\nexpected each once"),
        (["--mesh", ","], 2, "there is no mesh\nexpected at least one, as 1x1,1x2"),
        (["--steps", "3"], 2, "steps is 3\nexpected at least 8"),
        (["--repeats", "0"], 2, "repeats is 0\nexpected at least 1"),
        (["--threads", "4096"], 2, "threads is 4096\nexpected 1 to "),
        (["--dtype", "int4"], 2, "dtype 'int4' is unknown\nexpected float32 or bfloat16"),
        (["--train", "--peers", "hf-tp"], 2, "peer 'hf-tp' is unknown\nexpected one of hf"),
        (["--train", "--batch", "2,4"], 2, "--batch 2,4 with --train\nexpected one number"),
        (["--train", "--prompt-tokens", "1"], 2, "prompt-tokens is 1\nexpected a whole number of at least 2"),
        (["--train", "--repeats", "0"], 2, "repeats is 0\nexpected at least 1"),
        (
            ["--train", "--mesh", "2x1", "--batch", "3"],
            2,
            "batch 3 on mesh 2x1\nexpected a multiple of 2",
        ),
        (["--train", "--mesh", ","], 2, "there is no mesh\nexpected at least one, as 1x1,1x2"),
        (["--train", "--threads", "4096"], 2, "threads is 4096\nexpected 1 to "),
        (
            ["--train", "--dtype", "int4"],
            2,
            "dtype 'int4' is unknown\nexpected float32 or bfloat16",
        ),
        (["--load"], 2, "model 'nowhere' is no folder\nexpected safetensors"),
        (["--load", "--mesh", ","], 2, "there is no mesh\nexpected at least one, as 1x1,1x2"),
        (["--load", "--repeats", "0"], 2, "repeats is 0\nexpected at least 1"),
        (["--load", "--batch", "4"], 2, "--batch was given with --load\nexpected one of the two"),
        (["--load", "--peers", "hf"], 2, "--peers was given with --load\nexpected one of the two"),
        (["--load", "--steps", "24"], 2, "--steps was given with --load\nexpected one of the two"),
        (["--load", "--train"], 2, "--train was given with --load\nexpected one of the two"),
        (
            ["--load", "--threads", "0"],
            2,
            "--threads was given with --load\nexpected one of the two",
        ),
        (["--load", "--backend", "tpu"], 2, "--backend tpu with --load\nexpected cpu"),
        (
            ["--train", "--plot", "x.png"],
            2,
            "--plot was given with --train\nexpected one of the two",
        ),
        (["--load", "--profile"], 2, "--profile was given with --load\nexpected one of the two"),
        (
            ["--make", "l200", "--threads", "2"],
            2,
            "--threads was given with --make\nexpected one of the two",
        ),
        (["--make", "l200", "--load"], 2, "--load was given with --make\nexpected one of the two"),
        (
            ["--train", "--steps", "24"],
            2,
            "--steps was given with --train\nexpected one of the two",
        ),
    ],
)
def test_a_wrong_option_is_refused_before_anything_runs(
    capsys: Any, arguments: list[str], code: int, said: str
) -> None:
    from parallama.__main__ import run

    assert run(["bench", "nowhere", *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith(f"parallama: {said}") and len(error.splitlines()) <= 3


def test_a_picture_that_could_not_be_written_is_refused_before_anything_runs(
    capsys: Any, tmp_path: Path
) -> None:
    from parallama.__main__ import run

    for path in (tmp_path, tmp_path / "none" / "rows.png"):
        assert run(["bench", "nowhere", "--plot", str(path)]) == 2
        assert (
            capsys.readouterr().err
            == f"parallama: --plot {path} cannot be written\nexpected a file in a folder that exists\n"
        )


def test_a_model_that_is_not_there_is_refused(capsys: Any) -> None:
    from parallama.__main__ import run

    assert run(["bench", "./nowhere"]) == 3
    assert "model './nowhere' is not there" in capsys.readouterr().err


def test_a_shape_that_is_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="shape 'l9' is unknown\nexpected one of tiny, smol135, l200, l1b"
    ):
        shapes.make("l9", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(
        CheckpointError, match="is not empty\nexpected a new one: nothing is written over"
    ):
        shapes.make("tiny", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        shapes.make("tiny", tmp_path / "file" / "below")


def test_options_are_checked_in_python_too() -> None:
    with pytest.raises(UsageError, match="peer 'x' is unknown"):
        Options(model="m", meshes=(ONE,), peers=("x",))
    with pytest.raises(UsageError, match="batch 3 on mesh 2x1"):
        TrainOptions(model="m", meshes=(MeshShape(data=2, model=1),), batch=3)


@pytest.mark.parametrize("kind", [Options, TrainOptions])
def test_every_engine_is_told_all_that_was_asked_for(kind: Any) -> None:
    asked = kind(
        model="m",
        meshes=(ONE,),
        threads=1,
        dtype="bfloat16",
        backend="cpu",
        backend_options={"a": 1},
        allow_nonfinite=True,
    )
    told = asked.engine("hf", ONE)
    assert {name: told[name] for name in ("engine", "model", "mesh", "devices", "threads")} == {
        "engine": "hf",
        "model": "m",
        "mesh": "1x1",
        "devices": 1,
        "threads": 1,
    }
    assert (told["dtype"], told["backend_options"], told["allow_nonfinite"]) == (
        "bfloat16",
        {"a": 1},
        True,
    )
    assert told.get("train") == (
        {"batch": 4, "seq_len": 256, "lr": 1e-4} if kind is TrainOptions else None
    )


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    engine = {
        "engine": "hf",
        "model": str(tmp_path / "none"),
        "mesh": "1x1",
        "devices": 1,
        "dtype": "float32",
        "backend": "cpu",
        "threads": 1,
    }
    with pytest.raises(CheckpointError, match=r"^model '.*none' is not there\n"):
        EngineProcess(engine)


MACHINE = {"engine": "machine", "threads": 1}


def test_an_engine_that_ends_at_its_start_says_what_it_said_last() -> None:
    with pytest.raises(RunError, match=r"^machine ended at its start: KeyError: 'threads'$"):
        EngineProcess({"engine": "machine"})


def test_an_engine_that_dies_is_named() -> None:
    with EngineProcess(MACHINE) as engine:
        os.killpg(engine.pid, signal.SIGKILL)
        with pytest.raises(RunError, match=r"^machine has died: it said nothing$"):
            engine.ask("measure")


def test_an_engine_that_takes_too_long_is_ended_and_named() -> None:
    with EngineProcess(MACHINE, ask_limit_s=0.01) as engine:
        with pytest.raises(RunError, match=r"^machine took more than 0.01 s$"):
            engine.ask("measure")
        with pytest.raises(ProcessLookupError):
            os.killpg(engine.pid, 0)


def test_an_engine_that_has_replied_leaves_the_cores_to_the_next() -> None:
    with EngineProcess(MACHINE | {"threads": 2}) as engine:
        engine.ask("measure")
        states = [
            stat.read_text().rpartition(") ")[2][0]
            for stat in Path(f"/proc/{engine.pid}/task").glob("*/stat")
        ]
    assert len(states) > 1 and set(states) == {"S"}


# -- a run


def rows_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_report(report: dict[str, Any], meshes: list[str]) -> None:
    assert (
        report["machine"]["bandwidth_bytes_per_s"] > 1e8
        and report["machine"]["gemm_flops_per_s"] > 1e8
    )
    assert set(report["versions"]) == {"parallama", "torch", "torch_xla", "transformers", "python"}
    assert [start["mesh"] for start in report["starts"]] == meshes
    for start in report["starts"]:
        parts = ("import_s", "load_s", "trace_s", "compile_s", "first_token_s")
        assert math.isclose(sum(start[part] for part in parts), start["cold_ttft_s"], rel_tol=0.01)
        assert 0 < start["warm_ttft_s"] < start["cold_ttft_s"]
        assert start["programs"] == 2
    for row in report["rows"]:
        speed = row["tokens_per_s"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert row["peak_rss_bytes"] > 1e8
        used = row["mfu"] if row["what"] == "prefill" else row["mbu"]
        assert 0 < used < 1.5


def test_a_run_measures_ours_beside_peers_that_choose_the_same_tokens(
    tiny: str, tmp_path: Path
) -> None:
    picture = tmp_path / "rows.png"
    arguments = [
        "--mesh",
        "1x2",
        "--peers",
        "hf,hf-tp",
        "--batch",
        "2",
        "--prompt-tokens",
        "8,9000",
        "--steps",
        "8",
        "--repeats",
        "1",
    ]
    report = rows_of(bench(tiny, *arguments, "--plot", str(picture), "--json"))
    assert report["command"].startswith(f"parallama bench {tiny} --mesh 1x2")
    measured = [row for row in report["rows"] if row["skipped"] is None]
    skipped = [row for row in report["rows"] if row["skipped"] is not None]
    check_report(report | {"rows": measured}, ["1x2"])
    assert [(row["what"], row["mesh"], row["batch"], row["prompt"]) for row in measured] == [
        ("prefill", "1x2", 2, 8),
        ("decode", "1x2", 2, 8),
    ]
    for row in measured:
        assert [
            (peer["peer"], peer["processes"], peer["error"], peer["same_tokens"])
            for peer in row["peers"]
        ] == [
            ("hf", 1, None, True),
            ("hf-tp", 2, None, True),
        ]
        for peer in row["peers"]:
            assert math.isclose(
                peer["ratio"], row["tokens_per_s"]["median"] / peer["tokens_per_s"]["median"]
            )
    assert [(row["what"], row["skipped"]) for row in skipped] == [
        (what, "18000 prompt tokens, over the limit of 16384") for what in ("prefill", "decode")
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_profile_without_perf_says_how_to_get_it(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from parallama.__main__ import run

    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(["bench", "nowhere", "--profile"]) == 2
    said = "--profile needs Linux's perf\nexpected it on the PATH; on Debian run: apt-get install linux-perf"
    assert capsys.readouterr().err == f"parallama: {said}\n"


@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed")
def test_a_profile_that_cannot_be_taken_says_what_perf_said() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with (
        pytest.raises(
            RunError, match=r"^perf cannot record: .+\nsee /proc/sys/kernel/perf_event_paranoid$"
        ),
        profile.recording(ended.pid),
    ):
        pass


@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed")
def test_a_profile_shows_what_every_engine_does(tiny: str) -> None:
    arguments = [
        "--mesh",
        "1x2",
        "--peers",
        "hf",
        "--batch",
        "16",
        "--prompt-tokens",
        "256",
        "--steps",
        "16",
        "--repeats",
        "3",
        "--profile",
    ]
    for row in rows_of(bench(tiny, *arguments, "--json"))["rows"]:
        ours, (theirs,) = row["profile"], [peer["profile"] for peer in row["peers"]]
        for taken in (ours, theirs):
            assert taken["samples"] > 20 and taken["ms_per_pass"] > 0
            cores = sum(taken["core_ms_per_pass"].values()) / taken["ms_per_pass"]
            assert cores == pytest.approx(usable_cores(), rel=0.3)
        assert ours["core_ms_per_pass"]["compiled"] > theirs["core_ms_per_pass"]["compiled"] == 0
        assert theirs["core_ms_per_pass"]["torch"] > ours["core_ms_per_pass"]["torch"]
    assert not list(Path("/tmp").glob("perf-*.map"))


def test_a_model_that_holds_nan_is_measured_only_where_that_is_allowed(
    tiny: str, tmp_path: Path
) -> None:
    stored = load_file(Path(tiny) / "model.safetensors")
    stored["model.layers.0.mlp.down_proj.weight"][0, -1] = float("nan")
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((Path(tiny) / "config.json").read_bytes())
    few = [
        str(tmp_path),
        "--peers",
        ",",
        "--batch",
        "1",
        "--prompt-tokens",
        "8",
        "--steps",
        "8",
        "--repeats",
        "1",
        "--quiet",
        "--json",
    ]
    refused = bench(*few)
    assert (refused.returncode, refused.stdout) == (3, "")
    first, _, remedy = refused.stderr.splitlines()
    assert first.startswith(
        "parallama: model.safetensors: tensor model.layers.0.mlp.down_proj.weight holds NaN or infinity (1 of 11264 numbers"
    )
    assert "--allow-nonfinite" in remedy
    report = rows_of(bench(*few, "--allow-nonfinite"))
    assert report["command"].endswith("--allow-nonfinite")
    check_report(report, ["1x1"])
    assert [(row["what"], row["peers"]) for row in report["rows"]] == [
        ("prefill", []),
        ("decode", []),
    ]


def test_training_steps_are_measured_beside_an_eager_loop_that_has_the_same_losses(
    tiny: str,
) -> None:
    profiled = ["--profile"] if shutil.which("perf") else []
    report = rows_of(
        bench(
            tiny,
            "--train",
            "--mesh",
            "1x2",
            "--batch",
            "2",
            "--prompt-tokens",
            "16",
            "--repeats",
            "2",
            *profiled,
            "--json",
        )
    )
    assert (
        report["command"].startswith(f"parallama bench {tiny} --train")
        and report["machine"]["gemm_flops_per_s"] > 1e9
    )
    (row,) = report["rows"]
    assert (row["what"], row["mesh"], row["batch"], row["seq_len"]) == ("train", "1x2", 2, 16)
    speed, (peer,) = row["tokens_per_s"], row["peers"]
    assert 0 < speed["min"] <= speed["median"] <= speed["max"] and speed["samples"] == 2
    assert (
        math.isclose(row["step_s"], 32 / speed["median"], rel_tol=0.5)
        and 0 < row["mfu"] < 1.5
        and row["peak_rss_bytes"] > 1e8
    )
    # A device has half of each matrix, and Adam keeps two numbers of each parameter.
    (params, _), (optimizer, _) = (
        row["bytes_per_device"]["params"],
        row["bytes_per_device"]["optimizer"],
    )
    assert 4 * 158_016 / 2 <= params < 4 * 158_016 and optimizer == 2 * params + 4
    assert (peer["peer"], peer["error"], peer["same_losses"]) == ("hf", None, True) and len(
        row["losses"]
    ) == len(peer["losses"]) == 3
    assert math.isclose(peer["ratio"], speed["median"] / peer["tokens_per_s"]["median"])
    assert peer["bytes_per_device"]["params"] == [4 * 158_016]
    if profiled:
        assert row["profile"]["samples"] > 20 and row["profile"]["core_ms_per_pass"]["compiled"] > 0
        assert peer["profile"]["core_ms_per_pass"]["torch"] > 0 and not list(
            Path("/tmp").glob("perf-*.map")
        )


@pytest.mark.slow
def test_every_peer_runs_and_chooses_the_same_tokens(tiny: str) -> None:
    arguments = [
        "--mesh",
        "1x1,1x2,2x1",
        "--peers",
        "all",
        "--batch",
        "2",
        "--prompt-tokens",
        "8",
        "--steps",
        "8",
        "--repeats",
        "1",
    ]
    report = rows_of(bench(tiny, *arguments, "--json"))
    check_report(report, ["1x1", "1x2", "2x1"])
    for row in report["rows"]:
        found = {peer["peer"]: peer["error"] or peer["same_tokens"] for peer in row["peers"]}
        apart = {
            "1x1": {
                "hf-tp": "hf-tp needs two processes; on one it is hf",
                "recipe": True,
                "recipe-openxla": True,
            },
            "1x2": {"parallama 1x1": True, "hf-tp": True, "recipe": True, "recipe-openxla": True},
            "2x1": {"parallama 1x1": True}
            | {
                peer: f"{peer} splits over one axis only, not 2x1"
                for peer in ("hf-tp", "recipe", "recipe-openxla")
            },
        }[row["mesh"]]
        assert found == {"hf": True, "hf-compile": True} | apart
