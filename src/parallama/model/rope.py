"""Rotary embedding as a config.json describes it, by transformers' names. Pure.

The frequencies themselves are transformers' own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, lines, shown

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
"""Rotary embeddings that are supported, by transformers' names."""
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Those whose frequencies depend on the length of the text that is run."""
_OF_SCALING = (
    *("factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "alpha"),
)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary embedding.

    Attributes:
        kind: one of `ROPE_TYPES`.
        reach: positions that it was stretched to, where the config says that apart from
            `max_position_embeddings`.
    """

    kind: str
    reach: int | None = None


def rope_settings(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says in `rope_parameters` (transformers 5) and `rope_scaling` (before).

    They say the same where both say it; see `agreement`.
    """
    return {**(values.get("rope_parameters") or {}), **(values.get("rope_scaling") or {})}


def read_rope(values: Mapping[str, Any], *, head_dim: int, positions: int, origin: str) -> Rope:
    """The rotary embedding of a config.

    Args:
        values: the config.json.
        positions: its `max_position_embeddings`.
        origin: what to call it in a message.

    Raises:
        CheckpointError: it is not one of `ROPE_TYPES`, rotates only a part of each head, differs
            between layers, or a number in it is missing or absurd.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if values.get(key) is not None and not isinstance(values[key], Mapping):
            raise CheckpointError(
                lines(
                    f"{origin}: rope type {shown(values[key])} is not supported: it is no object",
                    f"expected an object whose rope_type is one of {', '.join(ROPE_TYPES)}",
                )
            )
    rope = rope_settings(values)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            lines(
                f"{origin}: rope type {shown(kind)} is not supported",
                f"expected one of {', '.join(ROPE_TYPES)}",
            )
        )
    _check_one_for_all(values, rope, origin)
    theta = rope if "rope_theta" in rope else {"rope_theta": values.get("rope_theta", 10000.0)}
    _Numbers(theta, origin).number("rope_theta", above=1)
    if kind == "default":
        _check_plain(rope, origin)
        return Rope(kind=kind)
    given = _Numbers(rope, origin)
    factor = given.number("factor", least=1, optional=kind == "longrope")
    original = None
    if kind not in ("linear", "dynamic"):
        # As in transformers, the config's own key wins over the one among the rope's parameters.
        outside = "original_max_position_embeddings" in values
        original = (_Numbers(values, origin) if outside else given).number(
            "original_max_position_embeddings", above=1, optional=not outside
        )
    _check_parameters(kind, given, head_dim)
    # The longest sequence is what vLLM takes for it, too.
    stretched = {"linear": positions, "dynamic": positions, "yarn": original or positions}.get(kind)
    if stretched is None or factor is None:
        return Rope(kind=kind)
    return Rope(kind=kind, reach=int(stretched * factor))


def _check_plain(rope: Mapping[str, Any], origin: str) -> None:
    """Refuse numbers of a scaling where there is none."""
    scaling = next((key for key in _OF_SCALING if rope.get(key) not in (None, 1)), None)
    if scaling is not None:
        said = "default" if "rope_type" in rope or "type" in rope else "missing"
        raise CheckpointError(
            lines(
                f"{origin}: rotary settings have {scaling} {shown(rope[scaling])}, "
                f"and rope_type is {said}",
                f"expected the rope_type that it is for, one of {', '.join(ROPE_TYPES[1:])}",
            )
        )


def _check_one_for_all(values: Mapping[str, Any], rope: Mapping[str, Any], origin: str) -> None:
    """Refuse what differs between layers, axes or parts of a head."""
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise CheckpointError(
            lines(
                f"{origin}: rotary embedding differs between layers: {shown(sorted(rope))}",
                "expected one for all",
            )
        )
    if rope.get("mrope_section") is not None:
        raise CheckpointError(
            lines(
                f"{origin}: mrope_section {shown(rope['mrope_section'])} is not supported",
                "expected a text model",
            )
        )
    for place in (values, rope):
        part = place.get("partial_rotary_factor")
        if part not in (None, 1) or isinstance(part, bool):
            raise CheckpointError(
                lines(
                    f"{origin}: partial_rotary_factor {shown(part)} is not supported",
                    "expected 1: every head is rotated whole",
                )
            )


def _check_parameters(kind: str, given: _Numbers, head_dim: int) -> None:
    """Refuse numbers that this type of rotary embedding cannot work with."""
    if kind == "llama3":
        low = given.number("low_freq_factor", above=0)
        given.number("high_freq_factor", above=low or 0)
    elif kind == "yarn":
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            given.number(name, least=0, optional=True)
    elif kind == "longrope":
        given.number("attention_factor", least=0, optional=True)
        for name in ("short_factor", "long_factor"):
            given.numbers(name, head_dim // 2)
    elif kind == "dynamic" and given.rope.get("alpha") is not None:
        raise CheckpointError(
            lines(
                f"{given.origin}: rope type 'dynamic' with alpha {shown(given.rope['alpha'])} is "
                "not supported",
                "expected a factor alone, as transformers' models of this type have it",
            )
        )
    elif kind == "dynamic" and head_dim <= 2:
        raise CheckpointError(
            lines(
                f"{given.origin}: head_dim is {head_dim}",
                "expected more than 2 for rope type 'dynamic'",
            )
        )


@dataclass(frozen=True)
class _Numbers:
    """Numbers of a rope's parameters, checked."""

    rope: Mapping[str, Any]
    origin: str

    def number(
        self,
        name: str,
        *,
        least: float = -math.inf,
        above: float = -math.inf,
        optional: bool = False,
    ) -> float | None:
        """A number within bounds; None if it is optional and not there."""
        value: Any = self.rope.get(name)
        if value is None and optional:
            return None
        if not (_is_number(value) and value >= least and value > above):
            bound = f"of at least {least:g}" if math.isfinite(least) else f"above {above:g}"
            raise CheckpointError(
                lines(
                    f"{self.origin}: {name} is {shown(value)}",
                    f"expected a number {bound}, for rotary embedding",
                )
            )
        return float(value)

    def numbers(self, name: str, count: int) -> None:
        """Refuse what is no list of so many numbers above 0."""
        value = self.rope.get(name)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
            raise CheckpointError(
                lines(
                    f"{self.origin}: {name} is {shown(value)}",
                    f"expected a list of {count} numbers, half of head_dim",
                )
            )
        for each in value:
            if not (_is_number(each) and each > 0):
                raise CheckpointError(
                    lines(f"{self.origin}: {name} holds {shown(each)}", "expected numbers above 0")
                )


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < 1e18  # not so for NaN, too
