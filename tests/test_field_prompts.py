"""What people ask for: sampling by others' names, seeds, conversations, files of prompts."""

from __future__ import annotations

import json
import os
import pty
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import Done, command
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import check_raised, check_refusal
from terminals import all_of

from parallama.cli.asked import Asked, from_options, from_prompts_file
from parallama.cli.text_options import TextOptions
from parallama.errors import UsageError
from parallama.inference.choosing import TokenBias
from parallama.inference.messages import checked
from parallama.inference.prompts import Prompts, list_of
from parallama.inference.requests import Request, params_of, requests_of
from parallama.inference.sampling_params import SamplingParams, by_our_names
from parallama.inference.seeds import row_seed
from parallama.inference.token_rules import TokenRules
from parallama.progress_bars import ProgressBars, is_watched

IDS = st.lists(st.integers(0, 2**26), max_size=20)
SEEDS = st.integers(0, 2**64 - 1)
HELLO = [{"role": "user", "content": "Hello"}]


@contextmanager
def refused(*parts: object) -> Iterator[None]:
    """What is done here is a wrong use, and the error names all of these."""
    with pytest.raises(UsageError) as caught:
        yield
    check_raised(caught.value, 2, *parts)


# -- seeds


@settings(deadline=None)
@given(seed=SEEDS, ids=IDS, number=st.integers(0, 99), other=st.tuples(SEEDS, IDS))
def test_a_rows_seed_follows_seed_tokens_and_number(
    seed: int, ids: list[int], number: int, other: tuple[int, list[int]]
) -> None:
    made = row_seed(seed, ids, number)
    assert made == row_seed(seed, list(ids), number) and 0 <= made < 1 << 64
    assert made != row_seed(seed, ids, number + 1)
    assert (made == row_seed(*other, number)) == ((seed, ids) == other)


def asked(prompts: list[list[int]], **names: Any) -> list[Request]:
    params = params_of(None, {"temperature": 1.0} | names, len(prompts))
    return requests_of(
        [(None, ids) for ids in prompts],
        params,
        generation={},
        rules=TokenRules(None, [], 300),
        answers=(),
        of_chat=(),
        max_model_len=64,
        max_positions=64,
    )


def test_equal_prompts_draw_differently_and_neighbours_do_not_matter() -> None:
    a, b = [1, 2], [3]
    seeds = [request.choosing.sampling.seed for request in asked([a, b, a], seed=7)]
    assert len(set(seeds)) == 3
    assert [request.choosing.sampling.seed for request in asked([b], seed=7)] == seeds[1:2]
    assert [request.choosing.sampling.seed for request in asked([a], seed=7, n=2)] == [
        seeds[0],
        seeds[2],
    ]


def test_without_a_seed_every_call_draws_anew() -> None:
    first, second = (asked([[1]])[0].choosing.sampling.seed for _ in range(2))
    assert first != second


def test_copies_of_a_greedy_text_are_refused() -> None:
    with refused("n is 3", "temperature"):
        asked([[1]], n=3, temperature=0)


def test_a_limit_is_the_prompts_own() -> None:
    limits = [request.limit for request in asked([[1] * 60, [1] * 10])]
    assert limits == [4, 54]
    with refused("60 tokens", "8 new", "64"):
        asked([[1], [1] * 60], max_new_tokens=8)


# -- SamplingParams


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"max_tokens": 5}, "max_new_tokens", 5),
        ({"max_completion_tokens": 5}, "max_new_tokens", 5),
        ({"num_return_sequences": 2}, "n", 2),
        ({"stop_strings": "x"}, "stop", ("x",)),
        ({"stop": ["x", "y"]}, "stop", ("x", "y")),
        ({"stop": None}, "stop", ()),
        ({"temp": 0.5}, "temperature", 0.5),
        ({"top_k": -1}, "top_k", 0),
        ({"min_new_tokens": 3}, "min_tokens", 3),
        ({"logit_bias": {"5": 1}}, "logit_bias", {5: 1.0}),
        ({"stop_token_ids": 7}, "stop_token_ids", (7,)),
    ],
)
def test_names_of_vllm_and_transformers_are_taken(given: Any, name: str, value: Any) -> None:
    assert getattr(SamplingParams(**given), name) == value


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_new_token": 5}, ("max_new_token", "max_new_tokens")),
        ({"temprature": 1}, ("temprature", "temperature")),
        ({"do_sample": True}, ("do_sample", "temperature")),
        ({"num_beams": 4}, ("num_beams", "beam")),
        ({"presence_penalty": 3}, ("presence_penalty is 3", "-2 to 2")),
        ({"length_penalty": 1}, ("length_penalty", "not supported")),
        ({"min_tokens": -1}, ("min_tokens is -1", "at least 0")),
        ({"min_tokens": 9, "max_tokens": 5}, ("min_tokens is 9", "max_new_tokens 5")),
        ({"logprobs": 21}, ("logprobs is 21", "0 to 20")),
        ({"prompt_logprobs": -1}, ("prompt_logprobs is -1", "0 to 20")),
        ({"logit_bias": {"x": 1}}, ("logit_bias", "x", "token ids")),
        ({"logit_bias": {"5": 1, 5: 2}}, ("logit_bias", "token ids")),
        ({"logit_bias": {5: 101}}, ("logit_bias", "101", "100")),
        ({"logit_bias": [1]}, ("logit_bias", "[1]")),
        ({"stop_token_ids": ["x"]}, ("stop_token_ids", "x", "token ids")),
        ({"allowed_token_ids": [-1]}, ("allowed_token_ids", "-1")),
        ({"bad_words": [""]}, ("bad_words", "empty")),
        ({"skip_special_tokens": 1}, ("skip_special_tokens is 1", "True or False")),
        ({"max_tokens": 5, "max_new_tokens": 6}, ("max_new_tokens", "two names")),
        ({"max_new_tokens": 0}, ("max_new_tokens is 0", "at least 1")),
        ({"max_new_tokens": 2.0}, ("max_new_tokens is 2.0",)),
        ({"n": 0}, ("n is 0", "at least 1")),
        ({"n": None}, ("n is None",)),
        ({"seed": -1}, ("seed is -1", "2^64", "none")),
        ({"stop": [""]}, ("stop", "empty")),
        ({"stop": 5}, ("stop is 5",)),
        ({"ignore_eos": "no"}, ("ignore_eos is 'no'",)),
        ({"top_p": 1.5}, ("top_p is 1.5",)),
    ],
)
def test_what_is_no_parameter_is_named_with_what_would_be(given: Any, says: Any) -> None:
    with refused(*says):
        SamplingParams(**given)


def test_parameters_are_one_for_all_or_one_for_each() -> None:
    one = SamplingParams(temperature=1)
    assert params_of(one, {}, 2) == [one, one] and params_of([one], {}, 1) == [one]
    for wrong, names, says in (
        (one, {"seed": 1}, ("sampling_params", "seed")),
        ([one], {}, ("1 sampling_params", "2 prompts")),
        (["hot"], {}, ("sampling_params", "hot")),
    ):
        with refused(*says):
            params_of(wrong, names, 2)  # type: ignore[arg-type]


def test_two_names_of_one_parameter_are_refused() -> None:
    with refused("max_new_tokens", "two names"):
        by_our_names({"max_tokens": 1, "max_completion_tokens": 2})


# -- prompts and conversations


def test_one_prompt_need_not_be_in_a_list() -> None:
    assert list_of("a") == ["a"] and list_of([1, 2]) == [[1, 2]] and list_of(["a"]) == ["a"]
    assert list_of({"prompt": "a"}) == [{"prompt": "a"}]
    with refused("no prompts"):
        list_of([])


def encoded(prompts: Any) -> list[list[int]]:
    made = Prompts("tiny", None, vocab=64)
    return [made.encoded(prompt)[1] for prompt in list_of(prompts)]


@pytest.mark.parametrize(
    "prompts",
    [
        [1, 2],
        (1, 2),
        torch.tensor([1, 2]),
        torch.tensor([[1, 2]]),
        np.array([1, 2]),
        [np.int64(1), np.int32(2)],
        [torch.tensor([1, 2])],
        {"prompt_token_ids": [1, 2]},
        [{"input_ids": np.array([1, 2])}],
    ],
    ids=repr,
)
def test_token_ids_may_come_in_any_array(prompts: Any) -> None:
    assert encoded(prompts) == [[1, 2]]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (b"abc", "b'abc'"),
        (None, "None"),
        (iter(["a"]), "iterator"),
        ([None], "None"),
        ([[True, False]], "True"),
        ([[1.0]], "1.0"),
        ({"input_ids": [[1], [2]]}, "[[1], [2]]"),
        ({"text": "a"}, "'text'"),
        ([[1, 64]], "64"),
    ],
)
def test_what_is_no_prompt_is_shown(prompts: Any, says: str) -> None:
    with refused(says):
        encoded(prompts)


def test_half_a_character_is_no_text() -> None:
    for give in (
        lambda: Prompts("tiny", object(), vocab=64).encode("a\ud800b"),
        lambda: checked([{"role": "user", "content": "a\ud800b"}]),
    ):
        with refused("\\ud800"):
            give()


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint64(2**63))
    assert params == SamplingParams(temperature=0.5, top_k=3, seed=2**63)
    assert type(params.top_k) is int


def test_contents_may_be_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert checked([{"role": "user", "content": parts}]) == [{"role": "user", "content": "ab"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert checked([call]) == [call]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], ("empty",)),
        ("Hello", ("messages", "Hello")),
        (HELLO[0], ("messages", "role")),
        (None, ("messages", "None")),
        ([{"content": "a"}], ("message 0", "role")),
        ([*HELLO, {"role": "user"}], ("message 1", "None")),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ("message 0", "image_url")),
    ],
)
def test_a_message_without_role_or_text_is_named(messages: Any, says: Any) -> None:
    with refused(*says):
        checked(messages)


def test_the_last_newline_of_a_file_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    for content, prompt in ((b"a\n", "a"), (b"a\r\n", "a"), (b"a\n\n", "a\n"), (b"a", "a")):
        (tmp_path / "prompt.txt").write_bytes(content)
        assert from_options(None, None, tmp_path / "prompt.txt", None) == [Asked(prompt=prompt)]
    (tmp_path / "prompt.txt").write_bytes(b"\n")
    with refused("empty"):
        from_options(None, None, tmp_path / "prompt.txt", None)


def test_conversations_are_read_in_every_form(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    for document, count in (
        (HELLO, 1),
        ({"messages": HELLO}, 1),
        ([HELLO, HELLO], 2),
        ([{"messages": HELLO}, {"messages": HELLO}], 2),
    ):
        path.write_text(json.dumps(document), encoding="utf-8-sig")
        assert from_options(None, None, None, path) == [Asked(messages=HELLO)] * count
    for text, says in (
        ("{", ("--messages", "JSON")),
        ("[]", ("empty",)),
        ("5", ("messages is 5",)),
    ):
        path.write_text(text)
        with refused(*says):
            from_options(None, None, None, path)


def test_a_file_of_prompts_has_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\n")
    lines = [(each.prompt, each.carried) for each in from_prompts_file(path)]
    assert lines == [("one", {"line": 1}), ("two", {"line": 3})]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", ("line 2", "JSON")),
        ("5", ("line 2", "5", "prompt")),
        ('{"text": "a"}', ("line 2", "prompt", "messages")),
        ('{"prompt": ""}', ("line 2", "prompt is ''")),
        ('{"prompt": [1, "a"]}', ("line 2", "token ids")),
        ('{"prompt": "a", "messages": []}', ("line 2", "prompt or messages")),
        ('{"messages": [{"role": "user"}]}', ("line 2", "message 0")),
        ('{"prompt": "a", "max_token": 5}', ("line 2", "max_token", "max_tokens")),
        ('{"prompt": "a", "top_p": 2}', ("line 2", "top_p is 2")),
    ],
)
def test_a_wrong_line_is_named_before_anything_runs(tmp_path: Path, line: str, says: Any) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with refused("prompts.jsonl", *says):
        from_prompts_file(path)


# -- progress


def test_progress_is_shown_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert is_watched()
        bars = ProgressBars()
        bars("compiling", 3, 7)
        bars("loading", 3_000_000, 7_000_000)
        bars.close()
    shown = all_of(ours)
    assert "compiling" in shown and "3/7" in shown and "3.00M/7.00M" in shown
    with Path(os.devnull).open("w") as nowhere:
        monkeypatch.setattr(sys, "stderr", nowhere)
        assert not is_watched()


# -- on devices


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    from train_models import make

    return make(tmp_path_factory.mktemp("field") / "model")


@pytest.fixture(scope="module")
def found(workers: Any, chatty: str) -> Any:
    return workers[2].call("field_prompt_cases:everything", folder=chatty)


def test_one_prompt_several_times_gives_several_texts(found: Any) -> None:
    first, second = found["clones"]
    assert len({tuple(ids) for ids in [*first, *second]}) == 6


def test_a_seed_repeats_a_run_on_any_mesh_and_in_any_batch(found: Any) -> None:
    together, again, alone, moved = found["seeded"]
    assert together == again == moved and together[1] == alone[0]
    assert together[0] != together[2], "equal prompts"


def test_n_gives_the_texts_of_equal_prompts(found: Any) -> None:
    assert [index for index, _ in found["n"]] == [0, 1, 0, 1]
    assert [ids for _, ids in found["n"]][:2] == [found["seeded"][0][0], found["seeded"][0][2]]


def test_each_prompt_has_parameters_of_its_own(found: Any) -> None:
    greedy, short, stopped = found["each"]
    assert len(greedy[0]) == 12 and greedy[1] == "length"
    assert short == [greedy[0][:3], "length", greedy[2][: len(short[2])]]
    assert stopped[1] == "stop" and stopped[2] == greedy[2][: len(stopped[2])] != greedy[2]


def test_a_stop_string_that_is_a_special_token_ends_the_text_with_it(found: Any) -> None:
    assert found["special"] == [None, "stop"]


def test_groups_of_rows_give_what_one_batch_gives(found: Any) -> None:
    in_groups, together, compiled = found["groups"]
    assert in_groups == together and compiled == 0


def test_groups_whose_samplers_differ_share_their_programs(found: Any) -> None:
    first, all_in_all = found["mixed"]
    assert first == all_in_all > 0


def test_a_conversation_is_answered_as_its_rendered_prompt_is_continued(found: Any) -> None:
    assert found["chat"]["one"] == found["chat"]["list"][0] == found["chat"]["rendered"]
    assert found["chat"]["list"][1] != found["chat"]["list"][0]


def test_a_chats_turn_is_the_answer_to_its_messages(found: Any) -> None:
    assert found["chat"]["turns"] == found["chat"]["answers"]
    assert found["chat"]["after reset"] != found["chat"]["turns"][0], "a turn repeated"


@pytest.mark.parametrize("name", ["max_token", "both", "stream of two", "system twice"])
def test_wrong_calls_are_usage_errors(found: Any, name: str) -> None:
    kind, code, message, words = found["wrong"][name]
    assert (kind, code) == ("UsageError", 2) and all(word in message for word in words)


@pytest.fixture(scope="module")
def lines_of_file(chatty: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [
        {"prompt": "Once", "max_tokens": 3, "custom_id": "first"},
        {"messages": HELLO, "n": 2, "temperature": 1.0, "seed": 1},
        "Once",
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--max-num-seqs", "2", "--temperature", "0", "--max-new-tokens", "5"]
    return command(["generate", chatty, "--prompts-file", str(path), *options])


def test_results_of_a_file_of_prompts_are_json_lines(lines_of_file: Done) -> None:
    assert lines_of_file.code == 0, lines_of_file
    rows = {
        (row["line"], row["index"]): row for row in map(json.loads, lines_of_file.out.splitlines())
    }
    assert sorted(rows) == [(1, 0), (2, 0), (2, 1), (3, 0)]
    assert rows[1, 0]["custom_id"] == "first" and len(rows[1, 0]["token_ids"]) == 3
    assert rows[1, 0]["token_ids"] == rows[3, 0]["token_ids"][:3] and rows[3, 0]["prompt"] == "Once"
    assert rows[2, 0]["token_ids"] != rows[2, 1]["token_ids"]


def test_messages_and_n_on_the_command_line(chatty: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([HELLO, HELLO]))
    options = ["--n", "2", "--temperature", "1", "--max-new-tokens", "6", "--json"]
    done = command(["generate", chatty, "--messages", str(path), *options])
    outputs = json.loads(done.out)["outputs"]
    assert [output["index"] for output in outputs] == [0, 1, 0, 1]
    assert len({output["text"] for output in outputs}) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompts-file", "nowhere.txt"], ("--prompts-file", "nowhere.txt")),
        (["--prompts-file", "nowhere.txt", "--prompt", "a"], ("--prompts-file",)),
        (["--prompts-file", "nowhere.txt", "--json"], ("--json", "--prompts-file")),
        (["--messages", "nowhere.json"], ("--messages", "nowhere.json")),
        (["--prompt", "a", "--n", "0"], ("--n is 0", "at least 1")),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    chatty: str, arguments: list[str], says: tuple[str, ...]
) -> None:
    done = command(["generate", chatty, *arguments])
    check_refusal(done, 2, *says, as_json="--json" in arguments)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stop_token_ids": [300]}, ("stop_token_ids has token 300", "0 to 299")),
        ({"allowed_token_ids": [5, 999]}, ("allowed_token_ids has token 999", "0 to 299")),
        ({"logit_bias": {300: 1}}, ("logit_bias has token 300", "0 to 299")),
        ({"stop": "x"}, ("stop is ['x']", "tokenizer")),
        ({"bad_words": ["x"]}, ("bad_words is ['x']", "tokenizer")),
    ],
)
def test_what_a_model_hasnt_is_refused_by_name(given: Any, says: tuple[str, ...]) -> None:
    with refused(*says):
        TokenRules(None, [], 300).read(SamplingParams(**given), ())


@pytest.mark.parametrize("given", ["x", "5", "5=", "=1", "5=x"])
def test_a_bias_that_is_none_is_shown(given: str) -> None:
    with refused(*(["--logit-bias", given] if given != "=1" else ["logit_bias"])):
        TextOptions(logit_bias=[given])


WORD = st.lists(st.integers(0, 3), min_size=1, max_size=4)
IDS_AND_WORDS = st.tuples(st.lists(st.integers(0, 3), max_size=12), st.lists(WORD, max_size=4))


@given(case=IDS_AND_WORDS, new=st.integers(0, 5))
def test_the_last_tokens_alone_decide_what_is_hidden(case: Any, new: int) -> None:
    ids, words = case
    bias = TokenBias(
        added={}, allowed=None, late=frozenset({9}), least=3, words=tuple(map(tuple, words))
    )
    hidden = bias.hidden(ids[len(ids) - min(bias.reach, len(ids)) :], new)
    wanted = {w[-1] for w in words if len(w) <= len(ids) + 1 and [*ids, w[-1]][-len(w) :] == w}
    assert hidden == bias.hidden(ids, new) == wanted | ({9} if new < 3 else set())
