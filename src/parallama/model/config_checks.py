"""Checks of a model's JSON files: numerics, token ids, sampling defaults. Pure.

What is refused here has nothing to do with splitting a model, but would break a run later; `spec`
checks sizes. Keys that name code (`auto_map`, attention implementations) are never handed
on: only what a config class declares is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import CheckpointError, lines, shown
from .rope import rope_settings

FLOAT_NAMES = ("float64", "float32", "bfloat16", "float16")
"""What a config may say that its weights are."""
# Names of older releases, which the config classes of today convert themselves.
_OLD_KEYS = (
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)
# Declared, but not for a config file to set: what a model returns, and labels of other tasks.
_NOT_OURS = (
    "output_hidden_states",
    "return_dict",
    "id2label",
    "label2id",
    "problem_type",
    "chunk_size_feed_forward",
    "architectures",
)


def declared(document: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """The keys of a config.json that a config class may see."""
    kept = {
        key: value
        for key, value in document.items()
        if (key in fields or key in _OLD_KEYS) and key not in _NOT_OURS
    }
    # Of two objects with rotary settings transformers would read one.
    if kept.get("rope_scaling") and kept.get("rope_parameters"):
        kept["rope_parameters"] = rope_settings(kept)
        del kept["rope_scaling"]
    return kept


def check_config(document: Mapping[str, Any], origin: str, vocab: int) -> None:
    """Refuse numbers and ids that no model can run with.

    Raises:
        CheckpointError: one of them, with its name.
    """
    _number(document, "rms_norm_eps", origin, 0, 1)
    _number(document, "initializer_range", origin, 0, 1e6)
    _number(document, "attention_dropout", origin, 0, 1)
    for key in ("dtype", "torch_dtype"):
        value = document.get(key)
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name not in (None, "auto", *FLOAT_NAMES):
            raise CheckpointError(
                lines(
                    f"{origin}: {key} is {shown(value)}",
                    f"expected one of {', '.join(FLOAT_NAMES)}",
                )
            )
    act = document.get("hidden_act")
    if act is not None and not isinstance(act, str):
        raise CheckpointError(
            lines(
                f"{origin}: hidden_act is {shown(act)}",
                "expected an activation of transformers, as silu",
            )
        )
    padding = document.get("pad_token_id")
    if padding is not None and not (type(padding) is int and -1 <= padding < vocab):
        raise CheckpointError(
            lines(
                f"{origin}: pad_token_id is {shown(padding)}",
                f"expected null, or an id from 0 to {vocab - 1}",
            )
        )
    end_ids(document.get("eos_token_id"), origin, vocab)


def check_generation(document: Any, origin: str, vocab: int) -> None:
    """Refuse a generation config whose defaults no run could use.

    Raises:
        CheckpointError: not a JSON object; or a value, with its name.
    """
    if not isinstance(document, Mapping):
        raise CheckpointError(
            lines(f"{origin} holds a {type(document).__name__}", "expected a JSON object")
        )
    sampled = document.get("do_sample")
    if sampled is not None and not isinstance(sampled, bool):
        raise CheckpointError(
            lines(f"{origin}: do_sample is {shown(sampled)}", "expected true or false")
        )
    _number(document, "temperature", origin, 0, 100)
    _number(document, "top_p", origin, 0, 1, above=True)
    _number(document, "min_p", origin, 0, 1)
    _number(document, "repetition_penalty", origin, 0, math.inf, above=True)
    top_k = document.get("top_k")
    if top_k is not None and not (type(top_k) is int and 0 <= top_k < 1 << 31):
        raise CheckpointError(
            lines(f"{origin}: top_k is {shown(top_k)}", "expected a whole number of at least 0")
        )
    end_ids(document.get("eos_token_id"), origin, vocab)


def end_ids(value: Any, origin: str, vocab: int) -> list[int]:
    """The ids that end a text, of an `eos_token_id`: null, one, or a list.

    Raises:
        CheckpointError: they are no ids of the vocabulary.
    """
    if value is None:
        return []
    ids = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(type(token) is int and 0 <= token < vocab for token in ids):
        raise CheckpointError(
            lines(
                f"{origin}: eos_token_id is {shown(value)}",
                f"expected ids from 0 to {vocab - 1}, the model's vocabulary",
            )
        )
    return ids


def check_vocabulary(tokenizer: Any | None, vocab: int) -> None:
    """Refuse a tokenizer that makes tokens for which the model has no embedding.

    Raises:
        CheckpointError: with both numbers.
    """
    if tokenizer is not None and len(tokenizer) > vocab:
        raise CheckpointError(
            lines(
                f"the tokenizer has {len(tokenizer)} tokens, and the model {vocab} (vocab_size)",
                "expected no more: a text with one of the others cannot be run",
                "use the tokenizer that the model was trained with, or resize its embedding",
            )
        )


def eos_ids(named: Any, tokenizer: Any | None, vocab: int) -> list[int]:
    """Ids that end a text: those of the generation config or the config, else the tokenizer's.

    Raises:
        CheckpointError: they are no ids of the vocabulary.
    """
    if named is not None:
        return end_ids(named, "the model", vocab)
    return end_ids(getattr(tokenizer, "eos_token_id", None), "the tokenizer", vocab)


def _number(
    document: Mapping[str, Any],
    key: str,
    origin: str,
    least: float,
    most: float,
    *,
    above: bool = False,
) -> None:
    """Refuse what is no number from `least` to `most`, or with `above` is `least` itself."""
    value = document.get(key)
    if value is None:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    good = is_number and abs(value) < 1e300 and least <= value <= most
    if not good or (above and value == least):
        upper = f" to {most:g}" if math.isfinite(most) else " up"
        raise CheckpointError(
            lines(
                f"{origin}: {key} is {shown(value)}",
                f"expected a number {'above' if above else 'from'} {least:g}{upper}",
            )
        )
