"""Sessions, chats and threads on one model keep out of each other's way."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

SMALL = {"heads": 4, "kv_heads": 2, "vocab": 101}


@pytest.fixture(scope="module")
def chatty(models: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with the tokenizer and the chat template of a trained one."""
    from parallama.files.find import find

    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(models(heads=9, kv_heads=3, intermediate=48, vocab=49152).folder, folder)
    find("smollm2").tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def answers(workers: Any, chatty: str) -> Any:
    return workers[1].call("session_cases:two_answers", folder=chatty)


def test_an_answer_is_over_when_the_next_message_is_sent(answers: Any) -> None:
    kind, code, message = answers["stale"]
    assert (kind, code) == ("UsageError", 2) and "answer" in message


def test_the_conversation_holds_the_turn_that_was_read_to_its_end(answers: Any) -> None:
    assert answers["messages"] == [
        {"role": "user", "content": "Second"},
        {"role": "assistant", "content": answers["text"]},
    ]


def test_an_answer_is_over_when_the_chat_starts_over(answers: Any) -> None:
    assert answers["after_reset"][:2] == ("UsageError", 2)


@pytest.mark.parametrize("limit", [0, -5])
def test_a_chat_refuses_answers_of_less_than_one_token(answers: Any, limit: int) -> None:
    kind, code, message = answers["limits"][limit]
    assert (kind, code) == ("UsageError", 2)
    assert "max_new_tokens" in message and str(limit) in message


def test_a_stream_is_over_when_its_session_goes_on_otherwise(workers: Any, models: Any) -> None:
    tiny = models(**SMALL)
    found = workers[1].call("session_cases:two_streams", folder=tiny.folder, prompt=[3, 1, 4])
    assert found["stale"][:2] == found["after_prefill"][:2] == ("UsageError", 2)
    from reference import greedy

    assert found["tokens"] == greedy(tiny.model, [3, 1, 4], 3)[0][1:]
    assert found["cached"] == [[3, 1, 4]]


@pytest.mark.parametrize("mesh", ["1x1", "1x2"])
def test_threads_on_one_model_get_what_each_gets_alone(
    workers: Any, models: Any, mesh: str
) -> None:
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5, 3]]
    found = workers[int(mesh[-1])].call(
        "session_cases:threads", folder=models(**SMALL).folder, mesh=mesh, prompts=prompts, steps=6
    )
    assert [tokens for tokens, _, _ in found["together"]] == found["alone"]
    # Each session counts what it compiled itself, and nothing of the others.
    assert sum(compiled for _, compiled, _ in found["together"]) == found["compiled"] > 0
    assert all(late == 0 for _, _, late in found["together"])
    assert found["stats_here"] == 0


def test_what_a_user_has_traced_before_is_still_right(workers: Any, models: Any) -> None:
    tiny = models(**SMALL)
    mine, tokens = workers[1].call("session_cases:pending", folder=tiny.folder, prompt=[7, 8])
    from reference import greedy

    assert mine == [1.0, 4.0, 7.0, 10.0]
    assert tokens == greedy(tiny.model, [7, 8], 4)[0]


@pytest.mark.parametrize("rows", [1, 4])
def test_inputs_without_rows_are_no_rows(workers: Any, models: Any, rows: int) -> None:
    """Three positions do not divide over two devices along "data", and need not."""
    found = workers[2].call(
        "session_cases:inputs", folder=models(**SMALL).folder, mesh="2x1", rows=rows
    )
    torch.testing.assert_close(found["found"], found["wanted"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["embedded"], found["wanted"], rtol=1e-4, atol=1e-4)


def test_a_sharded_model_has_a_config_of_its_own(workers: Any, models: Any) -> None:
    before, after, own = workers[1].call(
        "session_cases:shared_config", folder=models(**SMALL).folder
    )
    assert before == after != own


def test_a_checkpoints_config_stays_as_it_was_read(workers: Any, models: Any) -> None:
    found = workers[1].call("session_cases:checkpoint_config", folder=models(**SMALL).folder)
    assert len(set(found)) == 1
