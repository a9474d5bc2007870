"""Steps on a cache whose rows are slots: requests come and go in them while others decode.

A program has one shape whatever the slots hold: it decodes the first rows of the cache, or writes
a chunk of one prompt into the cache's row. What the cache has beyond the step's rows isn't read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ...plan.mesh_shape import DATA
from ..steps import CACHE_AXES, SLOT_PARAMS, SLOT_STATE, SPAN, StepKey
from .linear_products import shared_rows
from .ops import row_update, stretch
from .sampling import Chosen, counted
from .slot_rows import first_rows, picked, placed, with_first_rows
from .top_tokens import top_tokens

if TYPE_CHECKING:
    from .mesh import DeviceMesh
    from .steps import TorchXlaSteps

Given = Mapping[str, torch.Tensor]


def decode(steps: TorchXlaSteps, given: Given, key: StepKey) -> dict[str, torch.Tensor]:
    """One more token for each of the first rows that is `live`."""
    mesh = steps.mesh
    names = (*SLOT_STATE, "live", *SLOT_PARAMS, "bias")
    rows = {name: first_rows(mesh, name, given[name], key.rows) for name in names}
    live, position = rows["live"], rows["position"]
    few = shared_rows(mesh, steps.plan.model, key.length)
    # What a row that isn't live could see is not read either.
    start = torch.where(live, position, torch.zeros_like(position))
    first = torch.zeros(mesh.shape.data, dtype=torch.int32, device=live.device)
    hidden, cache = steps.hidden(
        rows["token"][:, None],
        position,
        caches(given),
        fresh=False,
        span=position + 1 if steps.follows_span else None,
        few=few,
        first_row=mesh.mark(first, (DATA,)),
        visible=start,
    )
    chosen, logits = steps.choose(hidden[:, 0], rows, position + 1, few)
    new = {
        "token": torch.where(live, chosen.token, rows["token"]),
        "logprob": torch.where(live, chosen.logprob, rows["logprob"]),
        "position": torch.where(live, position + 1, position),
    }
    out = {name: with_first_rows(mesh, name, given[name], new[name]) for name in new}
    out["counts"] = counted(given["counts"], mesh, new["token"], live)
    out |= _tops(steps, logits, chosen, torch.where(live, rows["tops"], 0))
    return steps.marked(out) | cache.buffers


def prefill(steps: TorchXlaSteps, given: Given, key: StepKey) -> dict[str, torch.Tensor]:
    """Write a chunk of a prompt into a slot of each data shard.

    A prompt that ends in it (`final`) gets its first token.
    """
    mesh, slot, start, count = steps.mesh, given["slot"], given["start"], given["count"]
    ids, final = given["ids"], given["final"]
    ends = torch.arange(ids.shape[1], device=ids.device)[None, :] == (count[:, None].long() - 1)
    hidden, cache = steps.hidden(
        ids,
        start,
        caches(given),
        fresh=False,
        span=given.get(SPAN),
        ends=None if key.scored else ends,
        first_row=slot,
    )
    row = {name: picked(mesh, name, given[name], slot) for name in SLOT_PARAMS}
    row |= {"counts": given["prompted"], "bias": given["bias"]}
    scored = {}
    if key.scored:
        scored = steps.scored(hidden, given["targets"], row["tops"])
        hidden = torch.where(ends[..., None], hidden, torch.zeros_like(hidden)).sum(1, True)
    position = start + count
    chosen, logits = steps.choose(hidden[:, 0], row, position)
    counts = counted(given["prompted"], mesh, chosen.token, final)
    new = {"token": chosen.token, "logprob": chosen.logprob, "counts": counts}
    out = {name: placed(mesh, name, given[name], new[name], slot, final) for name in new}
    out["position"] = placed(mesh, "position", given["position"], position, slot, count > 0)
    out |= _tops(steps, logits, chosen, torch.where(final, row["tops"], 0))
    return steps.marked(out | scored) | cache.buffers


def _tops(
    steps: TorchXlaSteps, logits: torch.Tensor, chosen: Chosen, wanted: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The likeliest tokens of each row."""
    vocab = steps.plan.model.vocab
    ids, logprobs = top_tokens(steps.mesh, logits, vocab, chosen.normaliser, wanted)
    return {"top_ids": ids, "top_logprobs": logprobs}


def copy(mesh: DeviceMesh, given: Given) -> dict[str, torch.Tensor]:
    """Copy a slot of each data shard, `source`, to another one, `target`, with all that it has."""
    source, target = given["source"], given["target"]
    out = {}
    for name, tensor in given.items():
        if name.startswith("cache."):
            own = mesh.enter_manual(tensor, CACHE_AXES)
            zero = mesh.enter_manual(
                torch.zeros(1, dtype=torch.int32, device=tensor.device), (None,)
            )
            place, to = (mesh.enter_manual(slot, (DATA,)).reshape(()) for slot in (source, target))
            row = stretch(own, place, 1, zero.reshape(()), own.shape[2])
            moved = row_update(own, row, to, zero)
            out[name] = mesh.leave_manual(moved, CACHE_AXES, tensor.shape)
        elif name in SLOT_STATE:
            out[name] = placed(mesh, name, tensor, picked(mesh, name, tensor, source), target)
    return out


def caches(given: Given) -> dict[str, torch.Tensor]:
    """The cache's tensors by name."""
    return {name: tensor for name, tensor in given.items() if name.startswith("cache.")}
