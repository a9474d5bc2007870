"""Rotary settings of a GGUF file, in transformers' words. Pure.

llama.cpp's converter writes the type, and for `llama3` no numbers but a tensor: what every
frequency is divided by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError, lines, shown

FACTORS = "rope_freqs.weight"
_PLAIN = ("none", "linear", "yarn")
# Of YaRN: llama.cpp's key -> transformers'.
_OF_YARN = {
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
# Keys that a transformers model has no setting for -> the value that asks for nothing.
_NEUTRAL = {"attn_factor": 1, "yarn_ext_factor": 1, "yarn_log_multiplier": 0, "alpha": 0}
_CLOSE = 1e-5
_COMMON = (8192.0, 4.0)
"""Original length and high_freq_factor of Meta's models, with a low_freq_factor of 1."""


def rope_settings(
    values: Mapping[str, Any],
    factors: Sequence[float] | None,
    *,
    theta: Any,
    head_dim: int,
    positions: int,
    origin: str,
) -> dict[str, Any]:
    """The `rope_parameters` of the config that the file was converted from.

    Args:
        values: metadata of the architecture, without its prefix.
        factors: of the tensor `FACTORS`, if there is one.
        positions: that the model was made for.
        origin: the file's name, for messages.

    Raises:
        CheckpointError: it is scaled in a way that no config says.
    """
    given = {
        key.removeprefix("rope.scaling."): value
        for key, value in values.items()
        if key.startswith("rope.scaling.")
    }
    factor: Any = given.get("factor") or values.get("rope.scale_linear") or 1.0
    kind = given.get("type", "linear")  # as llama.cpp takes it
    odd = next((key for key, none in _NEUTRAL.items() if given.get(key, none) != none), None)
    if kind not in _PLAIN or odd is not None:
        what = "type" if odd is None else odd
        raise CheckpointError(
            lines(
                f"{origin}: rope.scaling.{what} is {shown(given[what])}, which is not supported",
                f"expected one of {', '.join(_PLAIN)}, with its own numbers",
                "use the safetensors checkpoint",
            )
        )
    for key, value in {"freq_base": theta, "scaling.factor": factor}.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 1 <= value < 1e18:
            raise CheckpointError(
                lines(f"{origin}: rope.{key} is {shown(value)}", "expected a number from 1 up")
            )
    if kind == "none" or (kind == "linear" and factor == 1):
        kind = "default"
    if factors is not None:
        _check_factors(factors, head_dim, kind, origin)
        return {"rope_theta": theta} | _of_factors(factors, theta, head_dim, positions)
    settings: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    if kind != "default":
        settings["factor"] = factor
    if kind == "yarn":
        settings["original_max_position_embeddings"] = given.get(
            "original_context_length", positions
        )
        settings |= {name: given[key] for key, name in _OF_YARN.items() if key in given}
    return settings


def _check_factors(factors: Sequence[float], head_dim: int, kind: str, origin: str) -> None:
    wrong = next((value for value in factors if not 1 <= value < 1e6), None)
    if len(factors) != head_dim // 2 or wrong is not None or kind != "default":
        found = f"{len(factors)} numbers" if wrong is None else shown(wrong)
        beside = "" if kind == "default" else f" beside rope.scaling.type {kind!r}"
        raise CheckpointError(
            lines(
                f"{origin}: tensor {FACTORS} holds {found}{beside}",
                f"expected {head_dim // 2} numbers of at least 1, half of head_dim, alone",
            )
        )


def _of_factors(
    factors: Sequence[float], theta: float, head_dim: int, positions: int
) -> dict[str, Any]:
    """The settings whose frequencies are the plain ones divided by these factors."""
    most = max(factors)
    if most == 1:
        return {"rope_type": "default"}
    if min(factors) == most:
        return {"rope_type": "linear", "factor": most}
    waves = [2 * math.pi * theta ** (2 * index / head_dim) for index in range(len(factors))]
    for original, high in _candidates(factors, waves, most):
        if original > 1 and high > 1 and _makes(factors, waves, most, original, high):
            return {
                "rope_type": "llama3",
                "factor": most,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(original),
            }
    # No numbers of llama3's make them. Longrope says each.
    return {
        "rope_type": "longrope",
        "short_factor": [*factors],
        "long_factor": [*factors],
        "attention_factor": 1.0,
        "original_max_position_embeddings": positions,
    }


def _candidates(
    factors: Sequence[float], waves: Sequence[float], most: float
) -> list[tuple[float, float]]:
    """Original lengths and high_freq_factors that may have made the factors.

    Only their ratios to low_freq_factor count, so that is 1. Between the two ends llama3 mixes
    linearly in 1 / wavelength.
    """
    found = [_COMMON]
    mixed = [
        (1 / wave, (1 / factor - 1 / most) / (1 - 1 / most))
        for factor, wave in zip(factors, waves, strict=True)
        if 1 < factor < most
    ]
    if len(mixed) > 1:
        (one, first), (two, last) = mixed[0], mixed[-1]
        slope = (first - last) / (one - two)
        start = first - slope * one
        if start < 0:
            found.append((float(round(-slope / start)), round(1 - 1 / start, 4)))
    elif mixed:
        ((one, first),) = mixed
        found.append((float(round((first * (_COMMON[1] - 1) + 1) / one)), _COMMON[1]))
    else:
        plain = max((wave for wave, factor in zip(waves, factors, strict=True) if factor == 1))
        scaled = min((wave for wave, factor in zip(waves, factors, strict=True) if factor == most))
        if plain < scaled:
            found.append((math.sqrt(plain * scaled) // 1, (scaled / plain) ** 0.25))
    return found


def _makes(
    factors: Sequence[float], waves: Sequence[float], most: float, original: float, high: float
) -> bool:
    """Whether llama3's formula gives these factors."""
    for factor, wave in zip(factors, waves, strict=True):
        share = (original / wave - 1) / (high - 1)
        made = 1 / (1 / most + (1 - 1 / most) * min(max(share, 0.0), 1.0))
        if abs(made - factor) > _CLOSE * factor:
            return False
    return True
