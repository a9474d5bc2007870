"""The command line: what it prints where, and what it says and returns when something is wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import pytest
from forks import Done, command, environment
from messages import check_refusal, says
from reference import TinyModels
from workers import Workers

from parallama.files.find import find

COMMAND = str(Path(sys.executable).with_name("parallama"))
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


@dataclass(frozen=True)
class Folders:
    """Model folders, and many that are broken.

    `chatty` has a tokenizer and a chat template, `plain` no template, `bare` no tokenizer.
    """

    root: Path

    def __getitem__(self, name: str) -> str:
        return str(self.root / name)


@pytest.fixture(scope="module")
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


HELP = """
import contextlib, io, json, sys
from parallama.__main__ import run
found = {}
for command in ("", "generate", "chat", "plan", "inspect", "audit", "validate", "verify", "doctor",
                "bench", "eval", "train", "export"):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = run([command, "--help"] if command else ["-h"])
    heavy = {"torch", "torch_xla", "transformers", "numpy"} & set(sys.modules)
    found[command] = [code, "Usage: " in out.getvalue(), sorted(heavy)]
print(json.dumps(found))
"""


def test_help_comes_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP], capture_output=True, text=True, env=environment(), check=True
    )
    found = json.loads(done.stdout)
    assert len(found) == 13 and all(each == [0, True, []] for each in found.values()), found


def test_every_option_of_generate_has_a_help_text() -> None:
    done = command(["generate", "--help"])
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
    installed, module = (
        subprocess.run([*words, "--version"], capture_output=True, text=True, env=environment())
        for words in ([COMMAND], [sys.executable, "-m", "parallama"])
    )
    assert (installed.returncode, installed.stderr) == (0, "")
    assert installed.stdout.startswith("parallama 0.") and "torch_xla 2.9" in installed.stdout
    assert module.stdout == installed.stdout


# -- generate


@pytest.fixture(scope="module")
def documents(folders: Folders) -> tuple[dict[str, Any], dict[str, Any], Done]:
    """Two JSON documents of the same prompts on 1x3, and the first run.

    The second has the embedding replicated.
    """
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
    first = command(arguments)
    second = command([*arguments, "--plan", folders["replicate.yaml"], "--quiet"])
    assert first.code == second.code == 0, first.err + second.err
    assert second.err == "", "with --quiet nothing is on standard error"
    return json.loads(first.out), json.loads(second.out), first


def test_json_is_one_document_with_the_documented_keys_and_nothing_else(
    documents: tuple[dict[str, Any], dict[str, Any], Done],
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
        ends = {"finish_reason", "stop_reason"}
        scores = {"logprobs", "top_logprobs", "prompt_logprobs"}
        assert set(output) == {"prompt", "index", "text", "token_ids"} | ends | scores
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
    documents: tuple[dict[str, Any], dict[str, Any], Done],
) -> None:
    err = documents[2].err
    assert err.count("\n") == 1 and "1x3 cpu" in err and "0 after warm-up" in err


def test_a_plan_file_moves_tensors_and_keeps_the_tokens(
    folders: Folders, documents: tuple[dict[str, Any], dict[str, Any], Done]
) -> None:
    document, replicated, _ = documents
    assert [output["token_ids"] for output in document["outputs"]] == [
        output["token_ids"] for output in replicated["outputs"]
    ]
    config = json.loads((folders.root / "chatty" / "config.json").read_text())
    before, after = (item["stats"]["param_bytes_per_device"] for item in (document, replicated))
    split = config["vocab_size"] // 3 * config["hidden_size"] * 4
    assert after == [size + 2 * split for size in before]


@pytest.fixture(scope="module")
def texts(folders: Folders) -> dict[str, Done]:
    """Ways to give prompts, on one device."""
    model, few = folders["chatty"], ["--max-new-tokens", "5", "--temperature", "0", "--ignore-eos"]
    once = ["-p", "Once upon a time"]
    sampled = [*once, *few[:2], "--temperature", "1", "--top-k", "50", "--json", "--seed"]
    named = {
        "one": [model, *once, *few],
        "file": [model, "--prompt-file", folders["prompt.txt"], *few],
        "stdin": [model, *few],
        "several": [model, *once, "--prompt", "The end", *few],
        "ids": [model, "--prompt-ids", "1, 2,3", *few, "--json"],
        "bare ids": [folders["bare"], "--prompt-ids", "1,2,3", *few, "--json"],
        "chat": [model, "--chat", "--system", "Be brief.", "-p", "Hello", *few, "--json"],
        "quiet": [model, *once, *few, "--quiet"],
        "tp": [model, "-tp", "1", "--mesh", "data=1,model=1", "--devices", "1", *once, *few],
        "seed 1": [model, *sampled, "1"],
        "seed 2": [model, *sampled, "2"],
    }
    given = {list(named).index("stdin"): "Once upon a time"}
    found = forks.commands(*(["generate", *each] for each in named.values()), stdin=given)
    results = dict(zip(named, found, strict=True))
    assert {name: (run.code, run.err) for name, run in results.items() if run.code} == {}
    return results


def test_a_prompt_is_the_same_from_an_option_a_file_and_standard_input(
    texts: dict[str, Done],
) -> None:
    assert (
        texts["one"].out
        == texts["file"].out
        == texts["stdin"].out
        == texts["quiet"].out
        == texts["tp"].out
    )
    assert texts["one"].out.endswith("\n") and len(texts["one"].out) > 5


def test_several_prompts_are_told_apart(texts: dict[str, Done]) -> None:
    out = texts["several"].out
    assert out.startswith("--- 1 of 2\n" + texts["one"].out) and "--- 2 of 2\n" in out


def test_prompt_ids_work_with_and_without_a_tokenizer(texts: dict[str, Done]) -> None:
    with_text, without = (json.loads(texts[name].out)["outputs"][0] for name in ("ids", "bare ids"))
    assert with_text["prompt"] == without["prompt"] == [1, 2, 3]
    assert with_text["token_ids"] == without["token_ids"]
    assert with_text["text"] and without["text"] == ""


def test_chat_puts_the_prompt_and_the_system_message_into_the_template(
    texts: dict[str, Done],
) -> None:

    prompt = json.loads(texts["chat"].out)["outputs"][0]["prompt"]
    tokenizer = find("smollm2").tokenizer()
    assert tokenizer is not None
    assert (
        tokenizer.decode(prompt)
        == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_quiet_leaves_standard_error_empty(texts: dict[str, Done]) -> None:
    assert texts["quiet"].err == "" and texts["one"].err.startswith("[1x1 cpu; load ")


def test_another_seed_gives_another_text(texts: dict[str, Done]) -> None:
    first, second = (
        json.loads(texts[name].out)["outputs"][0]["token_ids"] for name in ("seed 1", "seed 2")
    )
    assert first != second


# -- chat

CHAT = ["--max-new-tokens", "4", "--temperature", "0", "--max-model-len"]


def test_chat_answers_line_by_line_and_starts_over_with_new(folders: Folders) -> None:
    arguments = ["chat", folders["chatty"], *CHAT, "400"]
    lines = "Hello there\n\nAnd again\n/new\nHello there\n/exit\nnever read\n"
    done, first = forks.commands(
        arguments, [*arguments, "--quiet"], stdin={0: lines, 1: "Hello there\n"}
    )
    assert done.code == 0, done.err
    (said,) = done.err.strip().splitlines()
    assert said.startswith("[1x1; ") and said.endswith("0 after warm-up]")
    assert (first.code, first.err) == (0, "")
    assert done.out.startswith(first.out) and done.out.endswith(first.out), "/new forgets"
    assert len(done.out) > 2 * len(first.out)


def test_a_message_that_does_not_fit_is_refused_and_the_chat_goes_on(folders: Folders) -> None:
    arguments = ["chat", folders["chatty"], *CHAT, "60", "--quiet"]
    done = command(arguments, stdin="word " * 100 + "\nHello\n")
    assert done.code == 0, done.err
    assert done.err.startswith("parallama: ") and says(done.err, "conversation")
    assert len(done.out) > 1, "the second message is answered"


# -- signals


def streaming(folders: Folders, tokens: int, number: int | None = None) -> subprocess.Popen[bytes]:
    """The real command, which has begun to print; it heeds a signal that its parent ignores."""
    text = ["-p", "Once", "--max-new-tokens", str(tokens), "--ignore-eos", "--temperature", "0"]
    process = subprocess.Popen(
        [COMMAND, "generate", folders["chatty"], *text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        preexec_fn=None if number is None else lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1), process.stderr.read()
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_stream_with_its_exit_code_and_no_traceback(
    folders: Folders, number: signal.Signals, code: int
) -> None:
    with streaming(folders, 2000, number) as process:
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert b"Traceback" not in err


def test_a_reader_that_leaves_is_no_fault(folders: Folders) -> None:
    with streaming(folders, 500) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        process.wait(60)
    assert process.returncode == 141
    assert b"Traceback" not in err and b"Exception" not in err


# -- bad input: (name, arguments, exit code, what the message names)
# "{...}" is a folder of `folders`; GENERATE runs on one with a tokenizer.

GENERATE = ["generate", "{plain}", "-p", "Once"]
REFUSED: list[tuple[str, list[str], int, str]] = [
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
    ("top-k negative", [*GENERATE, "--top-k", "-2"], 2, "-2"),
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
    ("no model", ["generate"], 2, "MODEL"),
    ("two models", [*GENERATE, "another"], 2, "another"),
]


def filled_in(arguments: list[str], folders: Folders) -> list[str]:
    return [
        folders[argument[1:-1]] if argument.startswith("{") else argument for argument in arguments
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "code", "named"), REFUSED, ids=[case[0] for case in REFUSED]
)
def test_bad_input_ends_the_command_with_its_exit_code_and_three_lines(
    folders: Folders, name: str, arguments: list[str], code: int, named: str
) -> None:
    check_refusal(command(filled_in(arguments, folders)), code, named)


def test_debug_shows_the_traceback(folders: Folders) -> None:
    done = command(["generate", folders["no-config"], "-p", "x", "--debug"])
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


@pytest.fixture(scope="module")
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
    assert says(message, named)


def test_an_unknown_sampling_argument_is_named(workers: Workers, folders: Folders) -> None:
    result = workers[1].call(
        "smollm2_cases:refused",
        folder=folders["plain"],
        calls=[{"prompts": ["x"], "temprature": 1}],
    )
    assert result[0][:2] == ("UsageError", 2) and says(result[0][2], "temprature", "temperature")
