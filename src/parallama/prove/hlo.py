"""Reads an optimized HLO module: its collectives, the buffers that its outputs take over, and what
it copies. Pure.

The text is what XLA writes for `--xla_dump_hlo_as_text` after its last pass. Every instruction
names the scopes in which it was traced: the model's modules (see `ops.scope`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import RunError, lines, shown

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# In the names of other dtypes the first number is their bits, as in f32, s64 and f8e4m3fn.
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = "
    r"(?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][\w-]*)\((?P<rest>.*)$"
)
_SCOPE_COUNT = re.compile(r"\.\d+$")


@dataclass(frozen=True, kw_only=True)
class Array:
    """One array of an instruction's result, on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size.

        Raises:
            RunError: the dtype's name doesn't tell its bits.
        """
        return math.prod(self.shape) * _bits(self.dtype) // 8


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: as `dot`. Of an asynchronous pair only the start is there, without `-start`.
        results: the arrays of its result; several where it is a tuple.
        operands: names of the instructions that it reads.
        computation: the computation that it is in.
        entry: that is the entry computation, not one that is called from it.
        scope: the innermost module in which it was traced, or "".
        text: the whole line.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    computation: str
    entry: bool
    scope: str
    text: str

    @property
    def bytes(self) -> int:
        """Of its results, on one device."""
        return sum(array.bytes for array in self.results)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of its first result, on one device; None where it has none."""
        return self.results[0].shape if self.results else None


@dataclass(frozen=True, kw_only=True)
class Module:
    """An optimized HLO module.

    Attributes:
        aliases: output number -> number of the parameter whose buffer it takes over.
        instructions: all of them, computation by computation.
    """

    aliases: dict[int, int]
    instructions: tuple[Instruction, ...]

    @property
    def parameters(self) -> dict[int, Instruction]:
        """The module's arguments by number."""
        found = (each for each in self.of("parameter") if each.entry)
        return {int(each.text.split(" parameter(")[1].split(")")[0]): each for each in found}

    def of(self, *opcodes: str) -> list[Instruction]:
        """The instructions with one of these opcodes, in any computation."""
        return [each for each in self.instructions if each.opcode in opcodes]

    def next_of(self, start: Instruction, opcode: str) -> Instruction | None:
        """The first instruction with this opcode that reads the result of `start`.

        It reads it directly, or through other instructions of the same computation.
        """
        within = [each for each in self.instructions if each.computation == start.computation]
        reached = {start.name}
        for each in within[within.index(start) + 1 :]:  # instructions come after what they read
            if not reached.isdisjoint(each.operands):
                if each.opcode == opcode:
                    return each
                reached.add(each.name)
        return None

    @property
    def collectives(self) -> list[Instruction]:
        return self.of(*COLLECTIVES)


def parse(text: str) -> Module:
    """Read an optimized HLO module.

    Raises:
        RunError: the text is no HLO module.
    """
    header, _, body = text.partition("\n")
    if not header.startswith("HloModule "):
        raise RunError(
            lines(
                f"a program's text does not begin with HloModule, but with {shown(header)}",
                "expected optimized HLO, as XLA writes it",
            )
        )
    return Module(aliases=_aliases(header), instructions=tuple(_instructions(body)))


def replica_groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of devices that a collective's line names.

    They are written as `{{0,1},{2,3}}`, `[2,4]<=[8]` or `[4,2]<=[2,4]T(1,0)`. The pairs of a
    permute become the groups that they connect.

    Args:
        devices: device count; an empty list stands for all of them together.
    """
    if match := re.search(r"source_target_pairs={({.*?})}", text):
        return _connected(re.findall(r"{(\d+),(\d+)}", match[1]))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(int(match[1]), int(match[2]), _numbers(match[3]), match[4])
    if match := re.search(r"replica_groups={((?:{[\d,]*},?)*)}", text):
        groups = tuple(tuple(_numbers(group)) for group in re.findall(r"{([\d,]+)}", match[1]))
        return groups or (tuple(range(devices)),)
    return (tuple(range(devices)),)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(
    count: int, size: int, dims: list[int], permutation: str | None
) -> tuple[tuple[int, ...], ...]:
    """XLA's short form: all numbers in a grid of `dims`, transposed, cut into `count` groups."""
    order = _numbers(permutation) if permutation else list(range(len(dims)))
    strides = [math.prod(dims[at + 1 :]) for at in range(len(dims))]
    numbers = [0]
    for axis in order:
        steps = [step * strides[axis] for step in range(dims[axis])]
        numbers = [number + step for number in numbers for step in steps]
    return tuple(tuple(numbers[group * size : (group + 1) * size]) for group in range(count))


def _connected(pairs: list[tuple[str, str]]) -> tuple[tuple[int, ...], ...]:
    groups: list[set[int]] = []
    for pair in pairs:
        joined = {int(number) for number in pair}
        for group in [group for group in groups if group & joined]:
            groups.remove(group)
            joined |= group
        groups.append(joined)
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def _aliases(header: str) -> dict[int, int]:
    match = re.search(r"input_output_alias={(.*?)}(?:, \w+=|$)", header)
    if match is None:
        return {}
    pairs = re.findall(r"{(\d*)}: \((\d+), {}", match[1])
    return {int(output or 0): int(parameter) for output, parameter in pairs}


def _instructions(body: str) -> Iterator[Instruction]:
    computation, entry = "", False
    for line in body.splitlines():
        if line.endswith("{") and " = " not in line.split("->")[0]:
            entry = line.startswith("ENTRY ")
            computation = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            continue
        match = _INSTRUCTION.match(line)
        if match is None or match["opcode"].endswith("-done"):
            continue
        opcode = match["opcode"]
        arrays = tuple(
            Array(dtype=dtype, shape=tuple(_numbers(dims)) if dims else ())
            for dtype, dims in _ARRAY.findall(match["shape"])
        )
        if opcode.endswith("-start"):
            opcode = opcode.removesuffix("-start")
            arrays = arrays[len(arrays) // 2 :]  # the first half are its operands
        operands = re.findall(r"%([\w.-]+)", match["rest"].split("), ")[0])
        yield Instruction(
            name=match["name"],
            opcode=opcode,
            results=arrays,
            operands=tuple(operands),
            computation=computation,
            entry=entry,
            scope=_scope(line),
            text=line,
        )


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    if digits is None:
        raise RunError(
            lines(
                f"a program has numbers of dtype {shown(dtype)}",
                "expected a name that tells its bits, as f32, s64 or f8e4m3fn",
            )
        )
    return int(digits[1])


def _scope(line: str) -> str:
    """The innermost module that an instruction was traced in.

    `model.1/model.layers.0.2/model.layers.0.mlp.5/aten__mul` is `model.layers.0.mlp`: torch-xla
    numbers every entry of a scope, and ends with operations.
    """
    match = re.search(r'op_name="([^"]*)"', line)
    if match is None:
        return ""
    parts = [part for part in match[1].split("/") if "__" not in part]
    return _SCOPE_COUNT.sub("", parts[-1]) if parts else ""
