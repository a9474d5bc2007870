"""The command line where it went wrong once: numbers out of range, readers that leave, noise beside
a JSON document.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reference import TinyModels

from parallama.cli.chat import ANSWER_TOKENS, CHAT_LENGTH
from parallama.files.find import find
from parallama.inference.chat import DEFAULT_ANSWER_TOKENS, DEFAULT_CHAT_LENGTH
from parallama.inference.requests import DEFAULT_NEW_TOKENS

COMMAND = [sys.executable, "-m", "parallama"]
LIMIT_S = 300
READER_GONE = 141
POSITIONS = 64
CONFIG = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": POSITIONS,
}
RUNNER = """
import contextlib, io, json, sys
from parallama.__main__ import run
results = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def environment() -> dict[str, str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PJRT_", "XLA_", "CPU_NUM_", "TF_CPP_"))
    }
    return kept | {"HF_HUB_OFFLINE": "1"}


def parallama(*arguments: str, **how: Any) -> subprocess.CompletedProcess[Any]:
    return subprocess.run(
        [*COMMAND, *arguments],
        timeout=LIMIT_S,
        env=environment(),
        **{"capture_output": True, "text": True, "stdin": subprocess.DEVNULL} | how,
    )


def together(cases: list[list[str]]) -> list[list[Any]]:
    """Command lines one after another in one process: exit code, standard output and
    error of each.
    """
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def weightless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a config and nothing else: to load it is exit code 3."""
    folder = tmp_path_factory.mktemp("weightless")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


@pytest.fixture(scope="module")
def talkative(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("talkative") / "model"
    models(heads=9, kv_heads=3, intermediate=48, vocab=49152).model.save_pretrained(folder)
    tokenizer = find("smollm2").tokenizer()
    assert tokenizer is not None
    tokenizer.save_pretrained(folder)
    return str(folder)


# -- numbers: refused before anything is loaded

GENERATE = ["generate", "{}", "-p", "x"]
CHAT = ["chat", "{}"]
EVAL = ["eval", "{}", "-t", "x"]
SAMPLING = [
    ("--temperature", "-1"),
    ("--temperature", "nan"),
    ("--top-k", "-2"),
    ("--top-p", "0"),
    ("--top-p", "1.5"),
    ("--min-p", "2"),
    ("--repetition-penalty", "0"),
    ("--seed", "-1"),
    ("--seed", str(1 << 64)),
]
OUT_OF_RANGE: list[list[str]] = [
    *([*GENERATE, "--max-new-tokens", number] for number in ("0", "-5")),
    *([*CHAT, "--max-new-tokens", number] for number in ("0", "-5")),
    *([*command, "--max-model-len", "0"] for command in (GENERATE, CHAT, EVAL, ["inspect", "{}"])),
    *([*command, *option] for command in (GENERATE, CHAT) for option in SAMPLING),
    [*EVAL, "--limit", "inf"],
    [*EVAL, "--mesh", "2x1", "--batch-size", "3"],
    ["validate", "{}", "--seed", "-1"],
    ["validate", "{}", "--seed", str(1 << 64)],
    ["audit", "{}", "--batch", "0"],
    ["inspect", "{}", "--batch", "0"],
    ["audit", "{}", "--batch", str(10**30)],
    ["inspect", "{}", "--batch", str(10**30)],
    [*EVAL, "--batch-size", str(10**30)],
    ["doctor", "--limit", "inf"],
    # Over what the model has, by its config.
    [*GENERATE, "--max-new-tokens", str(POSITIONS)],
    [*CHAT, "--max-new-tokens", str(10**30)],
    [*GENERATE, "--max-model-len", "32", "--max-new-tokens", "32"],
    *(
        [*command, "--max-model-len", str(POSITIONS + 1)]
        for command in (GENERATE, CHAT, EVAL, ["inspect", "{}"])
    ),
    ["validate", "{}", "--decode", str(POSITIONS)],
    ["validate", "{}", "--prompt-tokens", str(10**12)],
    ["audit", "{}", "--seq", str(POSITIONS)],
    ["audit", "{}", "--phase", "train", "--seq", str(POSITIONS + 1)],
]  # fmt: skip


@pytest.fixture(scope="module")
def refusals(weightless: str) -> list[list[Any]]:
    return together(
        [[weightless if word == "{}" else word for word in case] for case in OUT_OF_RANGE]
    )


@pytest.mark.parametrize(
    "number", range(len(OUT_OF_RANGE)), ids=[" ".join(case) for case in OUT_OF_RANGE]
)
def test_a_number_out_of_its_range_is_refused_before_anything_is_loaded(
    refusals: list[list[Any]], number: int
) -> None:
    (*_, option, value), (code, out, err) = OUT_OF_RANGE[number], refusals[number]
    assert (code, out) == (2, ""), err
    first = err.splitlines()[0].replace("-", "_")
    assert option.removeprefix("--").replace("-", "_") in first, "the option is named"
    assert value.replace("-", "_") in first, "and its value"
    assert len(err.splitlines()) <= 3 and "fault of parallama" not in err


def test_a_cache_that_memory_cannot_hold_is_exit_code_4(models: TinyModels) -> None:
    folder = models(positions=1 << 20).folder
    done = parallama("inspect", folder, "--batch", "1048576", "--max-model-len", "1048576")
    assert (done.returncode, done.stdout) == (4, ""), done.stderr
    assert "memory" in done.stderr and len(done.stderr.splitlines()) <= 3


def test_every_command_says_its_own_default_of_new_tokens() -> None:
    for command, default in (("generate", DEFAULT_NEW_TOKENS), ("chat", DEFAULT_ANSWER_TOKENS)):
        shown = " ".join(parallama(command, "--help").stdout.replace("│", " ").split())
        assert f"default: ({default})" in shown
    assert (CHAT_LENGTH, ANSWER_TOKENS) == (DEFAULT_CHAT_LENGTH, DEFAULT_ANSWER_TOKENS)


def test_inspects_help_says_what_is_taken_if_nothing_is_given() -> None:
    shown = " ".join(parallama("inspect", "--help").stdout.replace("│", " ").split())
    for default in ("every one", "one on each", "256", "decode"):
        assert f"default: ({default})" in shown


def test_a_prompt_on_standard_input_that_is_no_text_is_refused(weightless: str) -> None:
    done = parallama("generate", weightless, stdin=None, input=b"\xff\xfe", text=False)
    assert done.returncode == 2 and b"standard input" in done.stderr


# -- a reader that has gone

PRINTING = [
    ["--help"],
    ["--version"],
    ["generate", "--help"],
    ["plan", "{}"],
    ["plan", "{}", "--json"],
    ["verify", "{}"],
    ["verify", "{}", "--json"],
    ["train", "--dump-config", "--model", "m", "--data", "d", "--out", "o", "--steps", "1"],
    ["bench", "{new}", "--make", "tiny"],
]


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_command_whose_reader_has_gone_ends_with_141_and_says_nothing(
    weightless: str, tmp_path: Path, arguments: list[str]
) -> None:
    given = [
        {"{}": weightless, "{new}": str(tmp_path / "new")}.get(word, word) for word in arguments
    ]
    done = parallama(*given, stdout=_nobody(), stderr=subprocess.PIPE, capture_output=False)
    assert (done.returncode, done.stderr) == (READER_GONE, "")


def test_a_complaint_whose_reader_has_gone_is_no_other_failure() -> None:
    done = parallama(
        "plan",
        "smollm2",
        "--mesh",
        "0x1",
        stderr=_nobody(),
        stdout=subprocess.PIPE,
        capture_output=False,
    )
    assert (done.returncode, done.stdout) == (READER_GONE, "")


def _nobody() -> int:
    """A pipe that is not read."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def test_a_closed_standard_error_does_not_send_complaints_to_standard_output() -> None:
    shell = f"{subprocess.list2cmdline(COMMAND)} plan smollm2 --mesh 0x1 2>&-"
    done = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert (done.returncode, done.stdout) == (2, "")


# -- one JSON document


def strict(text: str) -> Any:
    """One JSON document, and nothing that only Python takes for one."""

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


TASK = """
task: noisy
dataset_path: json
dataset_kwargs: {data_files: {test: QUIZ}}
test_split: test
output_type: loglikelihood
doc_to_text: "one"
doc_to_target: !function noise.target
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
NOISE = """
import ctypes, os
def target(doc):
    print("printed")
    os.write(1, b"written\\n")
    ctypes.CDLL(None).puts(b"put by C")
    return " two"
"""


def test_json_stands_alone_whatever_else_prints(talkative: str, tmp_path: Path) -> None:
    (tmp_path / "quiz.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "noisy.yaml").write_text(TASK.replace("QUIZ", str(tmp_path / "quiz.jsonl")))
    (tmp_path / "noise.py").write_text(NOISE)
    arguments = ["--tasks", "noisy", "--include-path", str(tmp_path), "--max-model-len", "64"]
    done = parallama("eval", talkative, *arguments, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "noisy" in strict(done.stdout)["results"]
    assert "written" in done.stderr and "put by C" in done.stderr


def test_json_has_null_for_a_number_that_is_not_finite(models: TinyModels, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    tiny = models()
    tiny.model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    asked = ["--prompt-ids", "1,2", "--max-new-tokens", "2", "--allow-nonfinite", "--json"]
    done = parallama("generate", str(folder), *asked)
    assert done.returncode == 0, done.stderr
    (output,) = strict(done.stdout)["outputs"]
    assert output["logprobs"] == [None, None]
    assert all(0 <= token < tiny.vocab for token in output["token_ids"])


def test_the_keys_of_a_training_run_are_json_where_that_is_asked_for() -> None:
    keys = ["--model", "m", "--data", "d.jsonl", "--out", "o", "--steps", "7"]
    done = parallama("train", *keys, "--dump-config", "--json")
    document = strict(done.stdout)
    assert (document["model"], document["steps"], document["mesh"]) == ("m", 7, "1x1")
