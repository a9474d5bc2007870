"""What an optimized HLO module says of itself: its collectives, which outputs take over which inputs' buffers, and what it copies. Pure text in, data out.

The text is what XLA writes for `--xla_dump_hlo_as_text` after its last pass. With torch-xla's debug metadata every instruction carries the scopes in which it was traced,
and those are module names here (see `ops.scope`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "bf16": 16,
}  # the others end in theirs: f32, s64, u8, f8e4m3fn
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][\w-]*)\((?P<rest>.*)$"
)
_SCOPE_COUNT = re.compile(r"\.\d+$")


@dataclass(frozen=True, kw_only=True)
class Array:
    """One array of an instruction's result, on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _bits(self.dtype) // 8


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: as `dot`; of an asynchronous pair only the start is given, without `-start`.
        results: the arrays of its result; several where it is a tuple.
        operands: names of the instructions that it reads.
        computation: the computation it stands in.
        entry: that is the entry computation, not one called from it.
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
        found = (i for i in self.instructions if i.entry and i.opcode == "parameter")
        return {int(i.text.split(" parameter(")[1].split(")")[0]): i for i in found}

    def of(self, *opcodes: str) -> list[Instruction]:
        """The instructions of some kinds, in any computation."""
        return [i for i in self.instructions if i.opcode in opcodes]

    def next_of(self, start: Instruction, opcode: str) -> Instruction | None:
        """The first instruction of a kind that reads what `start` makes, at once or through others of the same computation."""
        within = [i for i in self.instructions if i.computation == start.computation]
        reached = {start.name}
        for each in within[within.index(start) + 1 :]:  # instructions stand after what they read
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
        ValueError: the text is no HLO module.
    """
    header, _, body = text.partition("\n")
    if not header.startswith("HloModule "):
        raise ValueError("the text does not begin with HloModule")
    return Module(aliases=_aliases(header), instructions=tuple(_instructions(body)))


def replica_groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of devices that a collective's line names: `{{0,1},{2,3}}`, `[2,4]<=[8]` or `[4,2]<=[2,4]T(1,0)`; pairs of a permute become the groups that they connect.

    Args:
        devices: how many there are; an empty list stands for all of them together.
    """
    if match := re.search(r"source_target_pairs={({.*?})}", text):
        return _connected(re.findall(r"{(\d+),(\d+)}", match[1]))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(int(match[1]), int(match[2]), [int(n) for n in match[3].split(",")], match[4])
    if match := re.search(r"replica_groups={((?:{[\d,]*},?)*)}", text):
        groups = tuple(
            tuple(int(n) for n in group.split(",")) for group in re.findall(r"{([\d,]+)}", match[1])
        )
        return groups or (tuple(range(devices)),)
    return (tuple(range(devices)),)


def _iota(
    count: int, size: int, dims: list[int], permutation: str | None
) -> tuple[tuple[int, ...], ...]:
    """XLA's short form: all numbers in a grid of `dims`, transposed, cut into `count` groups."""
    order = [int(n) for n in permutation.split(",")] if permutation else list(range(len(dims)))
    strides = [math.prod(dims[at + 1 :]) for at in range(len(dims))]
    numbers = [0]
    for axis in order:
        numbers = [
            number + step * strides[axis] for number in numbers for step in range(dims[axis])
        ]
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
    return (
        {
            int(out or 0): int(number)
            for out, number in re.findall(r"{(\d*)}: \((\d+), {}", match[1])
        }
        if match
        else {}
    )


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
        arrays = tuple(
            Array(dtype=dtype, shape=_dims(dims)) for dtype, dims in _ARRAY.findall(match["shape"])
        )
        opcode = match["opcode"]
        if opcode.endswith("-start"):
            opcode = opcode.removesuffix("-start")
            arrays = arrays[
                len(arrays) // 2 :
            ]  # an asynchronous start carries its operands as well
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


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",")) if text else ()


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    assert digits is not None, dtype
    return int(digits[1])


def _scope(line: str) -> str:
    """`model.1/model.layers.0.2/model.layers.0.mlp.5/aten__mul` -> `model.layers.0.mlp`: torch-xla numbers every entry of a scope."""
    match = re.search(r'op_name="([^"]*)"', line)
    parts = [part for part in match[1].split("/") if "__" not in part] if match else []
    return _SCOPE_COUNT.sub("", parts[-1]) if parts else ""
