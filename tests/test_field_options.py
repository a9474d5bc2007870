"""A command line as users of other programs type it, and errors for programs that read `--json`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import forks
import pytest
import typer
from forks import Done, command
from messages import check_raised, check_refusal, says
from reference import TinyModels

from parallama import errors
from parallama.cli import app
from parallama.cli.chat_commands import command_of
from parallama.cli.other_words import _ANSWERS, _COMMANDS, _SAME
from parallama.engine.devices.discovery import missing
from parallama.errors import UsageError
from parallama.files.export import resolve
from parallama.files.find import find
from parallama.model.known_configs import loaded_dtype
from parallama.plan.mesh_shape import MeshShape

GROUP: Any = typer.main.get_command(app)
COMMANDS: Mapping[str, Any] = GROUP.commands
OPTIONS = {
    name: {opt for each in command.params for opt in (*each.opts, *each.secondary_opts)}
    for name, command in COMMANDS.items()
}
WITH_MODEL = [name for name in COMMANDS if name not in ("doctor", "report", "train")]


def together(*cases: str, cwd: Path | None = None) -> list[Done]:
    return forks.commands(*(case.split() for case in cases), cwd=cwd)


@pytest.fixture(scope="module")
def folder(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` is a model, `cut` one with damaged weights."""
    root = tmp_path_factory.mktemp("options")
    for name in ("tiny", "cut"):
        shutil.copytree(models().folder, root / name)
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    return root


# -- errors as JSON

WRONG: dict[str, tuple[int, str]] = {
    "generate --json": (2, "UsageError"),  # MODEL is missing
    "generate tiny --json": (2, "UsageError"),  # no prompt
    "generate nowhere -p x --json": (3, "CheckpointError"),
    "generate tiny -p x --json --temp 1": (2, "UsageError"),
    "generate tiny -p x --json --max-new-tokens x": (2, "UsageError"),
    "generate tiny -p x --json --max-new-tokens 0": (2, "UsageError"),
    "generate tiny -p x --json --stop": (2, "UsageError"),
    "generate tiny more -p x --json": (2, "UsageError"),
    "generate tiny -p x --json --mesh 3x3 --devices 8": (4, "FitError"),
    "chat nowhere --json": (2, "UsageError"),  # which has no --json
    "audit tiny --phase x --json": (2, "UsageError"),
    "bench tiny --load --steps 3 --json": (2, "UsageError"),
    "doctor --backend abacus --limit 0.1 --json": (2, "UsageError"),
    "eval tiny --json": (2, "UsageError"),  # --tasks is missing
    "export tiny tiny --json": (2, "UsageError"),  # written over nothing
    "export cut new --json": (3, "CheckpointError"),
    "inspect tiny --device 1 --json": (2, "UsageError"),
    "plan tiny --batch 0 --json": (2, "UsageError"),
    "plan tiny --plan nowhere.yaml --json": (2, "PlanError"),
    "report nowhere --json": (2, "UsageError"),
    "train --json": (2, "UsageError"),
    "train --json --model tiny --data nowhere.jsonl --out run --steps 1": (2, "UsageError"),
    "validate tiny --decode -1 --json": (2, "UsageError"),
    "verify nowhere --json --what": (2, "UsageError"),
    "meditate --json": (2, "UsageError"),
    "--json": (2, "UsageError"),
}


def test_with_json_every_error_is_a_document_and_people_read_the_same(folder: Path):
    backend = "generate tiny -p x --json --backend abacus"
    cases = {**WRONG, backend: (5, "BackendError")}
    runs = [*together(*WRONG, cwd=folder), *together(backend, cwd=folder)]
    for (case, (code, kind)), run in zip(cases.items(), runs, strict=True):
        assert run.code == code, (case, run.err)
        assert run.out.count("\n") == 1, (case, run.out)
        document = json.loads(run.out)
        assert document.keys() == {"error"}
        error = document["error"]
        assert (error["type"], error["exit_code"]) == (kind, code), case
        assert run.err == f"parallama: {error['message']}\n", case
        assert says(error["message"]) and issubclass(getattr(errors, kind), errors.ParallamaError)


def test_without_json_an_error_leaves_standard_output_empty(folder: Path):
    check_refusal(command(["plan", "tiny", "--batch", "0"], cwd=folder), 2, "--batch is 0")


def test_a_command_that_has_printed_its_document_prints_no_second_one(folder: Path):
    too_large, unsound = together(
        "plan llama-3.1-70b --hardware n150 --json", "verify cut --json", cwd=folder
    )
    assert too_large.code == 4 and json.loads(too_large.out)["fits"] is False
    assert unsound.code == 3 and json.loads(unsound.out)["passed"] is False


def test_a_fault_of_ours_is_a_document_too():
    text = """
import sys
from parallama import __main__
from parallama.files import config_json

del config_json.read_config
sys.exit(__main__.run(["plan", "smollm2", "--json"]))
"""
    done = forks.script(text)
    assert done.code == 1 and "fault of parallama" in done.err
    assert json.loads(done.out)["error"]["type"] == "AttributeError"


# -- options by meaning

MEANT = [
    ("generate tiny --temp 1", "--temperature"),
    ("generate tiny -t 1", "--temperature"),
    ("generate tiny --tp 2", "--tensor-parallel-size"),
    ("generate tiny --max-tokens 3", "--max-new-tokens"),
    ("generate tiny --max_tokens=3", "--max-new-tokens"),
    ("generate tiny -n 3", "--max-new-tokens"),
    ("generate tiny --ctx-size 64", "--max-model-len"),
    ("generate tiny --repeat-penalty 1.1", "--repetition-penalty"),
    ("generate tiny --device tpu", "--backend"),
    ("generate tiny --torch-dtype bfloat16", "--dtype"),
    ("generate tiny --bf16", "--dtype"),
    ("generate -m tiny", "--model"),
    ("generate tiny --system-prompt x", "--system"),
    ("generate tiny --stop-sequence x", "--stop"),
    ("generate tiny --trust-remote-code", "no code"),
    ("generate tiny --quantization awq", "bfloat16"),
    ("generate tiny --gpu-memory-utilization 0.9", "--max-model-len"),
    ("generate tiny --pipeline-parallel-size 2", "--mesh"),
    ("generate tiny --hf-token x", "HF_TOKEN"),
    ("generate tiny --cache-dir x", "HF_HOME"),
    ("generate tiny --revision x", "--local-dir"),
    ("generate tiny --n-gpu-layers 99", "devices"),
    ("chat tiny --prompt x", "generate"),
    ("plan tiny --batch-size 2", "--batch"),
    ("plan tiny --gpu h100", "--hardware"),
    ("plan tiny --hardware h100 --chips 8", "--tensor-parallel-size"),
    ("plan tiny --train --gradient-checkpointing", "--remat"),
    ("plan tiny --train --lora-r 8", "--lora.rank"),
    ("plan tiny --train --gradient-accumulation-steps 8", "--grad-accum"),
    ("plan tiny --learning-rate 1e-5", "train"),
    ("eval tiny --tasks x --batch 3", "--batch-size"),
    ("eval tiny --task x", "--tasks"),
    ("export tiny --output new", "argument"),
    ("generate tiny --quite", "--quiet"),  # by spelling
    ("plan tiny --hardwear h100", "--hardware"),
    ("run tiny", "generate"),
    ("convert tiny", "export"),
    ("finetune tiny", "train"),
    ("lm_eval tiny", "eval"),
    ("genrate tiny", "generate"),
    ("smollm2 -p x", "parallama generate smollm2 -p x"),
    ("api-server tiny", "serve"),
]


def test_an_option_or_command_of_another_program_is_answered_with_ours(folder: Path):
    runs = together(*(case for case, _ in MEANT), cwd=folder)
    for (_, meant), run in zip(MEANT, runs, strict=True):
        check_refusal(run, 2, meant)


def test_the_table_of_others_words_names_options_and_commands_that_there_are():
    ours = set[str]().union(*OPTIONS.values(), {opt for each in GROUP.params for opt in each.opts})
    later = {"--n", "--prompts-file"}
    assert _SAME.keys() - later <= ours, _SAME.keys() - ours
    assert _COMMANDS.keys() <= COMMANDS.keys()
    assert not set(" ".join(_COMMANDS.values()).split()) & COMMANDS.keys()
    for words in (*_SAME.values(), *_ANSWERS):
        assert len(set(words.split())) == len(words.split()), words


@pytest.mark.parametrize("name", WITH_MODEL)
def test_the_model_stands_as_an_argument_or_behind_its_option(name: str, folder: Path):
    assert "--model" in OPTIONS[name]
    more = {"eval": "--tasks x", "export": "new", "generate": "-p x", "bench": "--load"}
    options = more.get(name, "")
    behind, before, twice = together(
        f"{name} --model nowhere {options}",
        f"{name} {options} --model=nowhere",
        f"{name} tiny {options} --model nowhere",
        cwd=folder,
    )
    check_refusal(twice, 2, "'tiny'", "'nowhere'", "--model")
    for run in (behind, before):
        assert run.code in (2, 3), run.err
        assert "'nowhere'" in run.out + run.err or name == "eval", "eval looks for tasks first"


def test_plan_is_the_same_by_argument_and_option_and_with_underscores(folder: Path):
    argument, option, underscores = together(
        "plan tiny --json --max-model-len 32",
        "plan --json --model tiny --max-model-len 32",
        "plan --model=tiny --json --max_model_len 32",
        cwd=folder,
    )
    assert argument.out == option.out == underscores.out and argument.code == 0


# -- values by meaning


def test_a_number_written_short_is_answered_with_the_whole_one(folder: Path):
    cases = {"--max-model-len 32k": "32768 or 32000", "--batch 1e3": "1000", "--seq 1,000": "1000"}
    runs = together(*(f"plan tiny {case}" for case in cases), cwd=folder)
    for (case, number), run in zip(cases.items(), runs, strict=True):
        check_refusal(run, 2, *case.split(), number)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("bf16", "did you mean bfloat16?"),
        ("BFloat16", "did you mean bfloat16?"),
        ("torch.bfloat16", "did you mean bfloat16?"),
        ("fp32", "did you mean float32?"),
        ("float", "did you mean float32?"),
        ("fp16", "bfloat16"),
        ("half", "bfloat16"),
        ("int8", "quantized"),
        ("fp8_e4m3", "quantized"),
        ("q4_k_m", "quantized"),
    ],
)
def test_a_dtype_by_another_name_is_answered_with_ours(given: str, meant: str):
    with pytest.raises(UsageError) as caught:
        loaded_dtype(given, {})
    check_raised(caught.value, 2, f"dtype {given!r}", meant, "auto, float32")
    with pytest.raises(UsageError) as written:
        resolve(given)  # float16 is what export can write
    meant = "did you mean float16?" if given in ("fp16", "half") else meant
    check_raised(written.value, 2, f"dtype {given!r}", meant)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("tenstorrent", "did you mean tt?"), ("cuda", "no GPUs"), ("gpu", "no GPUs"), ("xla", "tpu")],
)
def test_a_backend_by_another_name_is_answered_with_ours(given: str, meant: str):
    check_raised(missing(given), 5, repr(given), meant)


@pytest.mark.parametrize("given", ["1x8", "1X8", "1×8", "1*8", "1, 8", "tp=8", "dp=1,tp=8", "8"])
def test_a_mesh_is_read_as_people_write_it(given: str):
    assert MeshShape.parse(given) == MeshShape(data=1, model=8)


# -- a chat's own commands


def test_help_in_a_chat_lists_its_commands_and_others_words_are_taken(
    models: TinyModels, tmp_path: Path
):
    model = models(heads=9, kv_heads=3, intermediate=48, vocab=49152).folder
    shutil.copytree(model, tmp_path / "chatty")
    tokenizer = find("smollm2").tokenizer()
    assert tokenizer is not None
    tokenizer.save_pretrained(tmp_path / "chatty")
    said = "/help\n/hepl\n/clear\n/bye\nnever read\n"
    done = command(["chat", "chatty", "--quiet"], stdin=said, cwd=tmp_path, optimize=False)
    assert (done.code, done.out) == (0, ""), done.err
    for part in ("/new", "/help", "/exit", "/hepl is no command"):
        assert part in done.err


@pytest.mark.parametrize("line", ["Hello", "/etc/passwd is what?", "/ is a slash", "a /help", "//"])
def test_what_only_begins_like_a_command_is_a_message(line: str):
    assert command_of(line) is None


def test_a_word_behind_a_slash_that_stands_for_nothing_is_not_sent():
    assert [command_of(f"/{word}") for word in ("quit", "reset", "?")] == ["exit", "new", "help"]
    with pytest.raises(UsageError) as caught:
        command_of("/system")
    check_raised(caught.value, 2, "/system", "/help")
