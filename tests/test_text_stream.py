"""Tokens to text as they come: whole characters, and nothing of a stop string."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from parallama.files.find import find
from parallama.inference.prompts import Prompts
from parallama.inference.text_stream import TextStream

TEXTS = {
    "ascii": "The largest planet, Jupiter, is  big.\n\n\tIsn't it?",
    "accents": "Fünf süße Äpfel à la crème brûlée, señor Łukasz",
    "japanese": "吾輩は猫である。名前はまだ無い。",
    "emoji": "a 👍🏽 b 👩‍👩‍👧‍👦 c 🇫🇮🏳️‍🌈 d 🫠🫠",
    "combining": "e\u0301 n\u0303 a\u0302\u0323 \u1100\u1161\u11a8 क्षि Z\u0351\u036b\u0343",
    "right to left": "שלום עולם، مرحبا بالعالم",
    "mixed": "x=1 🎉 数学: ∑ᵢ xᵢ² ≤ ∞ \u200b\u00a0 end",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return find("smollm2").tokenizer()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def in_pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [*[stream.push(token) for token in ids], stream.finish()]


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_together_are_what_the_tokenizer_decodes(tokenizer: Any, name: str) -> None:
    ids = ids_of(tokenizer, TEXTS[name])
    pieces = in_pieces(TextStream(tokenizer), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) == TEXTS[name]


@pytest.mark.parametrize("name", TEXTS)
def test_no_piece_holds_half_a_character(tokenizer: Any, name: str) -> None:
    pieces = in_pieces(TextStream(tokenizer), ids_of(tokenizer, TEXTS[name]))
    assert not any("\ufffd" in piece for piece in pieces)
    at = 0
    for piece in pieces:
        assert TEXTS[name].startswith(piece, at)
        at += len(piece)


def test_a_character_of_several_tokens_comes_with_its_last(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "🫠")
    assert len(ids) > 1, "this needs a character that the tokenizer splits"
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids] == [""] * (len(ids) - 1) + ["🫠"]
    assert stream.finish() == ""


def test_an_unfinished_character_shows_as_such_only_at_the_end(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "ab 🫠")[:-1]
    pieces = in_pieces(TextStream(tokenizer), ids)
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_text_flows_again_after_a_broken_character(tokenizer: Any) -> None:
    ids = [*ids_of(tokenizer, "🫠")[:-1], *ids_of(tokenizer, " and so on")]
    assert "".join(in_pieces(TextStream(tokenizer), ids)) == tokenizer.decode(
        ids, skip_special_tokens=True
    )


def test_special_tokens_are_not_text(tokenizer: Any) -> None:
    ids = [*ids_of(tokenizer, "Hello"), tokenizer.eos_token_id]
    assert "".join(in_pieces(TextStream(tokenizer), ids)) == "Hello"


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=30))
def test_any_text_comes_out_as_the_tokenizer_decodes_it(tokenizer: Any, text: str) -> None:
    ids = ids_of(tokenizer, text)
    assert "".join(in_pieces(TextStream(tokenizer), ids)) == tokenizer.decode(
        ids, skip_special_tokens=True
    )


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(min_value=17, max_value=49151), max_size=20))
def test_any_tokens_come_out_as_the_tokenizer_decodes_them(tokenizer: Any, ids: list[int]) -> None:
    assert "".join(in_pieces(TextStream(tokenizer), ids)) == tokenizer.decode(
        ids, skip_special_tokens=True
    )


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet="ab \n", max_size=40),
    stops=st.lists(st.text(alphabet="ab \n", min_size=1, max_size=5), max_size=3),
)
def test_the_text_ends_before_the_first_stop_string(
    tokenizer: Any, text: str, stops: list[str]
) -> None:
    ids = ids_of(tokenizer, text)
    stream = TextStream(tokenizer, stops)
    got = "".join(in_pieces(stream, ids))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    # Of several stop strings the first that is complete ends the text, which need not be the one
    # that begins first.
    assert (stream.stopped is not None) == bool(ends)
    assert whole.startswith(got)
    assert not any(stop in got for stop in stops)
    if not ends:
        assert got == whole
    elif len(stops) == 1:
        assert got == whole[: ends[0]]


def test_a_stop_string_over_a_token_border_is_held_back_and_cut(tokenizer: Any) -> None:
    text = "The largest planet in the solar system"
    ids = ids_of(tokenizer, text)
    pieces = [tokenizer.decode([token]) for token in ids]
    border = len("".join(pieces[:2]))
    stop = text[border - 2 : border + 3]
    stream = TextStream(tokenizer, [stop])
    pushed = [stream.push(token) for token in ids]
    assert stream.stopped
    assert "".join(pushed) == text[: border - 2]
    assert "".join(pushed[:2]) == text[: border - 2], "the beginning of the stop string was shown"
    assert stream.push(ids[0]) == "" and stream.finish() == "", "nothing comes after a stop"


def test_what_looked_like_a_stop_string_comes_when_it_is_none(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "one two three")
    stream = TextStream(tokenizer, [" two four"])
    pieces = [stream.push(token) for token in ids]
    assert pieces[:2] == ["one", ""], "the beginning of a stop string is held back"
    assert "".join(pieces) + stream.finish() == "one two three"
    assert not stream.stopped


def test_the_held_back_end_comes_with_finish(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "one two")
    stream = TextStream(tokenizer, [" two three"])
    assert "".join(stream.push(token) for token in ids) == "one"
    assert stream.finish() == " two"


@pytest.mark.parametrize(
    ("stops", "wanted"),
    [
        (["largest planet", "largest"], "The "),
        (["planet", "largest"], "The "),
        (["largest", " largest planet"], "The "),
        (["t p"], "The larges"),
        (["Saturn", "planet"], "The largest "),
    ],
)
def test_of_overlapping_stop_strings_none_is_in_the_text(
    tokenizer: Any, stops: list[str], wanted: str
) -> None:
    stream = TextStream(tokenizer, stops)
    got = "".join(in_pieces(stream, ids_of(tokenizer, "The largest planet in the solar system")))
    assert stream.stopped
    assert not any(stop in got for stop in stops)
    assert got == wanted


def test_a_stop_string_of_one_emoji_cuts_before_it(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ["🫠"])
    assert "".join(in_pieces(stream, ids_of(tokenizer, "fine 🫠 not"))) == "fine "
    assert stream.stopped


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None)
    assert (stream.push(5), stream.finish(), stream.stopped) == ("", "", None)


def test_a_text_begins_with_its_space(tmp_path: Any) -> None:
    """Decoders of SentencePiece drop the space of what comes first: here it isn't."""
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"\u2581Hello": 0, "\u2581world": 1, "!": 2}, unk_token="!")
    )
    words.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=words)
    assert fast.decode([0]) == "Hello"
    assert in_pieces(TextStream(fast, behind=[0]), [1, 0]) == [" world", " Hello", ""]
    assert in_pieces(TextStream(fast), [1, 0]) == ["world", " Hello", ""]


def test_a_stop_string_counts_only_behind_the_fewest_tokens(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, " one two one two one")
    stream = TextStream(tokenizer, [" two"], least=3)
    assert "".join(in_pieces(stream, ids)) == " one two one" and stream.stopped == " two"


def test_half_a_character_of_the_prompt_stays_the_prompts(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "\U0001fae0 yes")
    stream = TextStream(tokenizer, behind=ids[:1])
    assert "".join(in_pieces(stream, ids_of(tokenizer, " yes"))) == " yes"


def test_special_tokens_are_kept_where_asked(tokenizer: Any) -> None:
    token = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert TextStream(tokenizer).push(token) == ""
    assert TextStream(tokenizer, skip_special_tokens=False).push(token) == "<|im_end|>"


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|turn|>\n{% endfor %}"


def test_an_answer_ends_where_the_template_ends_a_turn(tokenizer: Any) -> None:
    fast = copy.deepcopy(tokenizer)
    fast.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    turn = fast.convert_tokens_to_ids("<|turn|>")
    for template, ends in (
        (TEMPLATE, {turn, fast.eos_token_id}),
        (TEMPLATE.replace("<|turn|>", ""), {fast.eos_token_id}),
        ("{{ raise_exception('no') }}", {fast.eos_token_id}),
        ("<|turn|>{{ messages[0].content }}", {fast.eos_token_id}),
        (None, {fast.eos_token_id}),
    ):
        fast.chat_template = template
        assert Prompts("m", fast, len(fast)).chat_ends() == ends
