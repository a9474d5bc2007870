"""Sampling parameters of a request, where it leaves some to the model. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engine.row_sampling import RowSampling


def with_defaults(
    generation: Mapping[str, Any], given: Mapping[str, Any], seed: int
) -> RowSampling:
    """A row's sampling, with what was not given taken from the model's generation config.

    A generation config means what it means to transformers: greedy unless it says `do_sample`, and
    then with transformers' own defaults.

    Args:
        generation: contents of generation_config.json.
        given: temperature, top_k, top_p, min_p and repetition_penalty, as far as they were.
        seed: the row's.

    Raises:
        UsageError: a value is out of its range.
    """
    sampled = bool(generation.get("do_sample", False))
    defaults = {
        "temperature": 1.0 if sampled else 0.0,
        "top_k": 50 if sampled else 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    read = defaults if sampled else ("repetition_penalty",)
    own = {name: generation[name] for name in read if generation.get(name) is not None}
    return RowSampling(**(defaults | own | dict(given)), seed=seed)
