"""The numbers that lie on a device, in the checkpoint's terms: which heads, rows and columns they are, and which are zeros that fill up."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ..plan import heads
from ..plan.placement import Blocks
from ..sharded.layout import runs

Span = tuple[int, int]
"""First element of a stretch of a dim, and one past its last."""
Slices = tuple[Span, ...]
"""A part of a tensor: a span of every dim."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Elements of a dim of a device's part.

    Attributes:
        at: where they stand in the laid-out tensor.
        source: where in the checkpoint's; None for zeros that fill up.
    """

    at: Span
    source: Span | None


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads in a device's part.

    Attributes:
        kind: whose numbers they are.
        held: the checkpoint's number of each, in order; None for a zero head.
        repeated: those of them that stand in several places of the laid-out tensor.
        whole: the part cuts through none.
    """

    kind: Literal["query", "KV"]
    held: tuple[int | None, ...]
    repeated: tuple[int, ...]
    whole: bool


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a device holds of a tensor.

    Attributes:
        slices: in the laid-out tensor.
        checkpoint: every dim of it in the checkpoint's terms; None where the tensor has not the planned shape.
        heads: None where no dim is made of heads.
        minimum, maximum, mean: of the finite numbers in the part; None without any.
        zero_share: of all numbers, from 0 to 1.
        non_finite: infinities and NaNs.
        sha256: of the part's bytes: equal parts have equal ones.
    """

    name: str
    device: int
    slices: Slices
    bytes: int
    checkpoint: tuple[tuple[Stretch, ...], ...] | None
    heads: Heads | None
    minimum: float | None
    maximum: float | None
    mean: float | None
    zero_share: float
    non_finite: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """An entry of `details` in the document of `--json`."""
        return asdict(self)


def shown_slices(slices: Slices) -> str:
    """`[0:48, 0:32]`."""
    return f"[{', '.join(f'{first}:{last}' for first, last in slices)}]"


def content(
    name: str,
    device: int,
    slices: Slices,
    shard: torch.Tensor,
    blocks: Blocks | None,
    *,
    known: bool,
) -> Content:
    """Read a device's part.

    Args:
        shard: the part, on the host.
        blocks: how a dim of the laid-out tensor is made from the checkpoint's, if one is.
        known: the tensor has the planned shape, so that the plan's blocks describe it.
    """
    finite = shard[torch.isfinite(shard)].double()
    return Content(
        name=name,
        device=device,
        slices=slices,
        bytes=shard.numel() * shard.element_size(),
        checkpoint=tuple(_stretches(dim, span, blocks) for dim, span in enumerate(slices))
        if known
        else None,
        heads=_heads(slices, blocks) if known else None,
        minimum=finite.min().item() if len(finite) else None,
        maximum=finite.max().item() if len(finite) else None,
        mean=finite.mean().item() if len(finite) else None,
        zero_share=1 - int(shard.count_nonzero()) / shard.numel(),
        non_finite=shard.numel() - len(finite),
        sha256=hashlib.sha256(
            shard.contiguous().flatten().view(torch.uint8).numpy().data
        ).hexdigest(),
    )


def _stretches(dim: int, span: Span, blocks: Blocks | None) -> tuple[Stretch, ...]:
    if blocks is None or blocks.dim != dim:
        return (Stretch(at=span, source=span),)
    found, at = [], span[0]
    for start, length in runs(blocks.sources, span[0], span[1] - span[0], blocks.block):
        found.append(
            Stretch(
                at=(at, at + length),
                source=None if start == heads.EMPTY else (start, start + length),
            )
        )
        at += length
    return tuple(found)


def _heads(slices: Slices, blocks: Blocks | None) -> Heads | None:
    if blocks is None or blocks.heads is None:
        return None
    first, last = slices[blocks.dim]
    held = [
        None if source == heads.EMPTY else source
        for source in blocks.sources[first // blocks.block : math.ceil(last / blocks.block)]
    ]
    repeated = sorted(
        {head for head in held if head is not None and blocks.sources.count(head) > 1}
    )
    whole = first % blocks.block == 0 and last % blocks.block == 0
    return Heads(kind=blocks.heads, held=tuple(held), repeated=tuple(repeated), whole=whole)


def faults(
    contents: Sequence[Content], shards: Sequence[torch.Tensor], source_shape: tuple[int, ...]
) -> Iterator[str]:
    """Put the checkpoint's tensor together again from all parts, and say where two of them disagree, to the bit, or something is missing."""
    if any(content.checkpoint is None for content in contents):
        return
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[shards[0].element_size()]
    whole, holder = (
        torch.zeros(source_shape, dtype=bits),
        torch.full(source_shape, -1, dtype=torch.int16),
    )
    for content, shard in zip(contents, shards, strict=True):
        padding = 0
        for piece in itertools.product(*(content.checkpoint or ())):
            local = tuple(
                slice(s.at[0] - first, s.at[1] - first)
                for s, (first, _) in zip(piece, content.slices, strict=True)
            )
            sources = [s.source for s in piece if s.source is not None]
            if len(sources) < len(piece):
                padding += int(shard[local].count_nonzero())
                continue
            place = tuple(slice(*source) for source in sources)
            values = shard[local].contiguous().view(bits)
            other = (holder[place] >= 0) & (values != whole[place])
            if other.any():
                yield f"device {content.device} holds other values than device {int(holder[place][other][0])} for the same elements"
            whole[place], holder[place] = values, content.device
        if padding:
            yield f"device {content.device} holds {padding} numbers other than zero where the plan fills up with zeros"
    if (holder < 0).any():
        yield f"{int((holder < 0).sum())} of the checkpoint's elements lie on no device"
