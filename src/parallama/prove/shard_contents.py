"""What a device's shard of a tensor holds, in the checkpoint's terms.

It says which heads, rows and columns of the checkpoint's tensor the shard holds, and which of its
elements are padding zeros.
"""

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
from .inspection import Slices, Span


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Neighbouring elements of a dim that come from one place.

    Attributes:
        at: their span in the laid-out tensor.
        source: their span in the checkpoint's; None for padding zeros.
    """

    at: Span
    source: Span | None


@dataclass(frozen=True, kw_only=True)
class ShardHeads:
    """The heads in a shard.

    Attributes:
        kind: whose they are.
        held: the checkpoint's number of each, in order; None for a zero head.
        repeated: those of them that the laid-out tensor holds in several places.
        whole: the shard holds no part of a head without the rest of it.
    """

    kind: Literal["query", "KV"]
    held: tuple[int | None, ...]
    repeated: tuple[int, ...]
    whole: bool


@dataclass(frozen=True, kw_only=True)
class ShardContent:
    """What a device holds of a tensor.

    Attributes:
        slices: the shard's place in the laid-out tensor.
        checkpoint: every dim of it in the checkpoint's terms; None where the tensor hasn't the
            planned shape.
        heads: None where no dim is made of heads.
        minimum, maximum, mean: of the finite numbers; None if there are none.
        zero_share: of all numbers, from 0 to 1.
        non_finite: how many are infinite or NaN.
        sha256: of the shard's bytes: equal shards have equal ones.
    """

    name: str
    device: int
    slices: Slices
    bytes: int
    checkpoint: tuple[tuple[Segment, ...], ...] | None
    heads: ShardHeads | None
    minimum: float | None
    maximum: float | None
    mean: float | None
    zero_share: float
    non_finite: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """An entry of `details` in the document of `--json`."""
        return asdict(self)


def read_shard(
    name: str,
    device: int,
    slices: Slices,
    shard: torch.Tensor,
    blocks: Blocks | None,
    *,
    as_planned: bool,
) -> ShardContent:
    """Describe a device's shard.

    Args:
        shard: its numbers, on the host.
        blocks: how a dim of the laid-out tensor is made from the checkpoint's, if one is.
        as_planned: the tensor has the planned shape, so that the plan's blocks describe it.
    """
    finite = shard[torch.isfinite(shard)].double()
    checkpoint = None
    if as_planned:
        checkpoint = tuple(_segments(dim, span, blocks) for dim, span in enumerate(slices))
    content = shard.contiguous().flatten().view(torch.uint8).numpy().data
    return ShardContent(
        name=name,
        device=device,
        slices=slices,
        bytes=shard.numel() * shard.element_size(),
        checkpoint=checkpoint,
        heads=_heads(slices, blocks) if as_planned else None,
        minimum=finite.min().item() if len(finite) else None,
        maximum=finite.max().item() if len(finite) else None,
        mean=finite.mean().item() if len(finite) else None,
        zero_share=1 - int(shard.count_nonzero()) / shard.numel(),
        non_finite=shard.numel() - len(finite),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _segments(dim: int, span: Span, blocks: Blocks | None) -> tuple[Segment, ...]:
    if blocks is None or blocks.dim != dim:
        return (Segment(at=span, source=span),)
    found, at = [], span[0]
    for start, length in runs(blocks.sources, span[0], span[1] - span[0], blocks.block):
        source = None if start == heads.EMPTY else (start, start + length)
        found.append(Segment(at=(at, at + length), source=source))
        at += length
    return tuple(found)


def _heads(slices: Slices, blocks: Blocks | None) -> ShardHeads | None:
    if blocks is None or blocks.heads is None:
        return None
    first, last = slices[blocks.dim]
    sources = blocks.sources[first // blocks.block : math.ceil(last / blocks.block)]
    real = {source for source in sources if source != heads.EMPTY}
    return ShardHeads(
        kind=blocks.heads,
        held=tuple(None if source == heads.EMPTY else source for source in sources),
        repeated=tuple(sorted(head for head in real if blocks.sources.count(head) > 1)),
        whole=first % blocks.block == 0 and last % blocks.block == 0,
    )


def shard_faults(
    contents: Sequence[ShardContent], shards: Sequence[torch.Tensor], source_shape: tuple[int, ...]
) -> Iterator[str]:
    """Put the checkpoint's tensor together again from all shards, and say what is wrong.

    Wrong are copies that differ in a bit, padding that is not zero, and elements that no device
    holds.
    """
    if any(content.checkpoint is None for content in contents):
        return
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[shards[0].element_size()]
    whole = torch.zeros(source_shape, dtype=bits)
    holder = torch.full(source_shape, -1, dtype=torch.int16)
    for content, shard in zip(contents, shards, strict=True):
        nonzero = 0
        for piece in itertools.product(*(content.checkpoint or ())):
            local = tuple(
                slice(segment.at[0] - first, segment.at[1] - first)
                for segment, (first, _) in zip(piece, content.slices, strict=True)
            )
            sources = [segment.source for segment in piece if segment.source is not None]
            if len(sources) < len(piece):
                nonzero += int(shard[local].count_nonzero())
                continue
            place = tuple(slice(*source) for source in sources)
            values = shard[local].contiguous().view(bits)
            differs = (holder[place] >= 0) & (values != whole[place])
            if differs.any():
                other = int(holder[place][differs][0])
                yield (
                    f"device {content.device} holds other values than device {other} "
                    "for the same elements"
                )
            whole[place], holder[place] = values, content.device
        if nonzero:
            yield (
                f"device {content.device} holds {nonzero} numbers other than zero "
                "where the plan fills up with zeros"
            )
    if (holder < 0).any():
        yield f"{int((holder < 0).sum())} of the checkpoint's elements are on no device"
