"""What a step tells of tokens besides the chosen one: the likeliest, and scores of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .run_stats import TokenLogprob

Top = tuple[tuple[int, float], ...]


def top_of(ids: torch.Tensor, logprobs: torch.Tensor, count: int) -> Top:
    """The first `count` of the likeliest tokens of a place, `[N]`."""
    return tuple(zip(ids[:count].tolist(), logprobs[:count].tolist(), strict=True))


def scores(
    targets: Sequence[int], row: int, told: Mapping[str, torch.Tensor], count: int
) -> list[TokenLogprob]:
    """Scores of the tokens that follow those of a chunk.

    Args:
        targets: the tokens.
        row: of the step.
        told: `logprobs` `[P, S]`, `prompt_top_ids` and `prompt_top_logprobs` `[P, S, N]`.
        count: how many of the likeliest are asked for.
    """
    chances = told["logprobs"][row].tolist()
    ids, logprobs = told["prompt_top_ids"][row], told["prompt_top_logprobs"][row]
    return [
        TokenLogprob(
            token=token, logprob=chances[place], top=top_of(ids[place], logprobs[place], count)
        )
        for place, token in enumerate(targets)
    ]
