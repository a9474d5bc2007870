"""`parallama plan`: its document, its tables, its pictures, and what it refuses.

It needs no torch, and nothing of the network.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
from forks import Done, command, environment
from messages import check_refusal, says

from parallama.files.locate import locate
from parallama.model.known_configs import CONFIGS
from parallama.plan.hardware import HARDWARE

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
KEYS = {
    *(
        "model",
        "parameter_count",
        "mesh",
        "dtype",
        "stored_dtype",
        "batch",
        "seq",
        "max_model_len",
        "prefill_positions",
    ),
    *("parameters", "heads", "totals", "collectives", "device_counts", "hardware", "fits"),
}
PARAMETER_KEYS = {"name", "shape", "dtype", "partition", "style", "bytes_per_device", "reason"}
TOTALS = {
    *(
        "param_bytes_per_device",
        "kv_bytes_per_device",
        "state_bytes_per_device",
        "activation_bytes_per_device",
    ),
    *("logits_bytes_per_device", "total_bytes_per_device", "train"),
}
HEAVY = ("torch", "transformers", "torch_xla", "numpy", "matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs, good and bad, and plans of axes."""
    root = tmp_path_factory.mktemp("plan")
    (root / "tiny").mkdir()
    (root / "tiny" / "config.json").write_text(json.dumps(SIZES))
    (root / "half.json").write_text(json.dumps(SIZES | {"torch_dtype": "float16"}))
    (root / "empty").mkdir()
    (root / "no.json").write_text("{")
    (root / "list.json").write_text("[]")
    (root / "gpt2.json").write_text(json.dumps(SIZES | {"model_type": "gpt2"}))
    (root / "heads.json").write_text(json.dumps(SIZES | {"num_key_value_heads": 4}))
    (root / "quantized.json").write_text(json.dumps(SIZES | {"quantization_config": {}}))
    (root / "rope.json").write_text(json.dumps(SIZES | {"rope_scaling": {"type": "mrope"}}))
    (root / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (root / "notes.txt").write_text("notes")
    (root / "axes.yaml").write_text(
        "model.layers.*.mlp.up_proj.weight: [null, model]\n"
        "model.layers.*.mlp.gate_proj.weight: [model, data]\n"
    )
    (root / "no-match.yaml").write_text("model.layers.*.mlp.sideways_proj.weight: colwise\n")
    return root


RUNS = {
    "8b": "llama-3.1-8b --mesh 1x8 --max-model-len 8192 --json",
    "fits": "llama-3.1-8b --mesh 1x8 --max-model-len 8192 --json --hardware tpu-v6e --train "
    "--remat full",
    "fsdp": "llama-3.1-8b --mesh 2x4 --max-model-len 8192 --json --train --batch 2 --fsdp "
    "--dtype float32",
    "adapters": "llama-3.1-8b --mesh 2x4 --max-model-len 8192 --json --train --batch 2 "
    "--lora.rank 8 --lora.targets q_proj --sequence-parallel --grad-accum 4 --remat 2 "
    "--optimizer sgd",
    "tables": "smollm2 --mesh 2x4 --train --explain --hardware p150 --plan axes.yaml",
    "wide": "llama-3.1-405b -tp 16 --train",
    "one": "tiny",
    "too large": "llama-3.1-70b --mesh 1x2 --hardware n150",
    "too large, as JSON": "llama-3.1-70b --mesh 1x2 --hardware n150 --json",
    "folder": "tiny --mesh 1x2 --json",
    "file": "tiny/config.json --mesh 1x2 --json",
    "alias": "smollm2 --json",
    "name": "smollm2-135m --json",
    "half": "half.json",
    "picture": "tiny --mesh 2x2 --plan axes.yaml --plot picture.svg --json",
    "drawing": "tiny --mesh 2x2 --plot picture.png --json",
}


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Done]:
    """The good runs."""
    found = forks.commands(*(["plan", *each.split()] for each in RUNS.values()), cwd=folder)
    return dict(zip(RUNS, found, strict=True))


def document(run: Done) -> dict[str, Any]:
    assert (run.code, run.err) == (0, ""), run.err
    found: dict[str, Any] = json.loads(run.out)
    return found


# -- without torch


WITHOUT_TORCH = f"""
import contextlib, io, json, sys
from parallama.__main__ import run
found = []
for more in (["--json"], ["--explain", "--hardware", "h100-80gb"], ["--plot", "p.svg"]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = run(["plan", "llama-3.1-405b", "--mesh", "2x32", *more])
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    found.append([code, "405" in out.getvalue(), heavy])
print(json.dumps(found))
"""


def test_the_largest_model_is_planned_without_torch(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [[0, True, []]] * 3


# -- the document


def test_the_document_has_its_keys(runs: dict[str, Done]):
    found = document(runs["8b"])
    assert found.keys() == KEYS
    assert all(entry.keys() == PARAMETER_KEYS for entry in found["parameters"])
    assert found["totals"].keys() == TOTALS
    assert found["collectives"].keys() == {"prefill", "decode", "train"}
    for phase in found["collectives"].values():
        assert phase and all(
            item.keys() == {"kind", "axis", "count", "bytes", "module"} for item in phase
        )
    assert (found["model"], found["mesh"], found["dtype"]) == (
        "llama-3.1-8b",
        {"data": 1, "model": 8},
        "bfloat16",
    )
    assert (found["hardware"], found["fits"], found["totals"]["train"]) == (None, None, None)


def test_the_documents_figures_are_those_of_the_pencil(runs: dict[str, Done]):
    """The arithmetic stands in test_cost."""
    found = document(runs["8b"])
    totals = found["totals"]
    assert found["parameter_count"] == 8_030_261_248
    assert totals["param_bytes_per_device"] == 2_008_031_232
    assert totals["kv_bytes_per_device"] == 138_412_032
    assert totals["state_bytes_per_device"] == 192_400
    assert totals["activation_bytes_per_device"] == 3_473_408
    assert totals["logits_bytes_per_device"] == 64_128
    together = 2_008_031_232 + 138_412_032 + 192_400 + 3_473_408 + 64_128
    assert totals["total_bytes_per_device"] == together
    assert (
        sum(entry["bytes_per_device"] for entry in found["parameters"])
        == totals["param_bytes_per_device"]
    )
    query = next(
        entry
        for entry in found["parameters"]
        if entry["name"] == "model.layers.7.self_attn.q_proj.weight"
    )
    assert query == {
        "name": "model.layers.7.self_attn.q_proj.weight",
        "shape": [4096, 4096],
        "dtype": "bfloat16",
        "partition": ["model", None],
        "style": "colwise",
        "bytes_per_device": 4096 // 8 * 4096 * 2,
        "reason": "split on its outputs: input replicated, no communication",
    }


def test_hardware_says_whether_it_fits_and_what_would(runs: dict[str, Done]):
    found = document(runs["fits"])
    train, hardware = found["totals"]["train"], found["hardware"]
    assert found["fits"] is True
    assert (
        hardware["needed_bytes_per_device"]
        == train["total_remat_bytes_per_device"]
        == train["total_bytes_per_device"]
    )
    assert train["rematerialized_layers"] == 32
    assert (
        (hardware["name"], hardware["memory_bytes_per_device"])
        == ("tpu-v6e", HARDWARE["tpu-v6e"].memory_bytes)
        == ("tpu-v6e", 32 * 10**9)
    )
    assert hardware["largest_batch"] > 1 and hardware["largest_context"] > 512


def test_a_training_step_is_planned_as_train_would_do_it(runs: dict[str, Done]):
    split, adapted = (document(runs[which])["totals"]["train"] for which in ("fsdp", "adapters"))
    vectors = (2 * 32 + 1) * 4096 * 4
    whole = 8_030_261_248 * 4 - vectors
    held = whole // 8 + vectors  # an eighth of every matrix, and the norms
    assert (split["param_bytes_per_device"], split["gradient_bytes_per_device"]) == (held, held)
    assert split["optimizer_bytes_per_device"] == 2 * held + 4
    assert (
        split["copy_bytes_per_device"] == 128256 // 4 * 4096 * 4
    )  # the embedding, put together over data
    kinds = {each["kind"] for each in document(runs["fsdp"])["collectives"]["train"]}
    assert kinds == {"all-reduce", "all-gather", "reduce-scatter"}
    adapters = 32 * (8 * 4096 + 4096 // 4 * 8)
    assert (
        adapted["gradient_bytes_per_device"] == adapters * 4
        and adapted["optimizer_bytes_per_device"] == 4
    )
    assert adapted["rematerialized_layers"] == 16
    assert adapted["param_bytes_per_device"] == whole // 4 + vectors + adapters * 4


def test_a_name_a_folder_and_a_config_file_give_the_same_plan(runs: dict[str, Done]):
    folder, file, alias, name = (
        document(runs[which]) for which in ("folder", "file", "alias", "name")
    )
    assert folder | {"model": ""} == file | {"model": ""}
    assert alias | {"model": ""} == name | {"model": ""}
    assert (
        folder["parameter_count"]
        == 2 * 50 * 24 + 2 * (2 * 24 * 24 + 2 * 8 * 24 + 3 * 40 * 24 + 2 * 24) + 24
    )


def test_the_installed_demo_model_has_the_config_of_its_name(runs: dict[str, Done]):
    """Its GGUF file, which takes torch to read, against the table."""
    run = command(["plan", str(locate("smollm2").path), "--dtype", "bfloat16", "--json"])
    by_file, by_name = document(run), document(runs["name"])
    assert by_file | {"model": "", "stored_dtype": ""} == by_name | {
        "model": "",
        "stored_dtype": "",
    }


def test_a_hub_id_in_the_local_cache_is_planned_from_its_config_alone(tmp_path: Path):
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--someone--a-model"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit / "config.json").write_text(json.dumps(SIZES))
    done = subprocess.run(
        [sys.executable, "-m", "parallama", "plan", "someone/a-model", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment() | {"HF_HOME": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["parameters"][0]["shape"] == [50, 24]


# -- for people


def test_the_tables_stay_within_a_hundred_columns_with_a_line_a_kind(runs: dict[str, Done]):
    for name in ("tables", "wide", "one"):
        run = runs[name]
        assert (run.code, run.err) == (0, "")
        assert max(len(line.rstrip()) for line in run.out.splitlines()) <= 100
    lines = runs["wide"].out.splitlines()
    assert [
        line.split()[1] for line in lines if line.startswith("layers.*.self_attn.q_proj.weight")
    ] == ["x126"]
    assert len(lines) < 100


def test_the_tables_hold_totals_tensors_collectives_and_device_counts(runs: dict[str, Done]):
    out = runs["tables"].out
    for piece in (
        "134,515,008 parameters",
        "12 / 4",  # heads with those of zeros
        "fits: ",
        "layers.*.mlp.up_proj.weight x30",
        "[-, model]",
        "[model, data]",
        "layers.*.mlp.down_proj",
        "all-gather",
        "extra cache",
        "predicted",
    ):
        assert piece in out, piece


def test_explain_says_of_every_kind_its_shapes_its_rule_and_its_pattern(runs: dict[str, Done]):
    why = " ".join(runs["tables"].out.split()).split(" Why ")[1]
    gate = why.split(" layers.*.mlp.gate_proj.weight x30 [1536, 576] ")[1].split(" layers.")[0]
    norm = why.split(" norm.weight [576] ")[1].split(" KV cache ")[0]
    for part in ("dim 0", "'model'", "dim 1", "'data'", "[384, 288]", "'axes'"):
        assert part in gate, gate
    assert "'replicate'" in norm
    assert "Why" not in runs["wide"].out.splitlines()


def test_one_device_has_no_collectives(runs: dict[str, Done]):
    lines = [line.rstrip() for line in runs["one"].out.splitlines()]
    (start,) = (number for number, line in enumerate(lines) if line.startswith("Collectives"))
    assert lines[start + 1] == "none"


def test_a_dtype_other_than_the_stored_one_is_said(runs: dict[str, Done]):
    assert "dtype  float32 (stored as float16)" in runs["half"].out


def test_what_does_not_fit_is_shown_and_ends_with_code_4(runs: dict[str, Done]):
    run = runs["too large"]
    assert run.code == 4 and "does not fit" in run.out and "Device counts" in run.out
    assert says(run.err, "llama-3.1-70b", "mesh 1x2", "n150")
    as_json = runs["too large, as JSON"]
    assert as_json.code == 4 and as_json.err == run.err
    assert json.loads(as_json.out)["fits"] is False


def test_the_picture_is_written_beside_the_document(runs: dict[str, Done], folder: Path):
    assert document(runs["picture"]) and document(runs["drawing"])
    text = (folder / "picture.svg").read_text()
    assert (
        "layers.*.mlp.gate_proj.weight x2" in text
        and "[40, 24] over [model, data]" in text
        and "cache.key" in text
    )
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")


# -- refusals


REFUSALS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "no such model": ("no-such-model", 3, ("'no-such-model'", "config.json")),
    "no such config": ("tiny/no.json", 3, ("'tiny/no.json'",)),
    "no config.json": ("empty", 3, ("'empty'", "config.json")),
    "no JSON": ("no.json", 3, ("no.json cannot be read",)),
    "a list": ("list.json", 3, ("list.json", "list", "object")),
    "another family": ("gpt2.json", 3, ("model_type 'gpt2'",)),
    "heads": ("heads.json", 3, ("num_attention_heads 6", "num_key_value_heads 4")),
    "quantized": ("quantized.json", 3, ("quantization_config",)),
    "rope": ("rope.json", 3, ("'mrope'",)),
    "a text file": ("notes.txt", 3, ("'notes.txt'", "config.json", ".gguf")),
    "a damaged GGUF": ("cut.gguf", 3, ("cut.gguf",)),
    "hub offline": ("someone/else", 3, ("HF_HUB_OFFLINE", "'someone/else'")),
    "no hub id": ("a..b/c", 3, ("'a..b/c'",)),
    "hardware": ("tiny --hardware abacus", 2, ("'abacus'", "tpu-v4")),
    "mesh": ("tiny --mesh 1y8", 2, ("mesh '1y8'",)),
    "mesh and tp": (
        "tiny --mesh 1x2 -tp 4",
        2,
        ("--mesh 1x2", "2 devices", "--tensor-parallel-size", "4"),
    ),
    "dtype": ("tiny --dtype int8", 2, ("dtype 'int8'", "auto, float32", "bfloat16")),
    "batch": ("tiny --batch 0", 2, ("--batch is 0",)),
    "length": ("tiny --max-model-len 65", 2, ("--max-model-len is 65", "1 to 64")),
    "seq": ("tiny --max-model-len 8 --seq 9", 2, ("--seq is 9", "1 to 8")),
    "plan": ("tiny --plan no-match.yaml", 2, ("sideways_proj",)),
    "axes that do not divide": (
        "tiny --mesh 5x1 --plan axes.yaml",
        2,
        ("dim 1", "24", "'data'", "5"),
    ),
    "fsdp alone": ("tiny --fsdp", 2, ("--fsdp", "--train")),
    "remat": ("tiny --train --remat some", 2, ("remat is 'some'", "none, full")),
    "targets": ("tiny --train --lora.rank 2 --lora.targets q,v", 2, ("q, v", "q_proj")),
    "sequence": (
        "tiny --train --mesh 1x2 --seq 7 --sequence-parallel",
        4,
        ("--seq is 7", "multiple of 2"),
    ),
    "plot": ("tiny --plot p.jpg", 2, ("--plot p.jpg", ".svg", ".png")),
}


@pytest.mark.parametrize(("arguments", "code", "parts"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_wrong_is_said_in_three_lines(
    folder: Path, arguments: str, code: int, parts: tuple[str, ...]
):
    check_refusal(command(["plan", *arguments.split()], cwd=folder), code, *parts)


def test_an_empty_name_is_no_model():
    check_refusal(command(["plan", ""]), 3, "''")


def test_every_known_name_is_planned():
    cases = (["plan", name, "--mesh", "1x8", "--json"] for name in CONFIGS)
    for name, run in zip(CONFIGS, forks.commands(*cases), strict=True):
        assert document(run)["model"] == name


def test_help_lists_the_options():
    done = command(["plan", "--help"], env={"COLUMNS": "100"})
    assert done.code == 0
    for option in (
        *("--mesh", "--batch", "--seq", "--max-model-len", "--dtype", "--train", "--plan"),
        *("--hardware", "--explain", "--json", "--plot"),
    ):
        assert option in done.out
