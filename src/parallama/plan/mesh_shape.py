"""The shape of a device mesh: an ordered mapping from axis name to size. Pure data, no devices."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from ..errors import FitError, UsageError, lines, shown

DATA = "data"
MODEL = "model"
AXES = (DATA, MODEL)
"""The axes of every mesh, outermost first: devices that follow each other differ in the last."""
_ALIASES = {"batch": DATA, "dp": DATA, "tp": MODEL}
_NAMES = f"{DATA!r} (alias 'batch') or {MODEL!r}"


def axis_name(name: str) -> str:
    """The canonical name of a mesh axis (`batch`, as some guides call it, is `data`).

    Raises:
        UsageError: no axis has this name.
    """
    canonical = _ALIASES.get(name, name)
    if canonical not in AXES:
        raise UsageError(lines(f"unknown mesh axis {name!r}", f"expected {_NAMES}"))
    return canonical


class MeshShape(dict[str, int]):
    """How many devices each axis has; it cannot be changed.

    It maps every axis, in the order of `AXES`, to its size. Devices are numbered row by row: the
    last axis changes fastest.

    Args:
        sizes: axis name to size, or such pairs; axes that are not named have size 1.
        **more: the same, by keyword.

    Raises:
        UsageError: an axis is unknown or named twice, or a size is no whole number of at least 1.

    Example:
        >>> MeshShape(data=2, model=4).coordinates(5)
        {'data': 1, 'model': 1}
    """

    def __init__(
        self, sizes: Mapping[str, int] | Iterable[tuple[str, int]] = (), /, **more: int
    ) -> None:
        given: dict[str, Any] = {}
        for name, size in (*dict(sizes).items(), *more.items()):
            axis = axis_name(name)
            if axis in given:
                raise UsageError(lines(f"mesh axis {axis!r} is named twice", "expected it once"))
            if type(size) is not int or size < 1:
                raise UsageError(
                    lines(
                        f"mesh axis {axis!r} has size {shown(size)}",
                        "expected a whole number of at least 1",
                    )
                )
            given[axis] = size
        super().__init__({axis: given.get(axis, 1) for axis in AXES})

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a mesh shape cannot be changed")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return MeshShape, (dict(self),)

    def __repr__(self) -> str:
        return f"MeshShape({', '.join(f'{axis}={size}' for axis, size in self.items())})"

    def __str__(self) -> str:
        return "x".join(map(str, self.values()))

    @property
    def data(self) -> int:
        """Size of the axis "data"."""
        return self[DATA]

    @property
    def model(self) -> int:
        """Size of the axis "model"."""
        return self[MODEL]

    @property
    def devices(self) -> int:
        return math.prod(self.values())

    def size(self, axis: str | None) -> int:
        """Devices along one axis; 1 for `None`, an unsplit dim."""
        return 1 if axis is None else self[axis]

    def coordinates(self, device: int) -> dict[str, int]:
        """Where a device is along every axis."""
        found: dict[str, int] = {}
        for axis, size in reversed(self.items()):
            device, found[axis] = divmod(device, size)
        return {axis: found[axis] for axis in self}

    def device(self, coordinates: Mapping[str, int]) -> int:
        """The number of the device at these coordinates; 0 along axes that are not named."""
        number = 0
        for axis, size in self.items():
            number = number * size + coordinates.get(axis, 0)
        return number

    def local_slices(
        self, shape: Sequence[int], axes: Sequence[str | None], device: int
    ) -> tuple[slice, ...]:
        """Which part of a tensor a device holds.

        Args:
            shape: of the whole tensor.
            axes: for every dim the mesh axis it is split over, or None.

        Raises:
            FitError: a dim does not divide over its axis.
        """
        at = self.coordinates(device)
        slices = []
        for size, axis in zip(shape, axes, strict=True):
            parts, place = (1, 0) if axis is None else (self[axis], at[axis])
            if size % parts:
                raise FitError(
                    lines(
                        f"a dim of size {size} does not divide over axis {axis!r} ({parts} devices)"
                    )
                )
            step = size // parts
            slices.append(slice(place * step, (place + 1) * step))
        return tuple(slices)

    def first_holders(self, axes: Collection[str | None]) -> Iterator[int]:
        """For every distinct part of a tensor split over `axes` the first device that holds it."""
        split = [axis for axis in self if axis in axes]
        for places in itertools.product(*(range(self[axis]) for axis in split)):
            yield self.device(dict(zip(split, places, strict=True)))

    def holders(self, axes: Collection[str | None]) -> tuple[int, ...]:
        """For every device the first that holds the same part of a tensor split over `axes`."""
        found = []
        for number in range(self.devices):
            at = self.coordinates(number)
            found.append(self.device({axis: at[axis] for axis in at if axis in axes}))
        return tuple(found)

    def groups(self, *axes: str) -> list[list[int]]:
        """The devices that take part together in a collective along these axes."""
        together: dict[tuple[int, ...], list[int]] = {}
        for number in range(self.devices):
            elsewhere = tuple(
                place for axis, place in self.coordinates(number).items() if axis not in axes
            )
            together.setdefault(elsewhere, []).append(number)
        return list(together.values())

    @classmethod
    def parse(cls, text: str | MeshShape | tuple[int, ...] | int) -> MeshShape:
        """Read `1x8` (data x model), `data=2,model=4`, `(2, 4)`, or `8` (all on "model").

        Numbers without names are sizes of the last axes.

        Raises:
            UsageError: the text is none of these.
        """
        if isinstance(text, MeshShape):
            return text
        if isinstance(text, int) and not isinstance(text, bool):
            return cls({MODEL: text})
        if isinstance(text, tuple) and 1 < len(text) <= len(AXES):
            return cls(zip(AXES[-len(text) :], text, strict=True))
        text = str(text).strip()
        numbers = re.split(r"\s*[xX×*,]\s*", text)
        if len(numbers) <= len(AXES) and all(re.fullmatch(r"\d{1,6}", each) for each in numbers):
            return cls(zip(AXES[-len(numbers) :], map(int, numbers), strict=True))
        if re.fullmatch(r"\w+=\d{1,6}(\s*,\s*\w+=\d{1,6})*", text):
            return cls(_named_sizes(text))
        raise UsageError(
            lines(
                f"mesh {shown(text)} cannot be read",
                f"expected {' x '.join(AXES)}, as 1x8 or 2x4, or names, as data=2,model=4",
            )
        )


def _named_sizes(text: str) -> dict[str, int]:
    """`data=2,model=4`."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        axis = axis_name(name)
        if axis in sizes:
            raise UsageError(lines(f"mesh {text!r} names axis {axis!r} twice"))
        sizes[axis] = int(size)
    return sizes
