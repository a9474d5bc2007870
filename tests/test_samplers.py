"""Samplers that follow a text, and what is told of tokens, against transformers on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import train_models
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList
from workers import Workers

NEW = 12
PROMPTS = [[7, 21, 74, 198, 101], [5, 9] * 20 + [9, 30]]
MESHES = [("1x1", 1), ("1x2", 2), ("2x2", 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_models.make(Path(tmp_path_factory.mktemp("samplers")) / "model")


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


class Penalties(LogitsProcessor):
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence, of the new text."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self.prompt :], minlength=scores.shape[1])
        return scores - counts * self.frequency - (counts > 0) * self.presence


def by_transformers(
    model: Any, prompt: list[int], penalties: tuple[float, float] = (0, 0), **more: Any
) -> list[int]:
    ids = torch.tensor([prompt])
    how = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None}
    processors = LogitsProcessorList()
    if penalties != (0, 0):
        processors.append(Penalties(len(prompt), *penalties))
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), logits_processor=processors, **how | more
    )
    return list(out[0, len(prompt) :].tolist())


def asked(**more: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True} | more


@pytest.mark.parametrize(("mesh", "devices"), MESHES)
def test_each_gives_the_tokens_of_transformers_beside_the_others(
    workers: Workers, folder: str, model: Any, tokenizer: Any, mesh: str, devices: int
) -> None:
    prompts, params, expected, plain = [], [], [], []
    for prompt in PROMPTS:
        free = by_transformers(model, prompt)
        pair = tuple(free[3:5])
        word = tokenizer.decode(pair)
        words = {
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (word.lstrip(), f" {word.lstrip()}")
        }
        few = [*free[:2], 4, 11, 90]
        others = [token for token in range(model.config.vocab_size) if token not in few]
        last = free[-1]
        cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({}, {}),
            ({"presence_penalty": 1.5}, {"penalties": (1.5, 0)}),
            ({"frequency_penalty": 0.7}, {"penalties": (0, 0.7)}),
            ({"frequency_penalty": -2, "presence_penalty": 1}, {"penalties": (1, -2)}),
            (
                {"logit_bias": {free[0]: -4.0, "19": 2.5}},
                {"sequence_bias": {(free[0],): -4.0, (19,): 2.5}},
            ),
            ({"allowed_token_ids": few}, {"suppress_tokens": others}),
            ({"bad_words": [word]}, {"bad_words_ids": [list(each) for each in words]}),
            (
                {"bad_words": [word], "repetition_penalty": 1.4, "logit_bias": {3: 1.0}},
                {
                    "bad_words_ids": [list(each) for each in words],
                    "repetition_penalty": 1.4,
                    "sequence_bias": {(3,): 1.0},
                },
            ),
            (
                {"min_tokens": 9, "stop_token_ids": [last, free[1]]},
                {"min_new_tokens": 9, "eos_token_id": [last, free[1]]},
            ),
        ]
        for ours, theirs in cases:
            prompts.append(prompt)
            params.append(asked(**ours))
            expected.append(by_transformers(model, prompt, **theirs))
            plain.append(free)
    found = workers[devices].call(
        "sampler_cases:together", folder=folder, mesh=mesh, prompts=prompts, params=params
    )
    for each, given, wanted in zip(found, params, expected, strict=True):
        assert each["tokens"] == wanted, given
    changed = [wanted != free for wanted, free in zip(expected, plain, strict=True)]
    assert sum(changed) >= 12, changed  # of 18, of which two ask for nothing


@pytest.mark.parametrize(("mesh", "devices"), MESHES)
def test_likeliest_tokens_and_scores_of_prompts_are_the_models_own(
    workers: Workers, folder: str, model: Any, mesh: str, devices: int
) -> None:
    long = [(31 * place) % 290 + 3 for place in range(150)]  # two chunks
    prompts = [PROMPTS[0], PROMPTS[1], long, long, [8]]
    params = [
        asked(logprobs=5),
        asked(logprobs=1, temperature=1.5, seed=3, presence_penalty=1),
        asked(logprobs=0, prompt_logprobs=20),
        asked(prompt_logprobs=0, logprobs=3),
        asked(prompt_logprobs=2),
    ]
    found = workers[devices].call(
        "sampler_cases:together", folder=folder, mesh=mesh, prompts=prompts, params=params
    )
    for prompt, given, each in zip(prompts, params, found, strict=True):
        ids = torch.tensor([[*prompt, *each["tokens"]]])
        with torch.no_grad():
            chances = torch.log_softmax(model(ids).logits[0].float(), -1)
        new = chances[len(prompt) - 1 : -1]
        count = given.get("logprobs") or 0
        for place, tops in enumerate(each["tops"] if count else []):
            check(new[place], tops, count)
            if given["temperature"] == 0:
                assert each["logprobs"][place] == tops[0][1] and each["tokens"][place] == tops[0][0]
        assert (count > 0) == bool(each["tops"])
        if given.get("prompt_logprobs") is None:
            assert each["prompt"] is None
            continue
        assert each["prompt"][0] is None and len(each["prompt"]) == len(prompt)
        for place, scored in enumerate(each["prompt"][1:]):
            assert scored.token == prompt[place + 1]
            assert scored.logprob == pytest.approx(float(chances[place, scored.token]), abs=1e-4)
            check(chances[place], scored.top, given["prompt_logprobs"])
            if scored.top and scored.top[0][0] == scored.token:
                assert scored.top[0][1] == scored.logprob


def check(chances: torch.Tensor, tops: Any, count: int) -> None:
    """These are the likeliest of a place, but for tokens that are as likely."""
    assert len(tops) == count
    wanted = chances.topk(count).values.tolist()
    assert [each[1] for each in tops] == pytest.approx(wanted, abs=1e-4)
    assert [float(chances[token]) for token, _ in tops] == pytest.approx(wanted, abs=1e-4)
    assert len({token for token, _ in tops}) == count


def test_what_ends_a_text_is_told_and_kept_where_asked(
    workers: Workers, folder: str, model: Any, tokenizer: Any
) -> None:
    free = by_transformers(model, PROMPTS[0])
    text = tokenizer.decode(free[:6])
    stop = tokenizer.decode(free[4:6]).strip()
    params = [
        asked(stop_token_ids=[free[2]]),
        asked(stop_token_ids=[free[2]], include_stop_str_in_output=True),
        asked(stop=[stop]),
        asked(stop=[stop], include_stop_str_in_output=True),
        asked(max_new_tokens=2),
    ]
    found = workers[1].call(
        "sampler_cases:together",
        folder=folder,
        mesh="1x1",
        prompts=[PROMPTS[0]] * len(params),
        params=params,
    )
    first = free.index(free[2])
    assert [each["ends"] for each in found[:2]] == [("stop", free[2])] * 2
    assert found[0]["tokens"] == found[1]["tokens"] == free[: first + 1]
    assert found[0]["text"] != found[1]["text"] and found[1]["text"].startswith(found[0]["text"])
    assert [each["ends"] for each in found[2:4]] == [("stop", stop)] * 2
    assert found[3]["text"] == found[2]["text"] + stop and stop in text
    assert found[4]["ends"] == ("length", None)
