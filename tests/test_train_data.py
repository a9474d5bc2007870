"""Training data: what becomes of records, and what is said of those that are wrong.

With the real tokenizer of SmolLM2.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import check_raised, says

from parallama.errors import ParallamaError
from parallama.files.chat_template import Renderer, renderer_of
from parallama.files.find import find
from parallama.train import data_files, packing, row_forms, tokens
from parallama.train.batch import IGNORED, PADDING
from parallama.train.packing import Position, Rows, make_batch, make_row, plan_rows


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from parallama import environment

    environment.expect_no_devices()
    return find("smollm2").tokenizer()


@functools.cache
def renderer(tokenizer: Any) -> Renderer:
    return renderer_of(tokenizer, "tiny")


def jsonl(folder: Path, *rows: Any, name: str = "data.jsonl") -> str:
    file = folder / name
    file.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return str(file)


def prepare(tokenizer: Any, source: str | list[str], folder: Path, **more: Any) -> tokens.Corpus:
    sources = [source] if isinstance(source, str) else source
    return tokens.prepare(sources, tokenizer, cache=folder / "cache", **({"seq_len": 128} | more))


def chat(*turns: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user" if at % 2 == 0 else "assistant", "content": turn}
            for at, turn in enumerate(turns)
        ]
    }


def trained(tokenizer: Any, record: Any) -> list[str]:
    """The stretches of text that are trained on."""
    (encoded,) = tokens.encode(row_forms.parse(record, "here"), tokenizer, renderer(tokenizer))
    stretches: list[list[int]] = [[]]
    for token, counts in zip(encoded.ids, encoded.trained, strict=True):
        if counts:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def test_of_a_conversation_only_the_assistants_words_are_trained_on(tokenizer: Any) -> None:
    record = chat("Hi <|im_end|> there", "Hello.\n", "Bye", "Good\n\nbye ")
    assert trained(tokenizer, record) == ["Hello.\n<|im_end|>", "Good\n\nbye <|im_end|>"]
    (encoded,) = tokens.encode(row_forms.parse(record, "here"), tokenizer, renderer(tokenizer))
    assert encoded.ids == tokenizer.apply_chat_template(
        record["messages"], tokenize=True, return_dict=False
    )
    opening = {
        "messages": [
            {"role": "assistant", "content": "Welcome."},
            {"role": "user", "content": "Hi"},
        ]
    }
    assert trained(tokenizer, opening) == ["Welcome.<|im_end|>"]


def test_of_prompt_and_completion_the_completion_is_trained_on_and_of_a_text_everything(
    tokenizer: Any,
) -> None:
    assert trained(tokenizer, {"prompt": "The sky is", "completion": " blue", "id": 7}) == [
        " blue<|im_end|>"
    ]
    assert trained(tokenizer, {"prompt": "", "completion": "Blue sky"}) == ["Blue sky<|im_end|>"]
    assert trained(tokenizer, {"text": "The sky is blue"}) == ["The sky is blue<|im_end|>"]


def test_a_template_that_says_why_it_takes_no_conversation_is_refused(tokenizer: Any) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ raise_exception('no system here') }}"
    record = row_forms.parse(chat("a", "b", "c", "d"), "here")
    with pytest.raises(ParallamaError) as caught:
        tokens.encode(record, other, renderer_of(other, "other"))
    assert says(caught.value, "here", "no system here")


def test_a_long_text_becomes_pieces_in_which_every_token_is_predicted_once(
    tokenizer: Any, tmp_path: Path
) -> None:
    corpus = prepare(tokenizer, "shipped:text", tmp_path, seq_len=64)
    text = data_files.find_files("shipped:text")[0].read_text(encoding="utf-8")
    whole = [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    predicted: list[int] = []
    for index in range(len(corpus.lengths)):
        ids, mask = corpus.document(index)
        assert 2 <= len(ids) <= 64 and mask.all()
        predicted += ids[1:].tolist()
    assert predicted == whole[1:]


def test_a_folder_is_read_in_order_and_what_is_no_data_in_it_left_alone(
    tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    jsonl(tmp_path / "in", {"text": "second"}, "", {"text": "third"}, name="b.jsonl")
    (tmp_path / "in" / "a.txt").write_text("first")
    jsonl(tmp_path / "in" / "deep", {"text": "fourth"}, name="c.jsonl")
    (tmp_path / "in" / "README.md").write_text("words")
    corpus = prepare(tokenizer, str(tmp_path / "in"), tmp_path)
    assert [tokenizer.decode(corpus.document(index)[0][:-1]) for index in range(4)] == [
        "first",
        "second",
        "third",
        "fourth",
    ]


def test_tokenized_data_come_from_the_cache_until_data_or_settings_change(
    tokenizer: Any, tmp_path: Path
) -> None:
    calls: list[tuple[int, int]] = []
    source = jsonl(tmp_path, {"text": "one two three"}, {"text": "four"})
    first = prepare(
        tokenizer, source, tmp_path, progress=lambda done, total: calls.append((done, total))
    )
    size = Path(source).stat().st_size
    assert calls == sorted(calls) and calls[-1] == (size, size) and len(calls) == 3
    again = prepare(
        tokenizer, source, tmp_path, progress=lambda done, total: calls.append((done, total))
    )
    assert len(calls) == 3 and again.fingerprint == first.fingerprint
    assert all((again.document(i)[0] == first.document(i)[0]).all() for i in range(2))
    assert prepare(tokenizer, source, tmp_path, seq_len=64).fingerprint != first.fingerprint
    jsonl(tmp_path, {"text": "one two three"}, {"text": "five"})
    assert prepare(tokenizer, source, tmp_path).fingerprint != first.fingerprint
    assert len(list((tmp_path / "cache").iterdir())) == 3  # and nothing half made
    damaged = tmp_path / "cache" / first.fingerprint / "tokens.bin"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    jsonl(tmp_path, {"text": "one two three"}, {"text": "four"})
    with pytest.raises(ParallamaError, match="damaged"):
        prepare(tokenizer, source, tmp_path)


LONG = " ".join(["word"] * 200)
WRONG: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "an empty file": ([], ("empty",)),
    "a file of empty lines": (["", "  "], ("empty",)),
    "a line that is not JSON": ([{"text": "fine"}, "{'text': 1}"], (":2", "JSON")),
    "a line that is no object": (['"text"'], (":1", "'text'", "JSON object")),
    "no known key": ([{"content": "x"}], ("messages, conversations, instruction", "content")),
    "no key": ([{}], ("messages, conversations, instruction", "none")),
    "messages that are no list": ([{"messages": "hi"}], ("'messages' is 'hi'", "list")),
    "no messages": ([{"messages": []}], ("'messages' is []",)),
    "a message that is no object": ([{"messages": ["hi"]}], ("message 1 is 'hi'",)),
    "an unknown role": (
        [{"messages": [{"role": "bot", "content": "x"}]}],
        ("message 1", "'bot'", "system, user, assistant, tool"),
    ),
    "content that is no text": (
        [{"messages": [{"role": "user", "content": 3}]}],
        ("message 1", "content 3", "text"),
    ),
    "no assistant turn": ([{"messages": [{"role": "user", "content": "x"}]}], ("assistant",)),
    "a prompt that is no text": ([{"prompt": ["x"], "completion": "y"}], ("'prompt' is ['x']",)),
    "a prompt without completion": ([{"prompt": "x"}], ("'completion' is None",)),
    "an empty text": ([{"text": ""}], ("'text' is ''",)),
    "an answer longer than the sequence": (
        [{"prompt": "x", "completion": LONG}],
        ("seq_len is 128", "too_long"),
    ),
    "a conversation longer than the sequence": (
        [chat("x", LONG)],
        ("seq_len is 128", "too_long"),
    ),
}


@pytest.mark.parametrize(("rows", "parts"), WRONG.values(), ids=WRONG)
def test_wrong_data_say_where_and_what_was_expected(
    rows: list[Any], parts: tuple[str, ...], tokenizer: Any, tmp_path: Path
) -> None:
    source = jsonl(tmp_path, *rows)
    with pytest.raises(ParallamaError) as caught:
        prepare(tokenizer, source, tmp_path)
    check_raised(caught.value, 2, source, *parts)
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


def test_data_that_are_not_there_say_so(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "\xff"}\n')
    for source, parts in (
        ("none.jsonl", ("'none.jsonl'",)),
        (str(tmp_path / "empty"), (".jsonl", ".txt")),
        (str(tmp_path / "a.csv"), ("a.csv",)),
        (str(tmp_path / "bad.txt"), ("bad.txt", "UTF-8")),
        (str(tmp_path / "bad.jsonl"), ("bad.jsonl:1", "UTF-8")),
        ("shipped:cat", (".jsonl", ".txt", "shipped:chat, shipped:text", "hf:NAME")),
        ("x\0y", ("data",)),
    ):
        with pytest.raises(ParallamaError) as caught:
            prepare(tokenizer, source, tmp_path)
        assert says(caught.value, *parts), source


def test_without_tokenizer_or_template_it_says_so(tokenizer: Any, tmp_path: Path) -> None:
    import copy

    with pytest.raises(ParallamaError, match=r"tokenizer\.json"):
        prepare(None, "shipped:chat", tmp_path)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ParallamaError, match=r"chat\.jsonl:1 .*chat template"):
        prepare(bare, "shipped:chat", tmp_path)


def test_records_that_are_too_long_are_dropped_or_cut_when_asked(
    tokenizer: Any, tmp_path: Path
) -> None:
    source = jsonl(
        tmp_path,
        {"prompt": "x", "completion": LONG},
        {"prompt": "y", "completion": "z"},
        {"prompt": LONG, "completion": "z"},
    )
    dropped = prepare(tokenizer, source, tmp_path, too_long="drop")
    assert (len(dropped.lengths), dropped.counts.dropped, dropped.counts.truncated) == (1, 2, 0)
    cut = prepare(
        tokenizer, source, tmp_path, too_long="truncate"
    )  # of the third nothing would be left to train on
    assert (cut.lengths.tolist()[0], len(cut.lengths)) == (128, 2)
    assert (cut.counts.dropped, cut.counts.truncated) == (1, 1)
    with pytest.raises(ParallamaError, match="1 records were dropped"):
        prepare(
            tokenizer,
            jsonl(tmp_path, {"prompt": LONG, "completion": "z"}, name="b.jsonl"),
            tmp_path,
            too_long="drop",
        )


def test_the_shipped_data_are_fit_to_train_on(tokenizer: Any, tmp_path: Path) -> None:
    corpus = prepare(tokenizer, ["shipped:chat", "shipped:text"], tmp_path, seq_len=128)
    assert len(corpus.lengths) > 64 and corpus.counts.dropped == corpus.counts.truncated == 0


def test_a_data_set_of_hugging_faces_library_is_read_as_a_file_would_be(
    tokenizer: Any, tmp_path: Path
) -> None:
    import datasets

    rows = [chat("Hi", "Hello."), chat("Bye", "Good bye.")]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    theirs = prepare(tokenizer, f"hf:{tmp_path / 'set'}", tmp_path)
    ours = prepare(tokenizer, jsonl(tmp_path, *rows), tmp_path)
    assert all(
        (theirs.document(i)[0] == ours.document(i)[0]).all()
        and (theirs.document(i)[1] == ours.document(i)[1]).all()
        for i in range(2)
    )
    wrong = datasets.Dataset.from_list([{"text": "fine"}, {"text": ""}])
    wrong.save_to_disk(str(tmp_path / "wrong"))
    with pytest.raises(ParallamaError, match=r"wrong row 2: 'text' is ''"):
        prepare(tokenizer, f"hf:{tmp_path / 'wrong'}", tmp_path)


class Lengths:
    """Documents of given lengths whose tokens say which document they are of, and where in it."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.asarray(lengths)

    def document(self, index: int) -> tuple[Any, Any]:
        length = int(self.lengths[index])
        return (1000 * (index + 1) + np.arange(length)).astype(np.uint32), np.arange(
            length
        ) % 3 != 0


LENGTHS = st.lists(st.integers(2, 24), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(0, 3), st.integers(0, 3), st.booleans(), st.booleans())
def test_every_document_is_in_one_row_of_an_epoch_and_every_row_has_room(
    lengths: list[int], seed: int, epoch: int, pack: bool, shuffle: bool
) -> None:
    rows = plan_rows(np.asarray(lengths), 24, seed, epoch, packing=pack, shuffle=shuffle)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 24 for row in rows)
    assert pack or all(len(row) == 1 for row in rows)
    assert rows == plan_rows(np.asarray(lengths), 24, seed, epoch, packing=pack, shuffle=shuffle)
    if pack:  # best fit: no two rows would fit into one
        left = sorted(sum(lengths[index] for index in row) for row in rows)
        assert len(left) < 2 or left[0] + left[1] > 24


@settings(deadline=None, max_examples=60)
@given(LENGTHS)
def test_a_row_keeps_its_documents_apart(lengths: list[int]) -> None:
    documents = Lengths(lengths)
    for members in plan_rows(documents.lengths, 24, 0, 0):
        row = make_row(documents, members, 24)
        assert (row.ids[row.documents == PADDING] == 0).all() and (
            row.labels[row.documents == PADDING] == IGNORED
        ).all()
        for number, index in enumerate(members):
            ids, mask = documents.document(index)
            here = row.documents == number
            assert (row.ids[here] == ids).all() and (
                row.positions[here] == np.arange(len(ids))
            ).all()
            assert (
                row.labels[here]
                == np.where(mask & (np.arange(len(ids)) > 0), ids.astype(np.int64), IGNORED)
            ).all()


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(0, 100), st.integers(1, 30))
def test_rows_from_a_position_are_those_that_would_have_come(
    lengths: list[int], skipped: int, count: int
) -> None:
    whole = Rows(Lengths(lengths), 24, seed=5)
    whole.take(skipped)
    rest = Rows(
        Lengths(lengths),
        24,
        seed=5,
        position=Position(epoch=whole.position.epoch, row=whole.position.row),
    )
    ours, theirs = rest.take(count), whole.take(count)
    assert all(
        (a.ids == b.ids).all() and (a.labels == b.labels).all()
        for a, b in zip(ours, theirs, strict=True)
    )
    assert rest.position == whole.position


def test_another_seed_or_epoch_is_another_order() -> None:
    lengths = np.full(64, 10)
    orders = {str(plan_rows(lengths, 24, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_two_micro_steps_of_two_see_what_one_of_four_sees() -> None:
    rows = Rows(Lengths([20] * 9), 24, seed=1).take(4)
    two, one = make_batch(rows, 2), make_batch(rows, 1)
    assert two.shape == (2, 2, 24) and one.shape == (1, 4, 24)
    assert (two.ids.reshape(-1) == one.ids.reshape(-1)).all()
    padded = make_batch([*rows[:1], packing.empty_row(24)], 1)
    assert padded.target_tokens == make_batch(rows[:1], 1).target_tokens
