"""The shape of a device mesh: two named axes, `data` and `model`. Pure data, no devices."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from .errors import UsageError, lines, shown

DATA = "data"
MODEL = "model"
AXES = (DATA, MODEL)
_ALIASES = {"batch": DATA, "dp": DATA, "tp": MODEL}


def axis_name(name: str) -> str:
    """The canonical name of a mesh axis (`batch`, as some guides call it, is `data`).

    Raises:
        UsageError: no axis has this name.
    """
    canonical = _ALIASES.get(name, name)
    if canonical not in AXES:
        raise UsageError(lines(f"unknown mesh axis {name!r}", "expected 'data' (alias 'batch') or 'model'"))
    return canonical


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices lie along each axis; device `i` is at row `i // model`, column `i % model`."""

    data: int = 1
    model: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if type(size) is not int or size < 1:
                raise UsageError(lines(f"mesh axis {axis!r} has size {size!r}", "expected a whole number of at least 1"))

    @property
    def devices(self) -> int:
        return self.data * self.model

    def size(self, axis: str | None) -> int:
        """Devices along one axis; 1 for `None`, an unsplit dim."""
        return 1 if axis is None else int(getattr(self, axis))

    def coordinates(self, device: int) -> dict[str, int]:
        return {DATA: device // self.model, MODEL: device % self.model}

    def holders(self, axes: Collection[str | None]) -> tuple[int, ...]:
        """For every device the first one that holds the same part of a tensor that is split over `axes`."""
        by_row, by_column = (axis in axes for axis in AXES)
        return tuple(
            (device // self.model if by_row else 0) * self.model + (device % self.model if by_column else 0)
            for device in range(self.devices)
        )

    def __str__(self) -> str:
        return f"{self.data}x{self.model}"

    @classmethod
    def parse(cls, text: str | MeshShape | tuple[int, int] | int) -> MeshShape:
        """Read `1x8` (data x model), `data=2,model=4`, `(2, 4)`, or `8` (all on `model`).

        Raises:
            UsageError: the text is none of these.
        """
        if isinstance(text, MeshShape):
            return text
        if isinstance(text, int) and not isinstance(text, bool):
            return cls(model=text)
        if isinstance(text, tuple) and len(text) == 2:
            return cls(data=text[0], model=text[1])
        text = str(text).strip()
        if match := re.fullmatch(r"(\d{1,6})\s*[xX,]\s*(\d{1,6})", text):
            return cls(data=int(match[1]), model=int(match[2]))
        if re.fullmatch(r"\d{1,6}", text):
            return cls(model=int(text))
        if re.fullmatch(r"\w+=\d{1,6}(\s*,\s*\w+=\d{1,6})*", text):
            sizes: dict[str, int] = {}
            for part in text.split(","):
                name, _, size = part.strip().partition("=")
                if axis_name(name) in sizes:
                    raise UsageError(lines(f"mesh {text!r} names axis {axis_name(name)!r} twice"))
                sizes[axis_name(name)] = int(size)
            return cls(**sizes)
        raise UsageError(lines(f"mesh {shown(text)} cannot be read", "expected data x model, as 1x8 or 2x4, or names, as data=2,model=4"))
