"""Logits to token, on the devices, where the vocabulary stays split over them.

Each device reduces its own part, and only what comes of that is exchanged: for the pick one
candidate with its normaliser, for a threshold search a few partial sums a round. There is no sort
and no cap on `top_k`.

Shapes: `B` rows, `V` padded vocabulary, `N` devices along "model"; split logits are
`[B, N, V / N]`.
"""

# Top-k and top-p are threshold searches over the bits of the score (a 16-way radix select, 8
# rounds): the largest threshold that enough tokens, or enough mass, reach. Sampling is Gumbel-max
# (Gumbel 1954). The noise of a token is a hash of seed, position and token id, so the same seed
# gives the same text on every mesh and in every batch.

from __future__ import annotations

import torch

from ...plan.mesh_shape import DATA, MODEL
from ..row_sampling import Mode, signed32
from .mesh import DeviceMesh
from .ops import float_bits, whole_as_float, whole_of_float

_HIDDEN = -1e30
_LOWEST, _HIGHEST = -(1 << 31), (1 << 31) - 1


def choose(
    logits: torch.Tensor,
    mesh: DeviceMesh,
    vocab: int,
    mode: Mode,
    params: dict[str, torch.Tensor],
    positions: torch.Tensor,
    seen: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one token a row.

    Args:
        logits: `[B, V]`, split over "model"; ids from `vocab` on are padding and never chosen.
        params: by the names of `steps.PARAMS`, `[B]` each.
        positions: `[B]` int32, the position that the chosen token will have.
        seen: `[B, V]` bool, tokens of the prompt and the text so far; only with `mode.penalty`.

    Returns:
        Token ids `[B]` int64 and their log-probabilities `[B]` fp32 under the model's own
        distribution (before temperature, penalty and truncation).
    """
    device, parts = logits.device, mesh.shape.model
    split_axes = (DATA, MODEL, None)
    batch, width = logits.shape
    own = width // parts
    raw = mesh.mark(logits.float().reshape(batch, parts, own), split_axes)
    ids = torch.arange(width, device=device, dtype=torch.int32).reshape(1, parts, own)
    if width != vocab:
        raw = torch.where(ids < vocab, raw, torch.full((), _HIDDEN, device=device))
    local_top = raw.amax(-1)
    local_sum = torch.exp(raw - local_top[..., None]).sum(-1)
    scores = raw
    if mode.penalty:
        assert seen is not None
        factor = params["penalty"][:, None, None]
        marked = mesh.mark(seen.reshape(batch, parts, own), split_axes)
        penalised = torch.where(scores < 0, scores * factor, scores / factor)
        scores = torch.where(marked, penalised, scores)
    if mode.sample:
        scores = _perturb(scores, ids, mode, params, positions)
    zero = torch.zeros((), device=device)
    best = scores.argmax(-1)
    best_score = scores.amax(-1)
    one_hot = torch.arange(own, device=device)[None, None, :] == best[..., None]
    best_raw = torch.where(one_hot, raw, zero).sum(-1)
    offset = torch.arange(parts, device=device)[None, :] * own
    # Of each device one small tensor is gathered: its candidate, the candidate's score and logit,
    # and its part of the normaliser.
    candidate = whole_as_float(best + offset)
    found = torch.stack([candidate, best_score, best_raw, local_top, local_sum], dim=-1)
    found = mesh.resplit(found, split_axes, (DATA, None, None))
    token, score, raw_score, top, total = found.unbind(-1)
    winner = torch.arange(parts, device=device)[None, :] == score.argmax(-1, keepdim=True)
    chosen = whole_of_float(torch.where(winner, token, zero).sum(-1))
    chosen_raw = torch.where(winner, raw_score, zero).sum(-1)
    peak = top.amax(-1)
    log_total = torch.log((total * torch.exp(top - peak[:, None])).sum(-1))
    return chosen, chosen_raw - peak - log_total


def _perturb(
    scores: torch.Tensor,
    ids: torch.Tensor,
    mode: Mode,
    params: dict[str, torch.Tensor],
    positions: torch.Tensor,
) -> torch.Tensor:
    """Temperature, truncation and Gumbel noise; rows with temperature 0 keep their scores."""

    def per_row(name: str) -> torch.Tensor:
        return params[name][:, None, None]

    device = scores.device
    hidden = torch.full((), _HIDDEN, device=device)
    temperature = per_row("temperature")
    warm = temperature > 0
    scores = scores / torch.where(warm, temperature, torch.ones_like(temperature))
    if mode.top_k:
        top_k = per_row("top_k")
        # With all kept (0), too few tokens reach any threshold: the search ends below every score.
        wanted = torch.where(top_k > 0, top_k, torch.full_like(top_k, _HIGHEST))
        # Counted in whole numbers: a sum of fp32 ones would stop at 2^24.
        one = torch.ones((), device=device, dtype=torch.int32)
        keep = _reaching(scores, one.expand(scores.shape), wanted)
        scores = torch.where(keep | ~warm, scores, hidden)
    peak = scores.amax((1, 2), keepdim=True)
    if mode.top_p:
        top_p = per_row("top_p")
        mass = torch.exp(scores - peak)
        share = top_p * mass.sum((1, 2), keepdim=True)
        goal = torch.where(top_p < 1, share, torch.full_like(top_p, torch.inf))
        keep = _reaching(scores, mass, goal)
        scores = torch.where(keep | ~warm, scores, hidden)
    min_p = per_row("min_p")
    floor = torch.log(torch.clamp(min_p, min=1e-30)) + peak
    scores = torch.where((scores >= floor) | (min_p == 0) | ~warm, scores, hidden)
    noise = _gumbel(params["seed"], positions, ids)
    noisy = warm & (scores > _HIDDEN / 2)
    return scores + torch.where(noisy, noise, torch.zeros((), device=device))


def _reaching(scores: torch.Tensor, weight: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Tokens at or above the largest threshold that scores of enough weight reach; all if none is.

    Args:
        scores: `[B, N, V / N]` fp32.
        weight: of each score, fp32 or int32.
        goal: `[B, 1, 1]`, how much weight is enough; of the dtype of `weight`.
    """
    bits = float_bits(scores)
    # Order-preserving: negative floats have their magnitude bits flipped.
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    threshold = torch.full_like(goal, _LOWEST, dtype=torch.int32)
    digits = torch.arange(1, 16, device=scores.device, dtype=torch.int32)
    zero = torch.zeros((), device=scores.device, dtype=weight.dtype)
    for shift in range(28, -1, -4):
        tries = (threshold + (digits << shift))[:, :, None, :]
        reached = torch.where(keys[..., None] >= tries, weight[..., None], zero)
        total = reached.sum(2, dtype=weight.dtype).sum(1, keepdim=True, dtype=weight.dtype)
        enough = (total >= goal).to(torch.int32).sum(-1, keepdim=True)
        threshold = threshold + (enough << shift)
    return keys >= threshold


def _gumbel(seed: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise from a hash of row seed, position and token id.

    Args:
        seed, positions: `[B]`.
        ids: `[1, N, V / N]`.
    """
    row = _mix(seed ^ _mix(positions.to(torch.int32) + 0x3C6EF372))
    bits = _mix(_mix(ids + 0x1B873593) ^ row[:, None, None])
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
