"""Logits to token, on the devices, where the vocabulary stays split over them.

Each device reduces its own part, and only what comes of that is exchanged: for the pick one
candidate with its normaliser, for a threshold search a few partial sums a round. There is no sort
and no cap on `top_k`. One program serves every row: what no row of the batch asks for is skipped
while it runs.

Shapes, of a device's own part: `B` rows, `W` ids of the padded vocabulary `V`.
"""

# Top-k and top-p are threshold searches over the bits of the score (a 16-way radix select, 8
# rounds): the largest threshold that enough tokens, or enough mass, reach. Sampling is Gumbel-max
# (Gumbel 1954). The noise of a token is a hash of seed, position and token id, so the same seed
# gives the same text on every mesh and in every batch.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ...plan.mesh_shape import DATA, MODEL
from ..row_sampling import HIDDEN, signed32
from ..steps import PARAMS
from .attention_products import row_maximum
from .branches import when
from .mesh import DeviceMesh
from .ops import add_at, float_bits, whole_as_float, whole_of_float
from .scopes import scope
from .while_loops import repeat

_LOWEST, _HIGHEST = -(1 << 31), (1 << 31) - 1
_ROUNDS = 8
"""Of a threshold search: four bits each."""


class Chosen(NamedTuple):
    """What rows choose.

    Attributes:
        token: ids, `[B]` int64.
        logprob: `[B]` fp32, under the model's own distribution: before bias, penalties, temperature
            and truncation.
        normaliser: `[B, 2]` fp32, what a logit has over its log-probability: the largest logit,
            and what is left. Their sum would lose the second where logits are large.
    """

    token: torch.Tensor
    logprob: torch.Tensor
    normaliser: torch.Tensor


def choose(
    logits: torch.Tensor,
    mesh: DeviceMesh,
    vocab: int,
    given: Mapping[str, torch.Tensor],
    positions: torch.Tensor,
) -> Chosen:
    """Choose one token a row.

    Args:
        logits: `[B, V]`, split over "model"; ids from `vocab` on are padding and never chosen.
        given: with `counts` and what `steps.PARAMS` names, of all rows; and `bias` and `biased`,
            or neither.
        positions: `[B]` int32, the position that the chosen token will have.
    """
    device, parts = logits.device, mesh.shape.model
    batch = len(logits)
    raw, ids = own_logits(mesh, logits, vocab)
    rows = [mesh.enter_manual(given[name], (DATA,)) for name in PARAMS]
    params = dict(zip(PARAMS, rows, strict=True))
    counts = mesh.enter_manual(given["counts"], (DATA, MODEL))
    positions = mesh.enter_manual(positions.to(torch.int32), (DATA,))
    asked = (
        (params["temperature"] > 0)
        | (params["penalty"] != 1)
        | (params["presence"] != 0)
        | (params["frequency"] != 0)
    )
    bias = []
    if "bias" in given:
        biased = mesh.enter_manual(given["biased"], (DATA,))
        asked = asked | biased
        bias = [biased, mesh.enter_manual(given["bias"], (DATA, MODEL))]

    def adjusted(
        given: Sequence[torch.Tensor], state: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        raw, counts, ids, positions, *more = given
        rows, bias = more[: len(PARAMS)], more[len(PARAMS) :]
        params = dict(zip(PARAMS, rows, strict=True))
        scores = torch.where(bias[0][:, None], raw + bias[1], raw) if bias else raw
        scores = _penalised(scores, counts, params)
        warm = (params["temperature"] > 0).any()

        def perturbed(
            given: Sequence[torch.Tensor], state: Sequence[torch.Tensor]
        ) -> Sequence[torch.Tensor]:
            ids, positions, *rows = given
            params = dict(zip(PARAMS, rows, strict=True))
            with scope("sampling.truncation"):
                return [perturb(state[0], ids, mesh, params, positions)]

        (scores,) = when(mesh, warm, perturbed, [ids, positions, *rows], [scores])
        best, top = first_best(mesh, scores)
        chosen = ids[None, :] == (best + ids[:1])[:, None]
        zero = torch.zeros((), device=raw.device)
        return [best, top, torch.where(chosen, raw, zero).sum(-1)]

    best, top = first_best(mesh, raw)
    total = torch.exp(raw - top[:, None]).sum(-1)
    best, best_score, best_raw = when(
        mesh, asked.any(), adjusted, [raw, counts, ids, positions, *rows, *bias], [best, top, top]
    )
    # Of each device one small tensor is gathered: its candidate, the candidate's score and logit,
    # and its part of the normaliser.
    candidate = whole_as_float(best + ids[:1])
    found = torch.stack([candidate, best_score, best_raw, top, total], dim=-1)[:, None]
    split_axes = (DATA, MODEL, None)
    found = mesh.leave_manual(found, split_axes, (batch, parts, found.shape[-1]))
    found = mesh.resplit(found, split_axes, (DATA, None, None))
    token, score, raw_score, top, total = found.unbind(-1)
    winner = torch.arange(parts, device=device)[None, :] == score.argmax(-1, keepdim=True)
    zero = torch.zeros((), device=device)
    chosen = whole_of_float(torch.where(winner, token, zero).sum(-1))
    chosen_raw = torch.where(winner, raw_score, zero).sum(-1)
    peak = top.amax(-1)
    log_total = torch.log((total * torch.exp(top - peak[:, None])).sum(-1))
    normaliser = torch.stack([peak, log_total], dim=-1)
    return Chosen(chosen, chosen_raw - peak - log_total, normaliser)


def own_logits(
    mesh: DeviceMesh, logits: torch.Tensor, vocab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A device's own part of logits `[B, V]`, `[B, W]` fp32, padding hidden, and its ids `[W]`."""
    width = logits.shape[1]
    ids = _ids(mesh, width)
    raw = mesh.enter_manual(logits.float(), (DATA, MODEL))
    if width != vocab:
        raw = torch.where(ids < vocab, raw, torch.full((), HIDDEN, device=logits.device))
    return raw, ids


def counted(
    counts: torch.Tensor, mesh: DeviceMesh, token: torch.Tensor, live: torch.Tensor
) -> torch.Tensor:
    """`counts` `[B, V]` with the tokens `[B]` that live rows chose."""
    shape = tuple(counts.shape)
    own = mesh.enter_manual(counts, (DATA, MODEL))
    place = mesh.enter_manual(token.to(torch.int32), (DATA,)) - _ids(mesh, shape[1])[:1]
    mine = mesh.enter_manual(live, (DATA,)) & (place >= 0) & (place < own.shape[1])
    place = torch.clamp(place, 0, own.shape[1] - 1)
    return mesh.leave_manual(add_at(own, place, mine.to(torch.int32) * 2), (DATA, MODEL), shape)


def _ids(mesh: DeviceMesh, width: int) -> torch.Tensor:
    """The token ids of a device's own part, `[W]` int32."""
    own = width // mesh.shape.model
    numbers = torch.arange(mesh.shape.model, device=mesh.device, dtype=torch.int32)
    first = mesh.enter_manual(numbers * own, (MODEL,))
    return first + torch.arange(own, device=mesh.device, dtype=torch.int32)


def first_best(mesh: DeviceMesh, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of the best of a device's own tokens, `[B]` int32, and its score.

    Where that is NaN, which equals nothing, it is the first token.
    """
    top = row_maximum(mesh, scores)
    places = torch.arange(scores.shape[1], device=scores.device, dtype=torch.int32)
    beyond = torch.full_like(places, _HIGHEST)
    first = torch.where(scores == top, places, beyond).amin(-1)
    return torch.where(first < _HIGHEST, first, torch.zeros_like(first)), top[:, 0]


def _penalised(
    raw: torch.Tensor, counts: torch.Tensor, params: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    factor = params["penalty"][:, None]
    penalised = torch.where(raw < 0, raw * factor, raw / factor)
    scores = torch.where(counts > 0, penalised, raw)
    chosen = counts >> 1
    often, once = params["frequency"][:, None], params["presence"][:, None]
    return scores - often * chosen.float() - once * (chosen > 0).float()


def perturb(
    scores: torch.Tensor,
    ids: torch.Tensor,
    mesh: DeviceMesh,
    params: Mapping[str, torch.Tensor],
    positions: torch.Tensor,
) -> torch.Tensor:
    """Temperature, truncation and Gumbel noise; rows with temperature 0 keep their scores."""
    device = scores.device
    hidden = torch.full((), HIDDEN, device=device)
    temperature, min_p = params["temperature"][:, None], params["min_p"][:, None]
    warm = temperature > 0
    scores = scores / torch.where(warm, temperature, torch.ones_like(temperature))
    top_k = params["top_k"][:, None]
    # With all kept (0), too few tokens reach any threshold: the search ends below every score.
    wanted = torch.where(warm & (top_k > 0), top_k, torch.full_like(top_k, _HIGHEST))
    # Counted in whole numbers: a sum of fp32 ones would stop at 2^24.
    threshold = _search(mesh, _keys(scores), None, wanted, (wanted < _HIGHEST).any())
    scores = torch.where(_keys(scores) >= threshold, scores, hidden)
    peak = mesh.all_reduce(row_maximum(mesh, scores), MODEL, kind="max")
    threshold = _top_p(mesh, scores, peak, torch.where(warm, params["top_p"][:, None], 1.0))
    scores = torch.where(_keys(scores) >= threshold, scores, hidden)
    floor = torch.log(torch.clamp(min_p, min=1e-30)) + peak
    scores = torch.where((scores >= floor) | (min_p == 0) | ~warm, scores, hidden)
    noise = _gumbel(params["seed"], positions, ids)
    noisy = warm & (scores > HIDDEN / 2)
    return scores + torch.where(noisy, noise, torch.zeros((), device=device))


def _top_p(
    mesh: DeviceMesh, scores: torch.Tensor, peak: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """The key, `[B, 1]`, that scores of enough mass reach, where a row asks for it."""

    def searched(
        given: Sequence[torch.Tensor], state: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        scores, peak, top_p = given
        mass = torch.exp(scores - peak)
        share = top_p * mesh.all_reduce(mass.sum(-1, keepdim=True), MODEL)
        goal = torch.where(top_p < 1, share, torch.full_like(top_p, torch.inf))
        return [_search(mesh, _keys(scores), mass, goal, (top_p < 1).any())]

    lowest = torch.full_like(top_p, _LOWEST, dtype=torch.int32)
    return when(mesh, (top_p < 1).any(), searched, [scores, peak, top_p], [lowest])[0]


def _keys(scores: torch.Tensor) -> torch.Tensor:
    """Whole numbers in the order of these fp32 numbers."""
    bits = float_bits(scores)
    # Negative floats have their magnitude bits flipped.
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _search(
    mesh: DeviceMesh,
    keys: torch.Tensor,
    weight: torch.Tensor | None,
    goal: torch.Tensor,
    asked: torch.Tensor,
) -> torch.Tensor:
    """The largest threshold that keys of enough weight reach, `[B, 1]`; the lowest if none is.

    Args:
        keys: `[B, W]` int32.
        weight: of each, fp32; 1 each, int32, if None.
        goal: `[B, 1]`, how much weight over all devices is enough; of the dtype of the weight.
        asked: bool scalar; else nothing is searched.
    """

    def narrowed(
        number: torch.Tensor, given: Sequence[torch.Tensor], state: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        (keys, goal, *weights), (threshold, step) = given, state
        one = torch.ones((), device=keys.device, dtype=goal.dtype)
        weight = weights[0][..., None] if weights else one
        digits = torch.arange(1, 16, device=keys.device, dtype=torch.int32)
        tries = threshold + digits * step
        reached = keys[..., None] >= tries[:, None, :]
        total = torch.where(reached, weight, torch.zeros_like(one)).sum(1, dtype=goal.dtype)
        enough = (mesh.all_reduce(total, MODEL) >= goal).to(torch.int32).sum(-1, keepdim=True)
        return [threshold + (enough * step).to(torch.int32), (step >> 4).to(torch.int32)]

    lowest = torch.full_like(goal, _LOWEST, dtype=torch.int32)
    step = torch.full_like(lowest, 1 << 28)
    given = [keys, goal] if weight is None else [keys, goal, weight]
    return repeat(mesh, asked.int() * _ROUNDS, narrowed, given, [lowest, step])[0]


def _gumbel(seed: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise from a hash of row seed, position and token id.

    Args:
        seed, positions: `[B]`.
        ids: `[W]`.
    """
    row = _mix(seed ^ _mix(positions + 0x3C6EF372))
    bits = _mix(_mix(ids + 0x1B873593) ^ row[:, None])
    # 23 bits: with one more the largest would round to 1, whose noise is infinite.
    uniform = ((bits & 0x7FFFFF).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer hash (C. Wellons' `triple32`); int32 arithmetic wraps."""
    x = x ^ _shifted(x, 17)
    x = x * signed32(0xED5AD4BB)
    x = x ^ _shifted(x, 11)
    x = x * signed32(0xAC4C1B51)
    x = x ^ _shifted(x, 15)
    x = x * signed32(0x31848BAB)
    return x ^ _shifted(x, 14)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift to the right.

    For `>>` torch-xla divides, which rounds negative numbers up. So what would be rounded is
    cleared first.
    """
    return ((x & -(1 << by)) >> by) & ((1 << (32 - by)) - 1)
