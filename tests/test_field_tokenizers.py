"""What a tokenizer's files say counts, and what they or transformers disagree on is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from forks import command
from messages import check_raised
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from parallama.errors import CheckpointError
from parallama.files.tokenizer_files import read
from parallama.inference.prompts import Prompts
from parallama.prove.verification import verify

BEGIN, END = 256, 257
VOCAB = 258


def write(
    folder: Path, *, splits: str | None = None, begins: bool = False, **config: Any
) -> list[str]:
    """A byte-level tokenizer with `<s>` and `</s>`; gives its alphabet by id.

    Args:
        splits: the regular expression by which words are split.
        begins: tokenizer.json adds `<s>` itself.
        config: of tokenizer_config.json.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)}
    merged = {**vocab, "1" + "2": VOCAB} if splits else vocab
    made = Tokenizer(models.BPE(vocab=merged, merges=[("1", "2")] if splits else []))
    made.add_special_tokens(["<s>", "</s>"])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    parts = [pre_tokenizers.Split(Regex(splits), "isolated")] if splits else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*parts, byte_level])
    made.decoder = decoders.ByteLevel()
    if begins:
        begin = [("<s>", made.token_to_id("<s>"))]
        made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", begin)
    made.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config))
    return alphabet


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def test_a_text_is_split_as_the_folders_tokenizer_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, splits=r"\p{N}+", tokenizer_class="Qwen2Tokenizer")
    tokenizer = read(tmp_path, "qwen2")
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a12").ids
    assert ids_of(tokenizer, "a12") == own and len(own) == 2, "transformers' class splits digits"
    for _ in range(2):
        read(tmp_path, "qwen2")
    said = [record.getMessage() for record in caplog.records if record.name == "parallama"]
    assert len(said) == 1 and "pre_tokenizer" in said[0] and "Qwen2Tokenizer" in said[0]
    assert tokenizer.notes and not caplog.records[0].levelno > logging.WARNING


def test_nothing_is_said_of_what_has_no_influence_on_tokens(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    vocab = {letter: number for number, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    Qwen2Tokenizer(vocab=vocab, merges=[]).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    document["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] = False
    document["decoder"]["use_regex"] = not document["decoder"]["use_regex"]
    path.write_text(json.dumps(document))
    assert read(tmp_path, "qwen2").notes == []


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_config_says_whether_a_text_begins_with_bos(tmp_path: Path, model_type: str) -> None:
    alphabet = write(tmp_path, add_bos_token=True, add_eos_token=True)
    a = alphabet.index("a")
    tokenizer = read(tmp_path, model_type)
    assert ids_of(tokenizer, "a") == [BEGIN, a, END]
    assert [key in " ".join(tokenizer.notes) for key in ("add_bos", "add_eos")] == [True, True]


def test_the_config_says_so_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    alphabet = write(tmp_path, begins=True)
    assert ids_of(read(tmp_path, "llama"), "a")[0] == BEGIN and not read(tmp_path, "llama").notes
    write(tmp_path, begins=True, add_bos_token=False)
    tokenizer = read(tmp_path, "llama")
    assert ids_of(tokenizer, "a") == [alphabet.index("a")] and "add_bos_token" in tokenizer.notes[0]


@pytest.mark.parametrize("said", ["yes", 1, []])
def test_what_is_neither_true_nor_false_is_refused(tmp_path: Path, said: Any) -> None:
    write(tmp_path, add_bos_token=said)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, "llama")
    check_raised(caught.value, 3, "tokenizer_config.json", "add_bos_token", repr(said))


def test_a_prompt_with_a_bos_of_its_own_gets_no_second(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = "{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}"
    alphabet = write(tmp_path, begins=True, chat_template=template)
    prompts = Prompts(str(tmp_path), read(tmp_path, "llama"), VOCAB)
    once = [BEGIN, alphabet.index("a")]
    assert prompts.encode("a") == prompts.encode("<s>a") == once
    assert prompts.encode([BEGIN, *once]) == [BEGIN, *once], "ids are taken as they are"
    assert prompts.render_chat([{"role": "user", "content": "a"}]) == once
    said = [record.getMessage() for record in caplog.records if record.name == "parallama"]
    assert len([line for line in said if "<s>" in line]) == 1


def test_verify_reports_what_disagrees(models: Any, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(models(vocab=512).folder, folder)
    write(folder, add_bos_token=True)
    found = verify(str(folder))
    assert found.passed and len(found.notes) == 1 and "add_bos_token" in found.notes[0]
    done = command(["verify", str(folder)])
    assert done.code == 0 and "note: " in done.out and "add_bos_token" in done.out
