"""The likeliest tokens of a place, on the devices, where the vocabulary stays split over them.

Each device finds its own best ones, one a round, and the best of those are taken. Rounds are as
many as a row asks for; where none does, nothing is computed or exchanged.

Shapes, of a device's own part: `B` rows, `W` ids; `N` tokens that can be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...plan.mesh_shape import DATA, MODEL
from ...plan.program_shapes import MOST_TOP
from .branches import when
from .mesh import DeviceMesh
from .sampling import first_best, own_logits
from .scopes import scope
from .while_loops import repeat


def top_tokens(
    mesh: DeviceMesh,
    logits: torch.Tensor,
    vocab: int,
    normaliser: torch.Tensor,
    wanted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens of each row, best first; of equal ones the smallest id.

    Args:
        logits: `[B, V]`, split over "model"; ids from `vocab` on are padding.
        normaliser: `[B, 2]`, see `sampling.Chosen`.
        wanted: `[B]` int32, how many tokens each row asks for.

    Returns:
        Ids `[B, N]` int32 and log-probabilities `[B, N]` fp32. Those behind the most that any row
        asks for mean nothing.
    """
    batch, parts = len(logits), mesh.shape.model
    with scope("sampling.top_logprobs"):
        raw, ids = own_logits(mesh, logits, vocab)
        wanted = mesh.enter_manual(wanted, (DATA,))
        part = mesh.enter_manual(
            torch.arange(parts, device=logits.device, dtype=torch.int32), (MODEL,)
        )

        def found(
            given: Sequence[torch.Tensor], state: Sequence[torch.Tensor]
        ) -> Sequence[torch.Tensor]:
            raw, ids, wanted, part = given
            rounds = wanted.amax(0)
            best, places = _largest(mesh, raw, rounds)
            tokens = places + ids[:1]
            if parts == 1:
                return [tokens, best]
            # A sum with zeros of the others puts every device's part beside its neighbours'.
            here = (torch.arange(parts, device=raw.device, dtype=torch.int32) == part)[:, None]
            tokens = torch.where(here, tokens[:, None], torch.zeros_like(tokens[:, None]))
            best = torch.where(here, best[:, None], torch.zeros_like(best[:, None]))
            tokens = mesh.all_reduce(tokens, MODEL).flatten(1)
            best, places = _largest(mesh, mesh.all_reduce(best, MODEL).flatten(1), rounds)
            return [torch.gather(tokens, 1, places.long()).to(torch.int32), best]

        blank = torch.zeros(len(raw), MOST_TOP, device=raw.device)
        start = [blank.to(torch.int32), blank]
        tokens, best = when(mesh, (wanted > 0).any(), found, [raw, ids, wanted, part], start)
        axes, shape = (DATA, None), (batch, MOST_TOP)
        best = mesh.leave_manual(best, axes, shape) - normaliser[:, :1] - normaliser[:, 1:]
        return mesh.leave_manual(tokens, axes, shape), best


def top_tokens_of_places(
    mesh: DeviceMesh,
    logits: torch.Tensor,
    vocab: int,
    normaliser: torch.Tensor,
    wanted: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """`top_tokens` of each position, `[B, S, N]`, by their names.

    Args:
        logits: `[B, S, V]`.
        normaliser: `[B, S, 2]`.
        wanted: `[B]`, of all positions of a row.
    """
    batch, length, width = logits.shape
    flat = mesh.mark(logits.reshape(batch * length, width), (DATA, MODEL))
    each = mesh.mark(wanted[:, None].expand(batch, length).reshape(-1), (DATA,))
    over = mesh.mark(normaliser.reshape(-1, 2), (DATA, None))
    ids, logprobs = top_tokens(mesh, flat, vocab, over, each)
    shape, axes = (batch, length, MOST_TOP), (DATA, None, None)
    found = {"prompt_top_ids": ids, "prompt_top_logprobs": logprobs}
    return {name: mesh.mark(tensor.reshape(shape), axes) for name, tensor in found.items()}


def _largest(
    mesh: DeviceMesh, scores: torch.Tensor, rounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row of scores, `[B, N]`, and their places, as many as there are rounds.

    Of equal ones the first comes first. Behind the last one follow infinitely small ones.
    """

    def next_one(
        number: torch.Tensor, given: Sequence[torch.Tensor], state: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        (scores,), (best, places, last, at) = given, state
        numbers = torch.arange(scores.shape[1], device=scores.device, dtype=torch.int32)
        smaller = (scores < last) | ((scores == last) & (numbers > at))
        left = torch.where(smaller, scores, torch.full_like(last, -torch.inf))
        place, top = first_best(mesh, left)
        column = torch.arange(best.shape[1], device=scores.device, dtype=torch.int32) == number
        place, top = place[:, None], top[:, None]
        return [torch.where(column, top, best), torch.where(column, place, places), top, place]

    best = torch.zeros(len(scores), MOST_TOP, device=scores.device)
    places = best.to(torch.int32)
    last = torch.full((len(scores), 1), torch.inf, device=scores.device)
    at = torch.full_like(last, -1, dtype=torch.int32)
    best, places, _, _ = repeat(mesh, rounds, next_one, [scores], [best, places, last, at])
    return best, places
