"""Requests on slots: each one's tokens depend on nothing but itself, and nothing is compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import train_models
from transformers import AutoModelForCausalLM
from workers import Workers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_models.make(Path(tmp_path_factory.mktemp("continuous")) / "model")


@pytest.mark.parametrize(("mesh", "devices"), [("1x1", 1), ("2x2", 4)])
def test_a_requests_tokens_are_those_it_has_alone(
    workers: Workers, folder: str, mesh: str, devices: int
) -> None:
    """Whatever its neighbours, its slot, its moment and what of its prompt was there already."""
    found = workers[devices].call("continuous_cases:served", folder=folder, mesh=mesh)
    for order in found["orders"]:
        assert order == found["alone"]
    assert found["cached"] > 0 and found["compiled since"] == 0
    assert found["cancelled"] == "abort" and found["left"] == (0, 0, "stopping")


def test_many_prompts_of_any_lengths_compile_a_handful_of_programs(
    workers: Workers, folder: str
) -> None:
    first, second, third = workers[2].call(
        "continuous_cases:many", folder=folder, mesh="1x2", numbers=[50, 37, 50]
    )
    assert first <= 4 and second == third == 0


def test_a_repetition_penalty_knows_the_prompt(workers: Workers, folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [[7, 21, 74, 198, 101], [5] * 40 + [9, 30]]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            min_new_tokens=12,
            repetition_penalty=1.5,
            pad_token_id=0,
            eos_token_id=None,
        )
        expected.append(out[0, len(prompt) :].tolist())
    found = workers[2].call(
        "continuous_cases:penalised", folder=folder, mesh="1x2", prompts=prompts, penalty=1.5
    )
    assert found == expected
