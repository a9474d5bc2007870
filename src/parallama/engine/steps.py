"""The functional steps of inference by name: what goes in, what comes out, how it is split. Pure.

A step maps named device tensors to named device tensors. The state of a batch goes in and comes out
under the same names:

- `token` `[B]` int64, the last chosen token; `logprob` `[B]` fp32;
- `position` `[B]` int32, where the next token will be written; `done` `[B]` bool;
- `cache.key.L`, `cache.value.L` `[B, K, T, D]`, the KV cache of layer `L`;
- `counts` `[B, V]` int32, for each token id twice how often it was chosen, plus 1 if the prompt
  has it;
- `span` `[1]` int32, positions of the longest row, only where rotary frequencies follow it.

The steps:

- `prefill` runs a chunk of each row's prompt: `ids` `[B, S]` int64 from the position `start` `[B]`
  int32, of which the first `count` `[B]` int32 are the row's. Rows whose prompt ends in it, `final`
  `[B]` bool, choose a token. It takes `eos` int64, ids that end a row (-1: none), and `PARAMS`.
- `decode` runs every row's last token and chooses another; rows that are done keep their state. It
  takes `eos` and `PARAMS`, and gives `logits` `[B, V]` fp32 where they are asked for.
- `grow` gives the cache with more positions. It takes nothing else.
- `slot_prefill`, `slot_decode` and `slot_copy` run on a cache whose rows are slots. The state has
  no `done`. `slot_decode` runs the first `R` slots, of every data shard as many, and those that are
  `live` `[B]` bool choose a token. `slot_prefill` writes a chunk into the slot `slot` `[P]` int32
  of each of the `P` data shards: its arguments are those of `prefill`, of `P` rows; a `count` of 0
  leaves a shard's slots as they are, but for what is behind a slot's position. `slot_copy` copies
  the slot `source` `[P]` int32 of each shard to `target` `[P]`. Slots are counted on their shard.
- `logits` runs texts at once, without a state: `ids` from `start` to `logits` `[B, S, V]` fp32,
  split over `LOGITS_AXES`.
- `score` does, too: with `targets` `[B, S]` int64, the token that is to follow at each position, to
  `logprobs` `[B, S]` fp32 and `greedy` `[B, S]` bool, whether it is the best one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..plan.mesh_shape import DATA, MODEL

SPAN = "span"
"""Name of a `[1]` int32: one more than the largest position in the batch."""
CACHE_AXES = (DATA, MODEL, None, None)
LOGITS_AXES = (DATA, None, MODEL)
"""Of the step `logits`, which gives them for every position."""
STATE_AXES: dict[str, tuple[str | None, ...]] = {
    "token": (DATA,),
    "logprob": (DATA,),
    "position": (DATA,),
    "done": (DATA,),
    "counts": (DATA, MODEL),
    "logits": (DATA, MODEL),
    "ids": (DATA, None),
    "targets": (DATA, None),
    "logprobs": (DATA, None),
    "greedy": (DATA, None),
    "start": (DATA,),
    "count": (DATA,),
    SPAN: (None,),
    "final": (DATA,),
    "eos": (None,),
    "temperature": (DATA,),
    "top_k": (DATA,),
    "top_p": (DATA,),
    "min_p": (DATA,),
    "penalty": (DATA,),
    "seed": (DATA,),
    "prompted": (DATA, MODEL),
    "live": (DATA,),
    "slot": (DATA,),
    "source": (DATA,),
    "target": (DATA,),
}
SLOT_STATE = ("token", "logprob", "position", "counts")
"""What each slot has besides its row of the cache."""
PARAMS = ("temperature", "top_k", "top_p", "min_p", "penalty", "seed")
"""Sampling parameters, `[B]` each: `top_k` and `seed` int32, the others fp32."""


def cache_names(layers: int) -> list[str]:
    """Names of a cache's tensors as program arguments."""
    return [f"cache.{kind}.{layer}" for layer in range(layers) for kind in ("key", "value")]


@dataclass(frozen=True, kw_only=True)
class StepKey:
    """What makes a program of its own.

    Attributes:
        kind: the step.
        batch: `B`, rows over all devices.
        length: `T`, positions of the cache.
        rows: slots that a `slot_decode` runs; 0 for other steps.
        new: `S`, positions of a prefill; 1 for decode; for grow the cache length it ends with.
        fresh: a prefill into an empty cache.
        scored: a decode that also gives the logits it chose from, as `logits` `[B, V]` fp32.
    """

    kind: Literal[
        "prefill", "decode", "grow", "logits", "score", "slot_prefill", "slot_decode", "slot_copy"
    ]
    batch: int
    length: int
    rows: int = 0
    new: int = 1
    fresh: bool = False
    scored: bool = False

    def parts(self) -> Mapping[str, object]:
        return {
            name: getattr(self, name)
            for name in ("kind", "batch", "length", "rows", "new", "fresh", "scored")
        }
