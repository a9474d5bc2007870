"""A tokenizer of a checkpoint loads, or is an error; so is every later call: it never hangs."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken_folders import TOKENIZER, make_good, write_json
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from parallama.errors import CheckpointError
from parallama.files import tokenizer_load_trial, tokenizer_trial
from parallama.files.checkpoint import SafetensorsFolder
from parallama.files.find import find
from parallama.files.tokenizer_pipeline import is_bounded, is_bounded_file
from parallama.inference.prompts import Prompts
from parallama.inference.text_stream import TextStream

SLOW = r"x*x*x*x*y|."
"""On a run of x, the steps of one match grow with the fourth power of its length."""
RUNS = ("x" * 90 + " ") * 200
"""Half a second for each run; no match is so long that Oniguruma gives up."""
PANICS = r"(x+x+)+y"
"""Oniguruma gives up, and the Rust around it panics."""


def split(regex: str) -> dict[str, Any]:
    pattern = {"Regex": regex}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def replace(regex: str, content: str = "") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": regex}, "content": content}


def doubling(times: int) -> dict[str, Any]:
    once = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [once] * times}


def folder_with(folder: Path, **parts: Any) -> Path:
    """A whole tiny model whose tokenizer.json has other parts."""
    make_good(folder)
    write_json(folder / "tokenizer.json", TOKENIZER | parts)
    return folder


def tokenizer_with(folder: Path, **parts: Any) -> Any:
    return SafetensorsFolder(folder_with(folder, **parts)).tokenizer()


@pytest.fixture
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_trial, "LIMIT_S", 1)


def refused(call: Callable[[], Any], *says: str) -> None:
    """A call is refused in three lines, in which some words are."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) <= 3 and all(part in message for part in says), message


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param({"pre_tokenizer": split(SLOW)}, id="split"),
        pytest.param({"normalizer": replace(SLOW, "x")}, id="replace"),
        pytest.param(
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split("a"), split(SLOW)]}},
            id="in a sequence",
        ),
    ],
)
def test_a_text_on_which_a_pattern_takes_for_ever_is_an_error(tmp_path, little_time, parts):
    tokenizer = tokenizer_with(tmp_path / "model", **parts)
    prompts = Prompts("tiny", tokenizer, vocab=64)
    says = (str(tmp_path / "model"), "does not end within 1 s")
    refused(lambda: prompts.encode(RUNS), *says)
    refused(lambda: tokenizer.tokenize(RUNS), *says)
    assert prompts.encode("a b")  # the next process is as good


def test_a_normalizer_that_doubles_a_text_again_and_again_is_an_error(tmp_path, little_time):
    tokenizer = tokenizer_with(tmp_path / "model", normalizer=doubling(40))
    refused(lambda: tokenizer("a"), "the tokenizer of")
    assert tokenizer("b")["input_ids"]


def test_a_panic_of_the_tokenizer_is_an_error(tmp_path):
    tokenizer = tokenizer_with(tmp_path / "model", pre_tokenizer=split(PANICS))
    prompt = "x" * 50
    refused(lambda: Prompts("tiny", tokenizer, 64).encode(prompt), "PanicException", "retry-limit")


def test_an_exception_of_a_harmless_tokenizer_is_an_error_too(tmp_path):
    model = TOKENIZER["model"] | {"unk_token": "not there"}
    tokenizer = tokenizer_with(tmp_path / "model", model=model)
    assert tokenizer.encoding is None
    refused(lambda: Prompts("tiny", tokenizer, 64).encode("unheard of"), "cannot be used")


def test_token_ids_on_whose_text_a_decoder_takes_for_ever_are_an_error(tmp_path, little_time):
    joined = {"type": "Sequence", "decoders": [{"type": "Fuse"}, replace(SLOW, "x")]}
    vocab = TOKENIZER["model"]["vocab"] | {RUNS: 40}
    model = TOKENIZER["model"] | {"vocab": vocab}
    tokenizer = tokenizer_with(tmp_path / "model", model=model, decoder=joined)
    assert tokenizer.encoding is None and tokenizer.decode([3]) == "x"
    refused(lambda: tokenizer.decode([40]), "does not end within 1 s")
    refused(lambda: tokenizer.batch_decode([[3], [40]]), "does not end within 1 s")
    stream = TextStream(tokenizer)
    assert stream.push(3) == "x"
    refused(lambda: stream.push(40), "does not end within 1 s")


@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_takes_for_ever_to_load_is_an_error(tmp_path, monkeypatch, where):
    """Added tokens are normalized when they are added."""
    monkeypatch.setattr(tokenizer_load_trial, "LIMIT_S", 8)
    added = {"id": 40, "content": RUNS, "normalized": True, "special": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    parts: dict[str, Any] = {"normalizer": replace(SLOW)}
    if where == "tokenizer.json":
        parts["added_tokens"] = [*TOKENIZER["added_tokens"], added | flags]
    folder = folder_with(tmp_path / "model", **parts)
    if where == "tokenizer_config.json":
        config = json.loads((folder / where).read_text(encoding="utf-8"))
        number = added.pop("id")
        config["added_tokens_decoder"] = {str(number): added | flags}
        write_json(folder / where, config)
    refused(lambda: SafetensorsFolder(folder).tokenizer(), str(folder), "did not end in time")


def test_the_command_ends_with_3_where_a_prompt_takes_for_ever(tmp_path):
    folder = folder_with(tmp_path / "model", pre_tokenizer=split(SLOW))
    command = [str(Path(sys.executable).with_name("parallama")), "generate", str(folder)]
    command += ["--prompt", RUNS, "--quiet", "--max-new-tokens", "2"]
    prefixes = ("PJRT_", "XLA_", "CPU_NUM_", "TF_CPP_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=kept)
    assert done.returncode == 3 and done.stdout == "", done.stderr
    assert str(folder) in done.stderr and len(done.stderr.splitlines()) <= 3


# What is not known to be harmless is tried, and gives the same tokens.


def test_an_unknown_pattern_that_is_harmless_gives_the_tokens_that_it_gives_by_itself(tmp_path):
    tokenizer = tokenizer_with(tmp_path / "model", pre_tokenizer=split(r"[ab]|\s"))
    assert tokenizer.encoding is not None and tokenizer.decoding is None
    alone = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    for text in ("a b", "", "b</s>a", "\U0001f600 \u2028 a", "a\nb"):
        assert tokenizer(text)["input_ids"] == alone.encode(text).ids
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        assert offsets == alone.encode(text).offsets
    assert tokenizer("a", "b")["input_ids"] == alone.encode("a", "b").ids
    assert tokenizer.decode([3, 4]) == alone.decode([3, 4])


def test_a_tokenizer_is_used_from_any_thread_and_its_process_ends_with_it(tmp_path):
    tokenizer = tokenizer_with(tmp_path / "model", pre_tokenizer=split(r"[ab]|\s"))
    expected, found = tokenizer("a b")["input_ids"], []
    threads = [
        threading.Thread(target=lambda: found.append(tokenizer("a b")["input_ids"]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected] * 4
    process = tokenizer.encoding._bounded.process
    assert process is not None and process.poll() is None
    tokenizer.encoding.close()
    assert process.poll() is not None
    assert tokenizer("a b")["input_ids"] == expected


def test_copies_of_a_tokenizer_are_bounded_as_well(tmp_path, little_time):
    tokenizer = tokenizer_with(tmp_path / "model", pre_tokenizer=split(SLOW))
    expected = tokenizer("a b")["input_ids"]
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert twin("a b")["input_ids"] == expected
        refused(lambda twin=twin: twin(RUNS), "does not end within 1 s")


def test_a_tokenizer_is_saved_under_the_name_of_its_own_class(tmp_path):
    tokenizer = tokenizer_with(tmp_path / "model")
    tokenizer.save_pretrained(str(tmp_path / "saved"))
    said = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert said["tokenizer_class"] == type(tokenizer).__mro__[2].__name__


# What is known to be harmless is not.


def test_a_well_known_tokenizer_takes_no_process(tmp_path):
    for tokenizer in (tokenizer_with(tmp_path / "model"), find("smollm2").tokenizer()):
        assert tokenizer.encoding is None and tokenizer.decoding is None
        assert tokenizer("a b")["input_ids"]


def test_the_patterns_of_transformers_llamas_qwens_and_mistrals_are_known():
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    names = ("llama-bpe", "llama3", "falcon3", "tekken", "qwen2", "deepseek-r1-qwen", "gpt-4o")
    regexes = [GGUF_PRE_TOKENIZER_SPLITS[name] for name in names]
    for regex in (*regexes, PRETOKENIZE_REGEX):
        made = Tokenizer(models.BPE())
        parts = [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        made.pre_tokenizer = pre_tokenizers.Sequence(parts)
        assert is_bounded(json.loads(made.to_str())["pre_tokenizer"])
        assert is_bounded_file(made.to_str().encode())


PLAIN = json.dumps(TOKENIZER).encode()


@pytest.mark.parametrize(
    ("content", "bounded"),
    [
        (PLAIN, True),
        (json.dumps(TOKENIZER, indent=2).encode(), True),
        (json.dumps(TOKENIZER | {"pre_tokenizer": split("[ab]")}).encode(), False),
        (json.dumps(TOKENIZER | {"model": {"vocab": {"normalizer": 5}}}).encode(), True),
        (PLAIN.replace(b'"normalizer": null', b'"normalizer": {"type": "Evil"}'), False),
        (PLAIN.replace(b'"normalizer"', rb'"\u006eormalizer"'), False),
        (PLAIN.replace(b'"type": "Whitespace"', b'"type": "Whitespace", "type": "x"'), False),
        (PLAIN + b' "normalizer": {"type": "Sequence", "normalizers": [{"type": "Pre"', False),
        (b"", True),
        (b"\xff\xfe", True),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value),
)
def test_a_file_is_bounded_only_if_all_its_parts_are(content, bounded):
    assert is_bounded_file(content) is bounded


@pytest.mark.parametrize(
    ("component", "bounded"),
    [
        (None, True),
        ({"type": "ByteLevel", "use_regex": True}, True),
        ({"type": "Sequence", "normalizers": [{"type": "NFC"}] * 8}, True),
        ({"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 9}, False),
        ({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}, True),
        ({"type": "Replace", "pattern": {"String": " "}, "content": "  "}, False),
        ({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}, True),
        ({"type": "Replace", "pattern": {"Regex": ["a"]}, "content": " "}, False),
        ({"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}, False),
        ({"type": "Replace", "pattern": {"String": "a"}, "content": ""}, True),
        ({"type": "Split", "pattern": {"String": " "}}, True),
        ({"type": "Split", "pattern": {"String": " ", "Regex": "a"}}, False),
        ({"type": "Strip", "content": " ", "start": 1, "stop": 0}, True),
        ({"type": "Strip", "content": " ", "start": 1 << 60, "stop": 0}, False),
        ({"type": "Prepend", "prepend": "\u2581"}, True),
        ({"type": "Prepend", "prepend": "a" * 1000}, False),
        ({"type": "Precompiled", "precompiled_charsmap": "AAAA"}, False),
        ({"type": ["ByteLevel"]}, False),
        ({"pattern": {"Regex": "a"}}, False),
        (["ByteLevel"], False),
        ({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Sequence"}]}, True),
    ],
    ids=str,
)
def test_only_parts_that_are_known_to_be_harmless_are_bounded(component, bounded):
    assert is_bounded(component) is bounded
