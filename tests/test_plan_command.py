"""`parallama plan`: its document, its tables, its pictures, and what it says when something is wrong; no torch, and nothing of the network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_cli import RUNNER, Run, environment

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
        "kv_growth_bytes_per_device",
        "activation_bytes_per_device",
    ),
    *("logits_bytes_per_device", "total_bytes_per_device", "train"),
}
HEAVY = ("torch", "transformers", "torch_xla", "numpy", "matplotlib")


def together(*cases: list[str], folder: Path | None = None) -> list[Run]:
    """Command lines, one after another in one process."""
    given = json.dumps([{"arguments": arguments, "stdin": ""} for arguments in cases])
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=given,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Run(**result) for result in json.loads(done.stdout)]


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
        "model.layers.*.mlp.up_proj.weight: [null, model]\nmodel.layers.*.mlp.gate_proj.weight: [model, data]\n"
    )
    (root / "no-match.yaml").write_text("model.layers.*.mlp.sideways_proj.weight: colwise\n")
    return root


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Run]:
    """The good runs."""
    on = ["--max-model-len", "8192"]
    cases = {
        "8b": ["plan", "llama-3.1-8b", "--mesh", "1x8", *on, "--json"],
        "fits": [
            "plan",
            "llama-3.1-8b",
            "--mesh",
            "1x8",
            *on,
            "--json",
            "--hardware",
            "tpu-v6e",
            "--train",
            "--remat",
            "full",
        ],
        "fsdp": [
            "plan",
            "llama-3.1-8b",
            "--mesh",
            "2x4",
            *on,
            "--json",
            "--train",
            "--batch",
            "2",
            "--fsdp",
            "--dtype",
            "float32",
        ],
        "adapters": [
            *(
                "plan",
                "llama-3.1-8b",
                "--mesh",
                "2x4",
                *on,
                "--json",
                "--train",
                "--batch",
                "2",
                "--lora.rank",
                "8",
                "--lora.targets",
                "q_proj",
            ),
            *("--sequence-parallel", "--grad-accum", "4", "--remat", "2", "--optimizer", "sgd"),
        ],
        "tables": [
            "plan",
            "smollm2",
            "--mesh",
            "2x4",
            "--train",
            "--explain",
            "--hardware",
            "p150",
            "--plan",
            "axes.yaml",
        ],
        "wide": ["plan", "llama-3.1-405b", "-tp", "16", "--train"],
        "one": ["plan", "tiny"],
        "too large": ["plan", "llama-3.1-70b", "--mesh", "1x2", "--hardware", "n150"],
        "too large, as JSON": [
            "plan",
            "llama-3.1-70b",
            "--mesh",
            "1x2",
            "--hardware",
            "n150",
            "--json",
        ],
        "folder": ["plan", "tiny", "--mesh", "1x2", "--json"],
        "file": ["plan", "tiny/config.json", "--mesh", "1x2", "--json"],
        "alias": ["plan", "smollm2", "--json"],
        "name": ["plan", "smollm2-135m", "--json"],
        "half": ["plan", "half.json"],
        "picture": [
            "plan",
            "tiny",
            "--mesh",
            "2x2",
            "--plan",
            "axes.yaml",
            "--plot",
            "picture.svg",
            "--json",
        ],
        "drawing": ["plan", "tiny", "--mesh", "2x2", "--plot", "picture.png", "--json"],
    }
    return dict(zip(cases, together(*cases.values(), folder=folder), strict=True))


def document(run: Run) -> dict[str, Any]:
    assert (run.code, run.err) == (0, ""), run.err
    found: dict[str, Any] = json.loads(run.out)
    return found


# -- without torch


@pytest.mark.parametrize(
    "more",
    [["--json"], ["--explain", "--hardware", "h100-80gb"], ["--plot", "p.svg"]],
    ids=lambda more: more[0],
)
def test_the_largest_model_is_planned_without_torch(tmp_path: Path, more: list[str]):
    code = f"""
import sys
from parallama.__main__ import run
code = run(["plan", "llama-3.1-405b", "--mesh", "2x32", *{more!r}])
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert "405" in done.stdout


# -- the document


def test_the_document_has_its_keys(runs: dict[str, Run]):
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


def test_the_documents_figures_are_those_of_the_pencil(runs: dict[str, Run]):
    """The arithmetic stands in test_cost."""
    found = document(runs["8b"])
    totals = found["totals"]
    assert found["parameter_count"] == 8_030_261_248
    assert totals["param_bytes_per_device"] == 2_008_031_232
    assert totals["kv_bytes_per_device"] == 134_217_728
    assert totals["activation_bytes_per_device"] == 13_893_632
    assert totals["logits_bytes_per_device"] == 64_128
    assert totals["total_bytes_per_device"] == 2_008_031_232 + 134_217_728 + max(
        134_217_728 // 4, 13_893_632 + 64_128
    )
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


def test_hardware_says_whether_it_fits_and_what_would(runs: dict[str, Run]):
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


def test_a_training_step_is_planned_as_train_would_do_it(runs: dict[str, Run]):
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


def test_a_name_a_folder_and_a_config_file_give_the_same_plan(runs: dict[str, Run]):
    folder, file, alias, name = (
        document(runs[which]) for which in ("folder", "file", "alias", "name")
    )
    assert folder | {"model": ""} == file | {"model": ""}
    assert alias | {"model": ""} == name | {"model": ""}
    assert (
        folder["parameter_count"]
        == 2 * 50 * 24 + 2 * (2 * 24 * 24 + 2 * 8 * 24 + 3 * 40 * 24 + 2 * 24) + 24
    )


def test_the_installed_demo_model_has_the_config_of_its_name(runs: dict[str, Run]):
    """Its GGUF file, which takes torch to read, against the table."""
    (run,) = together(["plan", str(locate("smollm2").path), "--dtype", "bfloat16", "--json"])
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


def test_the_tables_stay_within_a_hundred_columns_with_a_line_a_kind(runs: dict[str, Run]):
    for name in ("tables", "wide", "one"):
        run = runs[name]
        assert (run.code, run.err) == (0, "")
        assert max(len(line.rstrip()) for line in run.out.splitlines()) <= 100
    lines = runs["wide"].out.splitlines()
    assert [
        line.split()[1] for line in lines if line.startswith("layers.*.self_attn.q_proj.weight")
    ] == ["x126"]
    assert len(lines) < 100


def test_the_tables_hold_totals_tensors_collectives_and_device_counts(runs: dict[str, Run]):
    out = runs["tables"].out
    for piece in (
        "134,515,008 parameters",
        "9 query / 3 KV heads on 4 devices: padded with zero heads to 12 / 4",
        "fits: it needs",
        "activations, remat",
        "layers.*.mlp.up_proj.weight x30",
        "[-, model]",
        "[model, data]",
        "layers.*.mlp.down_proj",
        "all-gather",
        "extra cache",
        "predicted",
    ):
        assert piece in out, piece


def test_explain_says_why_every_kind_lies_as_it_does(runs: dict[str, Run]):
    out = " ".join(runs["tables"].out.split())
    assert (
        "layers.*.mlp.gate_proj.weight x30 [1536, 576] is split, dim 0 over 'model' and dim 1 over 'data': each device holds [384, 288]."
        in out
    )
    assert "Rule 'axes': asked for by the pattern 'model.layers.*.mlp.gate_proj.weight'." in out
    assert (
        "norm.weight [576] is whole on every device. Rule 'replicate': norms are small: every device holds them."
        in out
    )
    assert "Why" not in runs["wide"].out.splitlines()


def test_one_device_has_no_collectives(runs: dict[str, Run]):
    lines = [line.rstrip() for line in runs["one"].out.splitlines()]
    assert (
        lines[
            lines.index("Collectives of one step (predicted); a prefill step has 64 positions") + 1
        ]
        == "none"
    )


def test_a_dtype_other_than_the_stored_one_is_said(runs: dict[str, Run]):
    assert "dtype  float32 (stored as float16)" in runs["half"].out


def test_what_does_not_fit_is_shown_and_ends_with_code_4(runs: dict[str, Run]):
    run = runs["too large"]
    assert run.code == 4 and "does not fit" in run.out and "Device counts" in run.out
    assert (
        run.err.startswith("parallama: llama-3.1-70b on mesh 1x2 needs ")
        and len(run.err.splitlines()) == 3
    )
    as_json = runs["too large, as JSON"]
    assert as_json.code == 4 and as_json.err == run.err
    assert json.loads(as_json.out)["fits"] is False


def test_the_picture_is_written_beside_the_document(runs: dict[str, Run], folder: Path):
    assert document(runs["picture"]) and document(runs["drawing"])
    text = (folder / "picture.svg").read_text()
    assert (
        "layers.*.mlp.gate_proj.weight x2" in text
        and "[40, 24] over [model, data]" in text
        and "cache.key" in text
    )
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")


# -- refusals


REFUSALS: list[tuple[str, list[str], int, str]] = [
    (
        "no such model",
        ["no-such-model"],
        3,
        "model 'no-such-model' is not there\nexpected a folder, a config.json, ",
    ),
    ("no such config", ["tiny/no.json"], 3, "model 'tiny/no.json' is not there\n"),
    ("empty name", [""], 3, "model '' is not there\n"),
    ("no config.json", ["empty"], 3, "folder 'empty' has no config.json\nexpected a model folder"),
    ("no JSON", ["no.json"], 3, "no.json cannot be read: "),
    ("a list", ["list.json"], 3, "the config of list.json holds a list\nexpected a JSON object"),
    (
        "another family",
        ["gpt2.json"],
        3,
        "model_type 'gpt2' is not supported: query, key and value are one fused weight\n",
    ),
    (
        "heads",
        ["heads.json"],
        3,
        "num_attention_heads 6 does not divide by num_key_value_heads 4\n",
    ),
    ("quantized", ["quantized.json"], 3, "has a quantization_config\n"),
    ("rope", ["rope.json"], 3, "rope type 'mrope' is not supported\n"),
    (
        "a text file",
        ["notes.txt"],
        3,
        "'notes.txt' is a file of a kind that is not supported\nexpected a config.json, a .gguf file, ",
    ),
    (
        "hub offline",
        ["someone/else"],
        3,
        "the config.json of 'someone/else' cannot be had from the hub: ",
    ),
    ("no hub id", ["a..b/c"], 3, "model 'a..b/c' is no valid hub id: "),
    (
        "hardware",
        ["tiny", "--hardware", "abacus"],
        2,
        "hardware 'abacus' is unknown\nexpected one of tpu-v4, ",
    ),
    ("mesh", ["tiny", "--mesh", "1y8"], 2, "mesh '1y8' cannot be read\n"),
    (
        "mesh and tp",
        ["tiny", "--mesh", "1x2", "-tp", "4"],
        2,
        "--mesh 1x2 splits over 2 devices, --tensor-parallel-size over 4\n",
    ),
    (
        "dtype",
        ["tiny", "--dtype", "int8"],
        2,
        "dtype 'int8' is unknown\nexpected auto, float32 or bfloat16",
    ),
    ("batch", ["tiny", "--batch", "0"], 2, "--batch is 0\n"),
    (
        "length",
        ["tiny", "--max-model-len", "65"],
        2,
        "--max-model-len is 65\nexpected 1 to 64, the model's maximum",
    ),
    (
        "seq",
        ["tiny", "--max-model-len", "8", "--seq", "9"],
        2,
        "--seq is 9\nexpected 1 to 8, the maximum length",
    ),
    ("plan", ["tiny", "--plan", "no-match.yaml"], 2, "matches no parameter\n"),
    (
        "axes that do not divide",
        ["tiny", "--mesh", "5x1", "--plan", "axes.yaml"],
        2,
        "dim 1 has size 24, which axis 'data' (5 devices) does not divide",
    ),
    ("fsdp alone", ["tiny", "--fsdp"], 2, "--fsdp is about training\nexpected --train beside it"),
    (
        "remat",
        ["tiny", "--train", "--remat", "some"],
        2,
        "remat is 'some'\nexpected none, full or a whole number of at least 1",
    ),
    (
        "targets",
        ["tiny", "--train", "--lora.rank", "2", "--lora.targets", "q,v"],
        2,
        "lora targets are q, v\nexpected some of q_proj",
    ),
    (
        "sequence",
        ["tiny", "--train", "--mesh", "1x2", "--seq", "7", "--sequence-parallel"],
        4,
        "--seq is 7\nexpected a multiple of 2",
    ),
    ("plot", ["tiny", "--plot", "p.jpg"], 2, "--plot p.jpg is neither .svg nor .png\n"),
]


@pytest.fixture(scope="module")
def refused(folder: Path) -> dict[str, Run]:
    found = together(*(["plan", *arguments] for _, arguments, _, _ in REFUSALS), folder=folder)
    return dict(zip([case[0] for case in REFUSALS], found, strict=True))


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [(name, code, text) for name, _, code, text in REFUSALS],
    ids=[case[0] for case in REFUSALS],
)
def test_what_is_wrong_is_said_in_three_lines(
    refused: dict[str, Run], name: str, code: int, expected: str
):
    run = refused[name]
    assert (run.code, run.out) == (code, ""), run.err
    assert run.err.startswith("parallama: ") and expected in run.err
    assert (
        len(run.err.splitlines()) <= 3
        and "Traceback" not in run.err
        and "fault of parallama" not in run.err
    )


def test_a_damaged_gguf_is_refused(folder: Path):
    (run,) = together(["plan", "cut.gguf"], folder=folder)
    assert run.code == 3 and "cut.gguf" in run.err and len(run.err.splitlines()) <= 3


def test_every_known_name_is_planned():
    for name, run in zip(
        CONFIGS,
        together(*(["plan", name, "--mesh", "1x8", "--json"] for name in CONFIGS)),
        strict=True,
    ):
        assert document(run)["model"] == name


def test_help_lists_the_options_without_torch():
    code = "import sys; from parallama.__main__ import run; code = run(['plan', '--help']); print('torch' in sys.modules); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment() | {"COLUMNS": "100"},
    )
    assert done.returncode == 0 and done.stdout.rstrip().endswith("False")
    for option in (
        "--mesh",
        "--batch",
        "--seq",
        "--max-model-len",
        "--dtype",
        "--train",
        "--plan",
        "--hardware",
        "--explain",
        "--json",
        "--plot",
    ):
        assert option in done.stdout
