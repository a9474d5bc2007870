"""How long requests may be on slots that a memory takes beside the weights. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import FitError, lines
from .cost import Memory, shown_bytes, slot_memory
from .fit import largest
from .placement import Plan
from .program_shapes import SLOT_CHUNKS, slot_length

UNKNOWN_LEN = 4096
"""Tokens of a request where nobody says how much memory there is."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory for weights and slots.

    Attributes:
        name: whose it is, in words.
        bytes: that may be taken.
        shared: by all devices; else each has so much.
    """

    name: str
    bytes: int
    shared: bool = False


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Requests that are to run at a time.

    Attributes:
        count: of them.
        itemsize: bytes of a number of weights and cache.
        chunk: most positions of a prompt at a time.
        room: what they may take; None where that isn't known.
    """

    plan: Plan
    count: int
    itemsize: int
    chunk: int = SLOT_CHUNKS[-1]
    room: Room | None = None

    def memory(self, tokens: int) -> Memory:
        """Bytes on each device with requests of up to so many tokens."""
        return slot_memory(
            self.plan,
            slots=self.count,
            length=slot_length(tokens, self.chunk),
            itemsize=self.itemsize,
            chunk=self.chunk,
        )

    def context(self, asked: int | None) -> int:
        """Most tokens of a request: as many as are asked for, or else as fit.

        Raises:
            FitError: they don't fit, or none do.
        """
        most = self.plan.model.max_positions
        if self.room is None:
            return asked or min(UNKNOWN_LEN, most)
        if asked is not None and self._fits(asked):
            return asked
        longest = largest(self._fits, most)
        if asked is not None or not longest:
            raise FitError(self._refusal(self.room, asked or 1, longest))
        return longest

    def said(self, tokens: int) -> str:
        """What requests of so many tokens take, in a line."""
        memory = self.memory(tokens)
        taken, weights = (
            shown_bytes(size * self._times) for size in (memory.kv + memory.state, memory.params)
        )
        slots = f"{self.count} slots take" if self.count > 1 else "1 slot takes"
        whose = "each device's memory" if self.room is None else self.room.name
        unknown = "; how much there is isn't known (--hardware)" if self.room is None else ""
        return (
            f"context of {tokens:,} tokens: {slots} {taken} of {whose},"
            f" weights {weights} (predicted){unknown}"
        )

    @property
    def _times(self) -> int:
        """Devices whose bytes count together."""
        return self.plan.mesh.devices if self.room is not None and self.room.shared else 1

    def _fits(self, tokens: int) -> bool:
        return self.room is None or self.memory(tokens).total * self._times <= self.room.bytes

    def _refusal(self, room: Room, asked: int, longest: int) -> str:
        needed = shown_bytes(self.memory(asked).total * self._times)
        fewer = largest(lambda count: replace(self, count=count)._fits(asked), self.count)
        instead = [f"--max-model-len {longest}"] if longest else []
        if fewer >= self.plan.mesh.data:
            instead.append(f"--max-num-seqs {fewer - fewer % self.plan.mesh.data}")
        requests = f"{self.count} requests" if self.count > 1 else "a request"
        return lines(
            f"{requests} of {asked:,} tokens on mesh {self.plan.mesh} would take {needed} of"
            f" {room.name}, of which {shown_bytes(room.bytes)} may be taken",
            f"what would fit: {' or '.join(instead)}" if instead else "nothing would fit",
            "" if instead else "use more devices along 'model', or a smaller --dtype",
        )
