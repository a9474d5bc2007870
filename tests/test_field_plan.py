"""Planning by someone who has a device: what it is called, what fits on it, and what would."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_hub
import forks
import pytest
from forks import Done, command, environment
from messages import check_raised, check_refusal, says
from reference import TinyModels

from parallama.errors import CheckpointError, UsageError
from parallama.files.find import find
from parallama.files.near_misses import known_names
from parallama.model.known_configs import CONFIGS, WEIGHTS
from parallama.plan.hardware import HARDWARE
from parallama.plan.hardware_names import find_hardware

# -- what people call their hardware


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("h100", "h100-80gb"),
        ("H100-80GB", "h100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("Tesla T4", "t4"),
        ("rtx4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("TPU-v5e", "tpu-v5e"),
        ("v5litepod", "tpu-v5e"),
        ("v6e", "tpu-v6e"),
        ("trillium", "tpu-v6e"),
        ("tpu7x", "tpu-v7x"),
        ("ironwood", "tpu-v7x"),
        ("trainium2", "trn2"),
        ("n300d", "n300"),
    ],
)
def test_hardware_is_found_by_what_people_and_drivers_call_it(given: str, name: str):
    assert find_hardware(given) is HARDWARE[name]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("a100", ("'a100'", "a100-40gb", "a100-80gb")),
        ("wormhole", ("n150", "n300")),
        ("8xH100", ("'8xH100'", "--hardware h100-80gb", "--mesh 1x8")),
        ("8 x h100", ("h100-80gb", "1x8")),
        ("4x24GB", ("'4x24GB'", "--hardware 24gb", "1x4")),
        ("v5p-8", ("tpu-v5p", "1x4")),  # its slices are named by cores, two a chip
        ("tpu-v5e-8", ("tpu-v5e", "1x8")),
        ("mi300", ("'mi300'", "mi300x")),
        ("24", ("'24'", "24GB")),
        ("1GB/s", ("'1GB/s'", "24GB")),
        ("24B", ("'24B'", "24GB")),
        ("0GB", ("'0GB'", "24GB")),
        ("99999999TB", ("'99999999TB'", "24GB")),
        ("no-such.yaml", ("no-such.yaml",)),
        ("", ("''", "tpu-v5e")),
    ],
)
def test_hardware_that_is_not_one_device_is_refused_with_what_to_write(
    given: str, parts: tuple[str, ...]
):
    with pytest.raises(UsageError) as caught:
        find_hardware(given)
    check_raised(caught.value, 2, *parts)


@pytest.mark.parametrize(
    ("given", "size"),
    [("24GB", 24 * 10**9), ("24gib", 24 * 2**30), ("1.5 TB", 15 * 10**11), ("24g", 24 * 10**9)],
)
def test_a_size_is_a_device(given: str, size: int):
    found = find_hardware(given)
    assert (found.memory_bytes, found.sizing_only) == (size, False)


def test_a_file_describes_a_device_with_its_speeds(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("\ufeffmemory: 24GB\nflops: 120e12\nmemory_bytes_per_s: 6.0e+11\n", "utf-8")
    found = find_hardware(str(file))
    assert (found.name, found.memory_bytes) == ("mine", 24 * 10**9)
    assert (found.flops, found.memory_bytes_per_s, found.link_bytes_per_s) == (12e13, 6e11, None)
    file.with_suffix(".json").write_text('{"name": "x", "memory_bytes": 24000000000}')
    assert find_hardware(str(file.with_suffix(".json"))).name == "x"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: mine\n", ("memory: 24GB",)),
        ("- 24GB\n", ("memory: 24GB",)),
        ("memory: 24\n", ("memory 24", "24GB")),
        ("memory: a lot\n", ("memory is 'a lot'", "24GB")),
        ("memory: 24GB\nmemory_bytes: 1\n", ("memory_bytes",)),
        ("memory: 24GB\nhbm: 3\n", ("'hbm'", "memory_bytes_per_s")),
        ("memory: 24GB\nflops: fast\n", ("flops is 'fast'",)),
        ("memory: 24GB\nflops: -1\n", ("flops is -1",)),
        ("memory: [24GB\n", ("cannot be read",)),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_key(
    tmp_path: Path, text: str, parts: tuple[str, ...]
):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        find_hardware(str(file))
    check_raised(caught.value, 2, "mine.yaml", *parts)


def test_what_no_backend_runs_on_is_for_sizing_only():
    runs = {name for name, each in HARDWARE.items() if not each.sizing_only}
    assert {"tpu-v7x", "tpu-v5e", "n150", "p150"} <= runs
    assert runs.isdisjoint({"h100-80gb", "trn2", "mi300x", "gaudi3", "rtx-4090"})
    assert HARDWARE["tpu-v7x"].memory_bytes == 96 * 10**9  # each chip is two devices
    assert HARDWARE["trn2"].memory_bytes == 24 * 2**30


# -- what fits, and what would

RUNS = {
    "no mesh": "llama-3.1-70b --hardware h100",
    "no mesh, as JSON": "llama-3.1-70b --hardware h100 --json",
    "fits": "llama-3.1-70b --hardware h100 --mesh 1x8 --json",
    "a size": "llama-3.1-8b --hardware 24GB --dtype float32 --batch 8 --json",
    "a size, for people": "llama-3.1-8b --hardware 24GB --dtype float32 --batch 8",
    "training": "llama-3.1-8b --hardware h100 --train --seq 2048 --batch 8 --mesh 2x1 --json",
    "fsdp": "llama-3.1-8b --hardware 24GB --train --fsdp --batch 16 --json",
    "too large for all": "llama-3.1-405b --hardware 1GB --json",
    "without hardware": "llama-3.1-8b --json",
}


@pytest.fixture(scope="module")
def runs() -> dict[str, Done]:
    found = forks.commands(*(["plan", *each.split()] for each in RUNS.values()))
    return dict(zip(RUNS, found, strict=True))


def hardware(run: Done) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.out)["hardware"]
    return found


def test_without_a_mesh_the_smallest_one_that_fits_is_named(runs: dict[str, Done]):
    run = runs["no mesh"]
    assert run.code == 4 and says(run.err, "mesh 1x1", "h100-80gb", "80 GB", "is 1x4")
    assert "is 1x4" in run.out and "sizing only" in run.out
    found = hardware(runs["no mesh, as JSON"])
    assert found["smallest_mesh"] == {"data": 1, "model": 4} and found["sizing_only"] is True
    smaller, same = (
        command(["plan", "llama-3.1-70b", "--hardware", "h100", "--mesh", mesh]).code
        for mesh in ("1x2", "1x4")
    )
    assert (smaller, same) == (4, 0)


def test_the_table_of_device_counts_says_which_fit(runs: dict[str, Done]):
    counts = {
        each["devices"]: each["fits"] for each in json.loads(runs["fits"].out)["device_counts"]
    }
    assert counts == {1: False, 2: False, **dict.fromkeys((4, 8, 16, 32, 64), True)}
    lines = [line.split() for line in runs["no mesh"].out.splitlines()]
    assert [line[-1] for line in lines if line[1:2] == ["divide"]] == ["no", "no", "yes", "yes"]
    without = json.loads(runs["without hardware"].out)["device_counts"]
    assert {each["fits"] for each in without} == {None}


def test_where_nothing_fits_on_a_mesh_every_change_says_what_it_brings(runs: dict[str, Done]):
    document = json.loads(runs["a size"].out)
    found = {each["options"]: each for each in document["hardware"]["alternatives"]}
    assert any("int8" in options for options in found)
    needed = document["hardware"]["needed_bytes_per_device"]
    for each in found.values():
        assert each["needed_bytes_per_device"] + each["saved_bytes_per_device"] == needed
        assert each["saved_bytes_per_device"] > 0
    (several,) = (options for options, each in found.items() if each["fits"])
    assert several.startswith("--dtype bfloat16 --batch 1 --max-model-len ")
    assert several in runs["a size"].err and several in runs["a size, for people"].out
    # What it names is what the command then says.
    asked = RUNS["a size"].replace(" --dtype float32 --batch 8", "").split()
    again = command(["plan", *asked, *several.split()])
    assert again.code == 0
    told = hardware(again)["needed_bytes_per_device"]
    assert told == found[several]["needed_bytes_per_device"]


def test_a_training_step_that_does_not_fit_has_its_own_changes(runs: dict[str, Done]):
    document = json.loads(runs["training"].out)
    found = {each["options"]: each for each in document["hardware"]["alternatives"]}
    single = ("--remat full", "--batch 2 --grad-accum 4", "--fsdp", "--lora.rank 8")
    assert {*single, "--optimizer sgd"} <= found.keys()
    assert not any("int8" in options for options in found)
    cases = [
        [
            "plan",
            *RUNS["training"].replace(" --batch 8", "").split(),
            "--batch",
            "8",
            *option.split(),
        ]
        for option in single
    ]
    for option, run in zip(single, forks.commands(*cases), strict=True):
        told = hardware(run)["needed_bytes_per_device"]
        assert told == found[option]["needed_bytes_per_device"], option


def test_the_smallest_mesh_may_be_one_along_data(runs: dict[str, Done]):
    mesh = hardware(runs["fsdp"])["smallest_mesh"]
    assert mesh["data"] > 1 and 16 % mesh["data"] == 0
    again = [*RUNS["fsdp"].split(), "--mesh", f"{mesh['data']}x{mesh['model']}"]
    assert command(["plan", *again]).code == 0


def test_where_no_mesh_fits_that_is_said(runs: dict[str, Done]):
    run = runs["too large for all"]
    assert run.code == 4 and hardware(run)["smallest_mesh"] is None
    assert says(run.err, "405b", "1GB", "64 devices")


def test_an_unknown_hardware_ends_with_2():
    check_refusal(command(["plan", "smollm2", "--hardware", "abacus"]), 2, "'abacus'", "24GB")


# -- a model's name that is none


@pytest.fixture(scope="module")
def folders(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as people have them: `runs/model` is a model, among other things."""
    root = tmp_path_factory.mktemp("names")
    shutil.copytree(models().folder, root / "runs" / "model")
    (root / "runs" / "model" / "onnx").mkdir()
    cached = root / "models--org--tiny" / "snapshots" / "0123abcd"
    cached.mkdir(parents=True)
    shutil.copy(root / "runs" / "model" / "config.json", cached)
    (root / "quantized").mkdir()
    (root / "quantized" / "tiny.gguf").touch()
    (root / "empty").mkdir()
    return root


NAMES = [
    ("a folder too high", "runs", "'runs/model'"),
    ("two folders too high", ".", "'runs/model'"),
    ("the hub's cache", "models--org--tiny", "snapshots/0123abcd'"),
    ("a folder too low", "runs/model/onnx", "'runs/model'"),
    ("the weights", "runs/model/model.safetensors", "'runs/model'"),
    ("a folder of GGUF files", "quantized", "'quantized/tiny.gguf'"),
    ("a typo in a path", "./runs/modle", "'runs/model'"),
    ("a typo in a path like a hub id", "runs/modle", "'runs/model'"),
    ("a shipped name", "smollm", "smollm2"),
    ("a page of the hub", "https://huggingface.co/org/name/tree/main", "hub id org/name"),
    ("an address of a hub", "hf://org/name", "hub id org/name"),
    ("a quantization", "org/name:Q4_K_M", "hub id org/name"),
    ("a revision", "org/name@main", "hub id org/name"),
    ("a slash too many", "org/name/", "hub id org/name"),
    ("a file of a hub id", "org/name/tiny-q4.gguf", "hub id org/name"),
    ("a gated hub id", "meta-llama/Llama-3.1-70B-Instruct", "llama-3.1-70b"),
    ("a copy of it", "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "llama-3.1-8b"),
]


@pytest.mark.parametrize("command_name", ["plan", "verify"])
def test_a_name_that_is_near_a_model_is_answered_with_it(folders: Path, command_name: str):
    cases = [[command_name, name, "--json"] for _, name, _ in NAMES]
    for (what, name, near), run in zip(NAMES, forks.commands(*cases, cwd=folders), strict=True):
        assert (run.code, near in run.err) == (3, True), (what, run.err)
        assert says(run.err), what
        assert name == "." or name in run.err


def test_a_name_that_only_plan_knows_is_answered_with_the_weights_it_stands_for():
    with pytest.raises(CheckpointError) as caught:
        find("llama-3.1-8b")
    check_raised(caught.value, 3, "'llama-3.1-8b'", "meta-llama/Llama-3.1-8B", "plan")
    assert WEIGHTS.keys() == CONFIGS.keys()
    assert all(known_names(weights) == [name] for name, weights in WEIGHTS.items())


@pytest.mark.parametrize("hub_id", ["mistralai/Mistral-7B-Instruct-v0.3", "org/llama-3.1-80b"])
def test_another_model_of_the_family_is_not_taken_for_a_shipped_one(hub_id: str):
    assert known_names(hub_id) == []


ANSWERS = {
    "gone": ("404 RepoNotFound", ("no model",)),
    "private": ("401 RepoNotFound", ("no model", "private", "HF_TOKEN")),
    "gated": ("403 GatedRepo", ("gated", "HF_TOKEN")),
    "busy": ("429 -", ("429", "later")),
    "broken": ("503 -", ("503", "later")),
    "token": ("401 -", ("HF_TOKEN",)),
}
HUB = """
import json, sys, time
from parallama.errors import CheckpointError
from parallama.files.config_json import read_config
from parallama.files.find import find
said = {}
for name in json.loads(sys.argv[1]):
    for ask in (read_config, find):
        began = time.monotonic()
        try:
            ask(name)
        except CheckpointError as error:
            said[f"{name} {ask.__name__}"] = [str(error), time.monotonic() - began]
print(json.dumps(said))
"""


def ask_hub(names: list[str], home: Path, endpoint: str, **more: str) -> dict[str, Any]:
    """What the two ways to a model say of each, and how long it took, in a process.

    The hub's client reads the environment when it is imported.
    """
    done = subprocess.run(
        [sys.executable, "-c", HUB, json.dumps(names)],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment()
        | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
        | more,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert len(found) == 2 * len(names)
    return found


def test_what_the_hub_answers_is_told_apart(tmp_path: Path):
    for name, (refusal, _) in ANSWERS.items():
        (tmp_path / "org" / name).mkdir(parents=True)
        (tmp_path / "org" / name / fake_hub.REFUSAL).write_text(refusal)
    with fake_hub.serve(tmp_path) as hub:
        names = [f"org/{name}" for name in (*ANSWERS, "nowhere")]
        found = ask_hub(names, tmp_path / "home", hub.url)
    for asked, (message, seconds) in found.items():
        name = asked.split()[0]
        _, parts = ANSWERS.get(name.removeprefix("org/"), ANSWERS["gone"])
        assert says(message, repr(name), *parts), (asked, message)
        assert seconds < 10


def test_a_hub_out_of_reach_is_said_at_once_and_not_taken_for_a_wrong_name(tmp_path: Path):
    found = ask_hub(["org/tiny"], tmp_path, "http://127.0.0.1:9")
    for message, seconds in found.values():
        assert says(message, "'org/tiny'", "reached", "network"), message
        assert seconds < 10  # the client alone asks six times in 24 s, with a line for each
    found = ask_hub(["org/tiny"], tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    for message, _ in found.values():
        assert says(message, "'org/tiny'", "HF_HUB_OFFLINE"), message


def test_a_cache_that_cannot_be_used_is_not_taken_for_a_network(tmp_path: Path):
    (tmp_path / "file").touch()
    found = ask_hub(["org/tiny"], tmp_path / "file", "http://127.0.0.1:9")
    for message, _ in found.values():
        assert says(message, "cache", "HF_HOME") and "network" not in message, message
