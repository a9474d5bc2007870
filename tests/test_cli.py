"""The command line: what it prints where, and what it says and returns when something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Workers
from reference import TinyModels

from parallama.files.find import find

COMMAND = str(Path(sys.executable).with_name("parallama"))
LIMIT_S = 240
STATS = {
    "load_s",
    "load_bytes_read",
    "load_bytes_per_s",
    "load_baseline_rss_bytes",
    "load_peak_rss_bytes",
    "largest_tensor_bytes",
    "compile_s",
    "ttft_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "decode_host_ms_per_step",
    "programs_compiled",
    "programs_after_warmup",
    "param_bytes_per_device",
    "kv_bytes_per_device",
    "peak_rss_bytes",
}

RUNNER = """
import contextlib, io, json, sys
from parallama.__main__ import run
results = []
for case in json.load(sys.stdin):
    out, err, sys.stdin = io.StringIO(), io.StringIO(), io.StringIO(case["stdin"])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(case["arguments"])
    results.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
print(json.dumps(results))
"""
"""Runs command lines one after another in one process, for where the process is not the point."""


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


def environment() -> dict[str, str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PJRT_", "XLA_", "CPU_NUM_", "TF_CPP_"))
    }
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "error::DeprecationWarning:parallama"}


def parallama(*arguments: str, stdin: str = "") -> Run:
    """The real command in a process of its own."""
    done = subprocess.run(
        [COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment(),
    )
    return Run(done.returncode, done.stdout, done.stderr)


def together(cases: list[tuple[list[str], str]]) -> list[Run]:
    """Command lines, each with its standard input, one after another in one process."""
    given = json.dumps([{"arguments": arguments, "stdin": stdin} for arguments, stdin in cases])
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=given,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Run(**result) for result in json.loads(done.stdout)]


@dataclass(frozen=True)
class Folders:
    """Model folders: `chatty` has a tokenizer and a chat template, `plain` no template, `bare` no tokenizer; and many that are broken."""

    root: Path

    def __getitem__(self, name: str) -> str:
        return str(self.root / name)


@pytest.fixture(scope="session")
def folders(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Folders:

    root = tmp_path_factory.mktemp("cli")
    tiny = Path(models(heads=9, kv_heads=3, intermediate=48, vocab=49152).folder)
    tokenizer = find("smollm2").tokenizer()
    assert tokenizer is not None and tokenizer.chat_template
    for name in ("bare", "plain", "chatty"):
        shutil.copytree(tiny, root / name)
    tokenizer.save_pretrained(root / "chatty")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(root / "plain")
    for name in (
        "no-config",
        "bad-config",
        "truncated",
        "pickle-only",
        "missing-tensor",
        "other-type",
    ):
        shutil.copytree(root / "bare", root / name)
    (root / "no-config" / "config.json").unlink()
    (root / "bad-config" / "config.json").write_text('{"model_type": "llama",')
    weights = root / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (root / "pickle-only" / "model.safetensors").rename(root / "pickle-only" / "pytorch_model.bin")
    _without_tensor(
        root / "missing-tensor" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    )
    config = json.loads((root / "other-type" / "config.json").read_text())
    (root / "other-type" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    (root / "binary.txt").write_bytes(bytes(range(256)))
    (root / "empty.txt").write_text("")
    (root / "prompt.txt").write_text("Once upon a time", encoding="utf-8")
    (root / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (root / "no-match.yaml").write_text("model.layers.*.mlp.sideways_proj.weight: colwise\n")
    (root / "no-style.yaml").write_text("model.layers.*.mlp.up_proj.weight: diagonal\n")
    (root / "no.yaml").write_text("a: [b\nc: }")
    (root / "replicate.yaml").write_text("model.embed_tokens.weight: replicate\n")
    return Folders(root)


def _without_tensor(file: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


# -- help and version


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["-h"],
        *(
            [command, "--help"]
            for command in (
                "generate",
                "chat",
                "plan",
                "inspect",
                "audit",
                "validate",
                "verify",
                "doctor",
                "bench",
                "eval",
            )
        ),
    ],
)
def test_help_comes_quickly_and_without_torch(arguments: list[str]) -> None:
    code = f"import sys; from parallama.__main__ import run; sys.exit(run({arguments!r}))"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )
    assert time.perf_counter() - began < 5
    assert done.returncode == 0 and "Usage: " in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "parallama.cli" in imported
    assert not {
        name
        for name in imported
        if name.split(".")[0] in {"torch", "torch_xla", "transformers", "numpy"}
    }


def test_every_option_of_generate_has_a_help_text() -> None:
    done = parallama("generate", "--help")
    assert "default: (the model's)" in " ".join(done.out.replace("│", " ").split())
    for option in (
        "--mesh",
        "--plan",
        "--dtype",
        "--prompt-ids",
        "--chat",
        "--stop",
        "--ignore-eos",
        "--top-p",
        "--seed",
        "--json",
        "--quiet",
    ):
        assert option in done.out


def test_version_names_parallama_and_what_it_stands_on() -> None:
    done = parallama("--version")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("parallama 0.") and "torch_xla 2.9" in done.out
    module = subprocess.run(
        [sys.executable, "-m", "parallama", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )
    assert module.stdout == done.out


# -- generate


@pytest.fixture(scope="session")
def documents(folders: Folders) -> tuple[dict[str, Any], dict[str, Any], Run]:
    """Two JSON documents of the same prompts on 1x3, the second with the embedding replicated; and the first run."""
    arguments = [
        "generate",
        folders["chatty"],
        "--mesh",
        "1x3",
        "--prompt",
        "Once upon a time",
        "--prompt-ids",
        "5,6,7",
        "--max-new-tokens",
        "6",
    ]
    arguments += ["--ignore-eos", "--temperature", "0", "--json"]
    first = parallama(*arguments)
    second = parallama(*arguments, "--plan", folders["replicate.yaml"], "--quiet")
    assert first.code == second.code == 0, first.err + second.err
    assert second.err == "", "with --quiet nothing is on standard error"
    return json.loads(first.out), json.loads(second.out), first


def test_json_is_one_document_with_the_documented_keys_and_nothing_else(
    documents: tuple[dict[str, Any], dict[str, Any], Run],
) -> None:
    document, _, run = documents
    assert run.out.endswith("}\n") and run.out.count("\n") == 1
    assert set(document) == {"model", "backend", "mesh", "dtype", "outputs", "ignored", "stats"}
    assert (
        document["backend"] == "cpu"
        and document["mesh"] == {"data": 1, "model": 3}
        and document["dtype"] == "float32"
    )
    assert document["model"].endswith("chatty")
    assert [output["prompt"] for output in document["outputs"]] == ["Once upon a time", [5, 6, 7]]
    for output in document["outputs"]:
        assert set(output) == {"prompt", "text", "token_ids", "logprobs", "finish_reason"}
        assert len(output["token_ids"]) == len(output["logprobs"]) == 6
        assert all(logprob <= 0 for logprob in output["logprobs"])
        assert output["finish_reason"] == "length"
    stats = document["stats"]
    assert set(stats) == STATS
    assert all(
        stats[name] > 0 for name in STATS if not name.endswith(("_per_device", "_after_warmup"))
    )
    assert stats["programs_after_warmup"] == 0
    assert len(stats["param_bytes_per_device"]) == len(stats["kv_bytes_per_device"]) == 3
    assert stats["peak_rss_bytes"] > 100e6


def test_a_run_that_is_not_quiet_says_its_figures_on_standard_error(
    documents: tuple[dict[str, Any], dict[str, Any], Run],
) -> None:
    err = documents[2].err
    assert err.count("\n") == 1 and "1x3 cpu" in err and "0 after warm-up" in err


def test_a_plan_file_moves_tensors_and_keeps_the_tokens(
    folders: Folders, documents: tuple[dict[str, Any], dict[str, Any], Run]
) -> None:
    document, replicated, _ = documents
    assert [output["token_ids"] for output in document["outputs"]] == [
        output["token_ids"] for output in replicated["outputs"]
    ]
    config = json.loads((folders.root / "chatty" / "config.json").read_text())
    before, after = (item["stats"]["param_bytes_per_device"] for item in (document, replicated))
    split = config["vocab_size"] // 3 * config["hidden_size"] * 4
    assert after == [size + 2 * split for size in before]


@pytest.fixture(scope="session")
def texts(folders: Folders) -> dict[str, Run]:
    """Ways to give prompts, on one device."""
    model, few = folders["chatty"], ["--max-new-tokens", "5", "--temperature", "0", "--ignore-eos"]
    named: dict[str, tuple[list[str], str]] = {
        "one": (["generate", model, "-p", "Once upon a time", *few], ""),
        "file": (["generate", model, "--prompt-file", folders["prompt.txt"], *few], ""),
        "stdin": (["generate", model, *few], "Once upon a time"),
        "several": (["generate", model, "-p", "Once upon a time", "--prompt", "The end", *few], ""),
        "ids": (["generate", model, "--prompt-ids", "1, 2,3", *few, "--json"], ""),
        "bare ids": (["generate", folders["bare"], "--prompt-ids", "1,2,3", *few, "--json"], ""),
        "chat": (
            ["generate", model, "--chat", "--system", "Be brief.", "-p", "Hello", *few, "--json"],
            "",
        ),
        "quiet": (["generate", model, "-p", "Once upon a time", *few, "--quiet"], ""),
        "tp": (
            [
                "generate",
                model,
                "-tp",
                "1",
                "--mesh",
                "data=1,model=1",
                "--devices",
                "1",
                "-p",
                "Once upon a time",
                *few,
            ],
            "",
        ),
        "seed 1": (
            [
                "generate",
                model,
                "-p",
                "Once upon a time",
                *few[:2],
                "--temperature",
                "1",
                "--top-k",
                "50",
                "--seed",
                "1",
                "--json",
            ],
            "",
        ),
        "seed 2": (
            [
                "generate",
                model,
                "-p",
                "Once upon a time",
                *few[:2],
                "--temperature",
                "1",
                "--top-k",
                "50",
                "--seed",
                "2",
                "--json",
            ],
            "",
        ),
    }
    results = dict(zip(named, together(list(named.values())), strict=True))
    assert {name: (run.code, run.err) for name, run in results.items() if run.code} == {}
    return results


def test_a_prompt_is_the_same_from_an_option_a_file_and_standard_input(
    texts: dict[str, Run],
) -> None:
    assert (
        texts["one"].out
        == texts["file"].out
        == texts["stdin"].out
        == texts["quiet"].out
        == texts["tp"].out
    )
    assert texts["one"].out.endswith("\n") and len(texts["one"].out) > 5


def test_several_prompts_are_told_apart(texts: dict[str, Run]) -> None:
    out = texts["several"].out
    assert out.startswith("--- 1 of 2\n" + texts["one"].out) and "--- 2 of 2\n" in out


def test_prompt_ids_work_with_and_without_a_tokenizer(texts: dict[str, Run]) -> None:
    with_text, without = (json.loads(texts[name].out)["outputs"][0] for name in ("ids", "bare ids"))
    assert with_text["prompt"] == without["prompt"] == [1, 2, 3]
    assert with_text["token_ids"] == without["token_ids"]
    assert with_text["text"] and without["text"] == ""


def test_chat_puts_the_prompt_and_the_system_message_into_the_template(
    texts: dict[str, Run],
) -> None:

    prompt = json.loads(texts["chat"].out)["outputs"][0]["prompt"]
    tokenizer = find("smollm2").tokenizer()
    assert tokenizer is not None
    assert (
        tokenizer.decode(prompt)
        == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_quiet_leaves_standard_error_empty(texts: dict[str, Run]) -> None:
    assert texts["quiet"].err == "" and texts["one"].err.startswith("[1x1 cpu; load ")


def test_another_seed_gives_another_text(texts: dict[str, Run]) -> None:
    first, second = (
        json.loads(texts[name].out)["outputs"][0]["token_ids"] for name in ("seed 1", "seed 2")
    )
    assert first != second


# -- chat


def test_chat_answers_line_by_line_and_starts_over_with_new(folders: Folders) -> None:
    arguments = [
        "chat",
        folders["chatty"],
        "--max-new-tokens",
        "4",
        "--temperature",
        "0",
        "--max-model-len",
        "400",
    ]
    done = parallama(
        *arguments, stdin="Hello there\n\nAnd again\n/new\nHello there\n/exit\nnever read\n"
    )
    assert done.code == 0, done.err
    prompts = done.err.strip().splitlines()
    assert (
        len(prompts) == 1
        and prompts[0].startswith("[1x1; ")
        and prompts[0].endswith("0 after warm-up]")
    )
    assert "Traceback" not in done.err
    first = parallama(*arguments, "--quiet", stdin="Hello there\n")
    assert (first.code, first.err) == (0, "")
    assert (
        done.out.startswith(first.out)
        and done.out.endswith(first.out)
        and len(done.out) > 2 * len(first.out)
    ), "/new forgets"


def test_a_message_that_does_not_fit_is_refused_and_the_chat_goes_on(folders: Folders) -> None:
    arguments = [
        "chat",
        folders["chatty"],
        "--max-new-tokens",
        "4",
        "--temperature",
        "0",
        "--max-model-len",
        "60",
        "--quiet",
    ]
    done = parallama(*arguments, stdin="word " * 100 + "\nHello\n")
    assert done.code == 0, done.err
    assert (
        done.err.startswith("parallama: the conversation has ") and len(done.err.splitlines()) <= 3
    )
    assert len(done.out) > 1, "the second message is answered"


# -- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_stream_with_its_exit_code_and_no_traceback(
    folders: Folders, number: signal.Signals, code: int
) -> None:
    arguments = [
        COMMAND,
        "generate",
        folders["chatty"],
        "-p",
        "Once",
        "--max-new-tokens",
        "2000",
        "--ignore-eos",
        "--temperature",
        "0",
    ]

    def heed() -> (
        None
    ):  # tests that a shell runs in its background ignore SIGINT, and would hand that on
        signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        preexec_fn=heed,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1), process.stderr.read()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert b"Traceback" not in err


def test_a_reader_that_leaves_is_no_fault(folders: Folders) -> None:
    arguments = [
        COMMAND,
        "generate",
        folders["chatty"],
        "-p",
        "Once",
        "--max-new-tokens",
        "500",
        "--ignore-eos",
        "--temperature",
        "0",
    ]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1), process.stderr.read()
        process.stdout.close()
        err = process.stderr.read()
        process.wait(60)
    assert process.returncode == 141
    assert b"Traceback" not in err and b"Exception" not in err


# -- bad input: (name, arguments, exit code, what the message names); "{...}" is a folder of `folders`, GENERATE runs on one with a tokenizer

GENERATE = ["generate", "{plain}", "-p", "Once"]
ALONE: list[tuple[str, list[str], int, str]] = [
    ("unknown model", ["generate", "no-such-model", "-p", "x"], 3, "no-such-model"),
    (
        "mesh larger than the devices",
        ["generate", "smollm2", "--mesh", "3x3", "--devices", "8", "-p", "x"],
        4,
        "3x3",
    ),
    ("mesh banana", ["generate", "smollm2", "--mesh", "banana", "-p", "x"], 2, "banana"),
    ("no prompt", ["generate", "{plain}"], 2, "prompt"),
    ("unknown backend", [*GENERATE, "--backend", "abacus"], 5, "abacus"),
    ("no tpu", [*GENERATE, "--backend", "tpu"], 5, "tpu"),
    ("backend a text file", [*GENERATE, "--backend", "{prompt.txt}"], 5, "prompt.txt"),
    ("unknown option", [*GENERATE, "--frobnicate"], 2, "--frobnicate"),
    ("truncated safetensors", ["generate", "{truncated}", "-p", "x"], 3, "model.safetensors"),
]
TOGETHER: list[tuple[str, list[str], int, str]] = [
    ("mesh of no devices", [*GENERATE, "--mesh", "0x8"], 2, "0"),
    ("mesh with an unknown axis", [*GENERATE, "--mesh", "rows=8"], 2, "rows"),
    ("mesh and -tp disagree", [*GENERATE, "--mesh", "1x2", "-tp", "4"], 2, "4"),
    ("-tp 0", [*GENERATE, "-tp", "0"], 2, "0"),
    ("devices and mesh disagree", [*GENERATE, "--mesh", "1x1", "--devices", "2"], 4, "2"),
    ("backend option without a value", [*GENERATE, "--backend-option", "count"], 2, "'count'"),
    ("backend option on the cpu", [*GENERATE, "--backend-option", "count=8"], 2, "'count'"),
    ("empty prompt", ["generate", "{plain}", "-p", ""], 2, "prompt"),
    ("one of two prompts empty", [*GENERATE, "-p", ""], 2, "prompt"),
    (
        "prompt file missing",
        ["generate", "{plain}", "--prompt-file", "{nowhere.txt}"],
        2,
        "nowhere.txt",
    ),
    (
        "prompt file binary",
        ["generate", "{plain}", "--prompt-file", "{binary.txt}"],
        2,
        "binary.txt",
    ),
    ("prompt file empty", ["generate", "{plain}", "--prompt-file", "{empty.txt}"], 2, "prompt"),
    ("prompt file a folder", ["generate", "{plain}", "--prompt-file", "{plain}"], 2, "plain"),
    (
        "prompt over the limit",
        ["generate", "{plain}", "--prompt-ids", ",".join(["5"] * 2049)],
        2,
        "2049",
    ),
    ("no new tokens", [*GENERATE, "--max-new-tokens", "0"], 2, "0"),
    ("new tokens over the limit", [*GENERATE, "--max-new-tokens", "5000"], 2, "5000"),
    ("new tokens no number", [*GENERATE, "--max-new-tokens", "many"], 2, "many"),
    ("temperature negative", [*GENERATE, "--temperature", "-1"], 2, "-1"),
    ("temperature nan", [*GENERATE, "--temperature", "nan"], 2, "nan"),
    ("temperature infinite", [*GENERATE, "--temperature", "inf"], 2, "inf"),
    ("temperature no number", [*GENERATE, "--temperature", "warm"], 2, "warm"),
    ("top-p 0", [*GENERATE, "--top-p", "0"], 2, "top_p is 0"),
    ("top-p above 1", [*GENERATE, "--top-p", "1.5"], 2, "1.5"),
    ("top-k negative", [*GENERATE, "--top-k", "-1"], 2, "-1"),
    ("min-p above 1", [*GENERATE, "--min-p", "2"], 2, "2"),
    (
        "repetition penalty 0",
        [*GENERATE, "--repetition-penalty", "0"],
        2,
        "repetition_penalty is 0",
    ),
    ("seed negative", [*GENERATE, "--seed", "-1"], 2, "-1"),
    ("seed too large", [*GENERATE, "--seed", str(1 << 64)], 2, str(1 << 64)),
    ("ids no numbers", ["generate", "{plain}", "--prompt-ids", "1,x"], 2, "1,x"),
    ("ids with a hole", ["generate", "{plain}", "--prompt-ids", "1,,2"], 2, "1,,2"),
    ("id beyond the vocabulary", ["generate", "{plain}", "--prompt-ids", "1,49152"], 2, "49152"),
    (
        "id huge",
        ["generate", "{plain}", "--prompt-ids", "99999999999999999999"],
        2,
        "99999999999999999999",
    ),
    ("id negative", ["generate", "{plain}", "--prompt-ids", "-1"], 2, "-1"),
    ("model an empty name", ["generate", "", "-p", "x"], 3, "''"),
    ("model a text file", ["generate", "{prompt.txt}", "-p", "x"], 3, "prompt.txt"),
    ("model a GGUF cut short", ["generate", "{cut.gguf}", "-p", "x"], 3, "cut.gguf"),
    ("folder without config", ["generate", "{no-config}", "-p", "x"], 3, "config.json"),
    ("config no JSON", ["generate", "{bad-config}", "-p", "x"], 3, "config.json"),
    ("model type not supported", ["generate", "{other-type}", "-p", "x"], 3, "gpt2"),
    ("only pickles", ["generate", "{pickle-only}", "-p", "x"], 3, "pytorch_model.bin"),
    (
        "a tensor missing",
        ["generate", "{missing-tensor}", "-p", "x"],
        3,
        "model.layers.1.mlp.up_proj.weight",
    ),
    ("plan that matches nothing", [*GENERATE, "--plan", "{no-match.yaml}"], 2, "sideways_proj"),
    ("plan with an unknown style", [*GENERATE, "--plan", "{no-style.yaml}"], 2, "diagonal"),
    ("plan no YAML", [*GENERATE, "--plan", "{no.yaml}"], 2, "no.yaml"),
    ("plan missing", [*GENERATE, "--plan", "{nowhere.yaml}"], 2, "nowhere.yaml"),
    ("unknown dtype", [*GENERATE, "--dtype", "float8"], 2, "float8"),
    ("max-model-len too large", [*GENERATE, "--max-model-len", "5000"], 2, "5000"),
    ("max-model-len 0", [*GENERATE, "--max-model-len", "0"], 2, "0"),
    ("system without chat", [*GENERATE, "--system", "Be brief."], 2, "--system"),
    ("ids with chat", ["generate", "{chatty}", "--prompt-ids", "1,2", "--chat"], 2, "--prompt-ids"),
    ("text without a tokenizer", ["generate", "{bare}", "-p", "x"], 2, "tokenizer"),
    (
        "stop without a tokenizer",
        ["generate", "{bare}", "--prompt-ids", "1", "--stop", "x"],
        2,
        "tokenizer",
    ),
    ("stop empty", [*GENERATE, "--stop", ""], 2, "stop"),
    ("template missing", [*GENERATE, "--chat"], 2, "chat template"),
    ("chat without a template", ["chat", "{plain}"], 2, "chat template"),
    ("chat without a tokenizer", ["chat", "{bare}"], 2, "chat template"),
    ("chat on an unknown model", ["chat", "no-such-model"], 3, "no-such-model"),
    ("chat with a bad temperature", ["chat", "{chatty}", "--temperature", "-1"], 2, "-1"),
    ("chat with a bad max-model-len", ["chat", "{chatty}", "--max-model-len", "0"], 2, "0"),
    ("unknown command", ["meditate"], 2, "meditate"),
    ("no model", ["generate"], 2, "'model'"),
    ("two models", [*GENERATE, "another"], 2, "another"),
]


def filled_in(arguments: list[str], folders: Folders) -> list[str]:
    return [
        folders[argument[1:-1]] if argument.startswith("{") else argument for argument in arguments
    ]


def check_refusal(run: Run, code: int, named: str) -> None:
    assert run.code == code, run.err
    assert run.out == ""
    assert run.err.startswith("parallama: ")
    assert len(run.err.splitlines()) <= 3
    assert "Traceback" not in run.err and "fault of parallama" not in run.err
    assert named in run.err


@pytest.mark.parametrize(
    ("name", "arguments", "code", "named"), ALONE, ids=[case[0] for case in ALONE]
)
def test_bad_input_ends_the_command_with_its_exit_code_and_three_lines(
    folders: Folders, name: str, arguments: list[str], code: int, named: str
) -> None:
    check_refusal(parallama(*filled_in(arguments, folders)), code, named)


@pytest.fixture(scope="session")
def refusals(folders: Folders) -> dict[str, Run]:
    runs = together([(filled_in(arguments, folders), "") for _, arguments, _, _ in TOGETHER])
    return dict(zip([case[0] for case in TOGETHER], runs, strict=True))


@pytest.mark.parametrize(
    ("name", "code", "named"),
    [(name, code, named) for name, _, code, named in TOGETHER],
    ids=[case[0] for case in TOGETHER],
)
def test_bad_input_is_refused_in_three_lines(
    refusals: dict[str, Run], name: str, code: int, named: str
) -> None:
    check_refusal(refusals[name], code, named)


def test_debug_shows_the_traceback(folders: Folders) -> None:
    done = parallama("generate", folders["no-config"], "-p", "x", "--debug")
    assert done.code != 0 and "Traceback" in done.err and "config.json" in done.err


# -- the same in Python


BAD_CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("no prompts", {"prompts": []}, "no prompts"),
    ("an empty text", {"prompts": [""]}, "empty"),
    ("no tokens", {"prompts": [[]]}, "no tokens"),
    ("a number", {"prompts": 5}, "prompt"),
    ("None", {"prompts": None}, "prompt"),
    ("None in a list", {"prompts": [None]}, "prompt"),
    ("id beyond the vocabulary", {"prompts": [[1, 49152]]}, "49152"),
    ("id negative", {"prompts": [[-1]]}, "-1"),
    ("id huge", {"prompts": [[1 << 70]]}, str(1 << 70)),
    ("ids as floats", {"prompts": [[1.0, 2.0]]}, "1.0"),
    ("ids as bools", {"prompts": [[True]]}, "True"),
    ("max_new_tokens 0", {"prompts": ["x"], "max_new_tokens": 0}, "0"),
    ("max_new_tokens a float", {"prompts": ["x"], "max_new_tokens": 1.5}, "1.5"),
    ("max_new_tokens a bool", {"prompts": ["x"], "max_new_tokens": True}, "True"),
    ("temperature a text", {"prompts": ["x"], "temperature": "hot"}, "hot"),
    ("top_p a bool", {"prompts": ["x"], "top_p": True}, "True"),
    ("top_k a float", {"prompts": ["x"], "temperature": 1, "top_k": 1.5}, "1.5"),
    ("seed a text", {"prompts": ["x"], "seed": "s"}, "'s'"),
    ("stop a number", {"prompts": ["x"], "stop": [5]}, "5"),
    ("stop empty", {"prompts": ["x"], "stop": ""}, "''"),
]


@pytest.fixture(scope="session")
def raised(workers: Workers, folders: Folders) -> dict[str, tuple[str, int, str]]:
    results = workers[1].call(
        "smollm2_cases:refused", folder=folders["plain"], calls=[call for _, call, _ in BAD_CALLS]
    )
    return dict(zip([name for name, _, _ in BAD_CALLS], results, strict=True))


@pytest.mark.parametrize(
    ("name", "named"),
    [(name, named) for name, _, named in BAD_CALLS],
    ids=[case[0] for case in BAD_CALLS],
)
def test_a_bad_argument_in_python_is_a_usage_error_that_names_it(
    raised: dict[str, tuple[str, int, str]], name: str, named: str
) -> None:
    kind, code, message = raised[name]
    assert (kind, code) == ("UsageError", 2), message
    assert named in message and len(message.splitlines()) <= 3


def test_an_unknown_sampling_argument_is_a_type_error(workers: Workers, folders: Folders) -> None:
    result = workers[1].call(
        "smollm2_cases:refused",
        folder=folders["plain"],
        calls=[{"prompts": ["x"], "temprature": 1}],
    )
    assert result[0][0] == "TypeError" and "temprature" in result[0][2]
