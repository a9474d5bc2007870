"""`parallama bench`: what it measures with, what it refuses, and runs beside real peers."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from forks import Done, command
from messages import check_refusal, says
from safetensors.torch import load_file, save_file

from parallama.bench import profile, shapes
from parallama.bench.keeper import family
from parallama.bench.processes import EngineProcess
from parallama.bench.run import Options
from parallama.bench.training import TrainOptions
from parallama.errors import CheckpointError, RunError, UsageError
from parallama.model.spec import ModelSpec
from parallama.plan import cost
from parallama.plan.mesh_shape import MeshShape

ONE = MeshShape(data=1, model=1)


def bench(*arguments: str) -> Done:
    return command(["bench", *arguments], limit_s=900)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    done = bench("--make", "tiny", str(folder), "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"folder": str(folder), "shape": "tiny", "parameters": 158016}
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


WRONG: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("--peers vllm", ("'vllm'", "hf, hf-compile, hf-tp, recipe, recipe-openxla")),
    ("--batch 1,x", ("--batch '1,x'", "1,4,16")),
    ("--batch 0", ("batch is 0", "at least 1")),
    ("--prompt-tokens 8,8", ("--prompt-tokens 8,8", "twice")),
    ("--mesh 1x1,1x1", ("--mesh 1x1,1x1", "twice")),
    ("--mesh ,", ("no mesh", "1x1,1x2")),
    ("--steps 3", ("steps is 3", "at least 8")),
    ("--repeats 0", ("repeats is 0", "at least 1")),
    ("--threads 4096", ("threads is 4096", "1 to ")),
    ("--dtype int4", ("dtype 'int4'", "float32", "bfloat16")),
    ("--train --peers hf-tp", ("'hf-tp'", "one of hf")),
    ("--train --batch 2,4", ("--batch 2,4", "--train")),
    ("--train --prompt-tokens 1", ("prompt-tokens is 1", "at least 2")),
    ("--train --repeats 0", ("repeats is 0", "at least 1")),
    ("--train --mesh 2x1 --batch 3", ("batch 3", "2x1", "multiple of 2")),
    ("--train --mesh ,", ("no mesh", "1x1,1x2")),
    ("--train --threads 4096", ("threads is 4096", "1 to ")),
    ("--train --dtype int4", ("dtype 'int4'", "float32", "bfloat16")),
    ("--load", ("'nowhere'", "safetensors")),
    ("--load --mesh ,", ("no mesh", "1x1,1x2")),
    ("--load --repeats 0", ("repeats is 0", "at least 1")),
    ("--load --batch 4", ("--batch", "--load")),
    ("--load --peers hf", ("--peers", "--load")),
    ("--load --steps 24", ("--steps", "--load")),
    ("--load --train", ("--train", "--load")),
    ("--load --threads 0", ("--threads", "--load")),
    ("--load --backend tpu", ("--backend tpu", "--load", "cpu")),
    ("--train --plot x.png", ("--plot", "--train")),
    ("--load --profile", ("--profile", "--load")),
    ("--make l200 --threads 2", ("--threads", "--make")),
    ("--make l200 --load", ("--load", "--make")),
    ("--train --steps 24", ("--steps", "--train")),
)


@pytest.mark.parametrize(("arguments", "parts"), WRONG, ids=[case[0] for case in WRONG])
def test_a_wrong_option_is_refused_before_anything_runs(
    arguments: str, parts: tuple[str, ...]
) -> None:
    check_refusal(bench("nowhere", *arguments.split()), 2, *parts)


def test_a_picture_that_could_not_be_written_is_refused_before_anything_runs(
    tmp_path: Path,
) -> None:
    for path in (tmp_path, tmp_path / "none" / "rows.png"):
        check_refusal(bench("nowhere", "--plot", str(path)), 2, f"--plot {path}")


def test_a_model_that_is_not_there_is_refused() -> None:
    check_refusal(bench("./nowhere"), 3, "'./nowhere'")


def test_a_shape_that_is_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        shapes.make("l9", tmp_path / "x")
    assert says(caught.value, "'l9'", "tiny, smol135, l200, l1b")
    assert not (tmp_path / "x").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        shapes.make("tiny", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as caught:
        shapes.make("tiny", tmp_path / "file" / "below")
    assert says(caught.value, tmp_path / "file" / "below", "Not a directory")


def test_options_are_checked_in_python_too() -> None:
    with pytest.raises(UsageError, match="'x'"):
        Options(model="m", meshes=(ONE,), peers=("x",))
    with pytest.raises(UsageError, match="batch 3"):
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
    if kind is TrainOptions:
        step = told["train"]["step"]
        assert (step["batch_size"], step["seq_len"], told["train"]["lr"]) == (4, 256, 1e-4)
    else:
        assert "train" not in told


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
    with pytest.raises(CheckpointError) as caught:
        EngineProcess(engine)
    assert says(caught.value, tmp_path / "none")


MACHINE = {"engine": "machine", "threads": 1}


def test_an_engine_that_ends_at_its_start_says_what_it_said_last() -> None:
    with pytest.raises(RunError, match=r"machine .*KeyError: 'threads'"):
        EngineProcess({"engine": "machine"})


def test_an_engine_that_dies_is_named() -> None:
    with EngineProcess(MACHINE) as engine:
        os.killpg(engine.pid, signal.SIGKILL)
        with pytest.raises(RunError, match="machine has died"):
            engine.ask("measure")


def test_an_engine_that_takes_too_long_is_ended_and_named() -> None:
    with EngineProcess(MACHINE, ask_limit_s=0.01) as engine:
        with pytest.raises(RunError, match=r"machine .* 0\.01 s"):
            engine.ask("measure")
        with pytest.raises(ProcessLookupError):
            os.killpg(engine.pid, 0)


def test_an_engine_that_has_replied_leaves_the_cores_to_the_next() -> None:
    with EngineProcess(MACHINE | {"threads": 2}) as engine:
        engine.ask("measure")
        states = [
            stat.read_text().rpartition(") ")[2][0]
            for pid in family(engine.pid)
            for stat in Path(f"/proc/{pid}/task").glob("*/stat")
        ]
    assert len(states) > 1 and set(states) == {"S"}


# -- a run


def rows_of(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    return json.loads(done.out)


def check_report(report: dict[str, Any], meshes: list[str]) -> None:
    assert report["machine"]["bandwidth_bytes_per_s"] > 0 < report["machine"]["gemm_flops_per_s"]
    assert set(report["versions"]) == {"parallama", "torch", "torch_xla", "transformers", "python"}
    assert [start["mesh"] for start in report["starts"]] == meshes
    for start in report["starts"]:
        parts = ("import_s", "load_s", "trace_s", "compile_s", "first_token_s")
        assert math.isclose(sum(start[part] for part in parts), start["cold_ttft_s"], rel_tol=0.01)
        assert 0 < start["warm_ttft_s"] < start["cold_ttft_s"]  # by compilation
        assert start["programs"] == 2
    for row in report["rows"]:
        speed = row["tokens_per_s"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert row["peak_rss_bytes"] > 1e8
        used = row["mfu"] if row["what"] == "prefill" else row["mbu"]
        assert used > 0


def test_a_run_measures_ours_beside_peers_that_choose_the_same_tokens(
    tiny: str, tmp_path: Path
) -> None:
    picture = tmp_path / "rows.png"
    sizes = ["--batch", "2", "--prompt-tokens", "8,9000", "--steps", "8", "--repeats", "1"]
    written = ["--plot", str(picture), "--json"]
    report = rows_of(bench(tiny, "--mesh", "1x2", "--peers", "hf", *sizes, *written))
    assert report["command"].startswith(f"parallama bench {tiny} --mesh 1x2")
    measured = [row for row in report["rows"] if row["skipped"] is None]
    skipped = [row for row in report["rows"] if row["skipped"] is not None]
    check_report(report | {"rows": measured}, ["1x2"])
    assert [(row["what"], row["mesh"], row["batch"], row["prompt"]) for row in measured] == [
        ("prefill", "1x2", 2, 8),
        ("decode", "1x2", 2, 8),
    ]
    for row in measured:
        (peer,) = row["peers"]
        assert (peer["peer"], peer["processes"]) == ("hf", 1)
        assert peer["error"] is None and peer["same_tokens"] is True
        ours, theirs = (speed["tokens_per_s"]["median"] for speed in (row, peer))
        assert math.isclose(peer["ratio"], ours / theirs)
    assert [(row["what"], row["skipped"]) for row in skipped] == [
        (what, "18000 prompt tokens, over the limit of 16384") for what in ("prefill", "decode")
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_profile_without_perf_says_how_to_get_it(
    tmp_path: Path,
) -> None:
    done = command(["bench", "nowhere", "--profile"], env={"PATH": str(tmp_path)})
    check_refusal(done, 2, "--profile", "apt-get install linux-perf")


@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed")
def test_a_profile_that_cannot_be_taken_says_what_perf_said() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with (
        pytest.raises(RunError, match=r"/proc/sys/kernel/perf_event_paranoid"),
        profile.recording(ended.pid),
    ):
        pass


@pytest.mark.slow  # that of a training step is below
@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed")
def test_a_profile_shows_what_every_engine_does(tiny: str) -> None:
    sizes = ["--batch", "16", "--prompt-tokens", "256", "--steps", "16", "--repeats", "3"]
    done = bench(tiny, "--mesh", "1x2", "--peers", "hf", *sizes, "--profile", "--json")
    for row in rows_of(done)["rows"]:
        ours, (theirs,) = row["profile"], [peer["profile"] for peer in row["peers"]]
        for taken in (ours, theirs):
            assert taken["samples"] > 20 and taken["ms_per_pass"] > 0
        assert ours["core_ms_per_pass"]["compiled"] > theirs["core_ms_per_pass"]["compiled"] == 0
        assert theirs["core_ms_per_pass"]["torch"] > ours["core_ms_per_pass"]["torch"]
    assert not list(Path("/tmp").glob("perf-*.map"))


@pytest.fixture
def with_nan(tiny: str, tmp_path: Path) -> list[str]:
    """What to measure of a model that holds NaN."""
    stored = load_file(Path(tiny) / "model.safetensors")
    stored["model.layers.0.mlp.down_proj.weight"][0, -1] = float("nan")
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((Path(tiny) / "config.json").read_bytes())
    sizes = ["--batch", "1", "--prompt-tokens", "8", "--steps", "8", "--repeats", "1"]
    return [str(tmp_path), "--peers", ",", *sizes, "--quiet", "--json"]


def test_a_model_that_holds_nan_is_not_measured(with_nan: list[str]) -> None:
    parts = ("model.layers.0.mlp.down_proj.weight", "NaN", "1 of 11264 ", "--allow-nonfinite")
    check_refusal(bench(*with_nan), 3, *parts, as_json=True)


@pytest.mark.slow
def test_a_model_that_holds_nan_is_measured_where_that_is_allowed(with_nan: list[str]) -> None:
    report = rows_of(bench(*with_nan, "--allow-nonfinite"))
    assert report["command"].endswith("--allow-nonfinite")
    check_report(report, ["1x1"])
    found = [(row["what"], row["peers"]) for row in report["rows"]]
    assert found == [("prefill", []), ("decode", [])]


def test_training_steps_are_measured_beside_an_eager_loop_that_has_the_same_losses(
    tiny: str,
) -> None:
    profiled = ["--profile"] if shutil.which("perf") else []
    sizes = ["--batch", "2", "--prompt-tokens", "16", "--repeats", "2"]
    report = rows_of(bench(tiny, "--train", "--mesh", "1x2", *sizes, *profiled, "--json"))
    assert report["command"].startswith(f"parallama bench {tiny} --train")
    assert report["machine"]["gemm_flops_per_s"] > 0
    (row,) = report["rows"]
    assert (row["what"], row["mesh"], row["batch"], row["seq_len"]) == ("train", "1x2", 2, 16)
    speed, (peer,) = row["tokens_per_s"], row["peers"]
    assert 0 < speed["min"] <= speed["median"] <= speed["max"] and speed["samples"] == 2
    assert row["step_s"] > 0 and row["mfu"] > 0 and row["peak_rss_bytes"] > 1e8
    # A device has half of each matrix, and Adam keeps two numbers of each parameter.
    params, optimizer = (row["bytes_per_device"][name][0] for name in ("params", "optimizer"))
    assert 4 * 158_016 / 2 <= params < 4 * 158_016 and optimizer == 2 * params + 4
    assert (peer["peer"], peer["error"], peer["same_losses"]) == ("hf", None, True)
    assert len(row["losses"]) == len(peer["losses"]) == 3
    assert math.isclose(peer["ratio"], speed["median"] / peer["tokens_per_s"]["median"])
    assert peer["bytes_per_device"]["params"] == [4 * 158_016]
    if profiled:
        assert row["profile"]["samples"] > 0 and row["profile"]["core_ms_per_pass"]["compiled"] > 0
        assert peer["profile"]["core_ms_per_pass"]["torch"] > 0
        assert not list(Path("/tmp").glob("perf-*.map"))


@pytest.mark.slow
def test_every_peer_runs_and_chooses_the_same_tokens(tiny: str) -> None:
    sizes = ["--batch", "2", "--prompt-tokens", "8", "--steps", "8", "--repeats", "1"]
    report = rows_of(bench(tiny, "--mesh", "1x1,1x2,2x1", "--peers", "all", *sizes, "--json"))
    check_report(report, ["1x1", "1x2", "2x1"])
    for row in report["rows"]:
        peers = {peer["peer"]: peer for peer in row["peers"]}
        apart = {
            "1x1": {"recipe", "recipe-openxla"},
            "1x2": {"parallama 1x1", "hf-tp", "recipe", "recipe-openxla"},
            "2x1": {"parallama 1x1"},
        }[row["mesh"]] | {"hf", "hf-compile"}
        assert {name for name, peer in peers.items() if peer["error"] is None} == apart
        assert all(peers[name]["same_tokens"] is True for name in apart)
        others = {name: peer["error"] for name, peer in peers.items() if name not in apart}
        assert all(name in error for name, error in others.items()), others
        if "hf-tp" in apart:
            assert peers["hf-tp"]["processes"] == 2
