"""Logits to token, on the devices.

Logits stay split over the vocabulary. Each device reduces its own part, and only that crosses: one candidate with its normaliser a device
for the pick, a few partial sums for each round of a threshold search. There is no sort and no cap on `top_k`.

Top-k and top-p are threshold searches over the bits of the score (a 16-way radix select, 8 rounds): the largest threshold that enough
tokens, or enough mass, reach. Sampling is Gumbel-max (Gumbel 1954): the noise of a token is a hash of (seed, position, token id), so the same
seed gives the same text on every mesh and in every batch.

Shapes: `B` rows, `V` padded vocabulary, `N` devices along "model"; split logits are `[B, N, V / N]`.
"""

from __future__ import annotations

import torch

from ...plan.mesh_shape import DATA, MODEL
from ..sampling_params import Mode, signed32
from .mesh import DeviceMesh
from .ops import float_bits

_HIDDEN = -1e30


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
        params: from `host_params`, on the devices.
        positions: `[B]` int32, the position that the chosen token will have.
        seen: `[B, V]` bool, tokens of the prompt and the text so far; only with `mode.penalty`.

    Returns:
        Token ids `[B]` int64 and their log-probabilities `[B]` fp32 under the model's own distribution (before temperature, penalty and truncation).
    """
    parts = mesh.shape.model
    split_axes = (DATA, MODEL, None)
    batch, width = logits.shape
    raw = mesh.mark(logits.float().reshape(batch, parts, width // parts), split_axes)
    ids = torch.arange(width, device=logits.device, dtype=torch.int32).reshape(
        1, parts, width // parts
    )
    if width != vocab:
        raw = torch.where(ids < vocab, raw, torch.full((), _HIDDEN, device=logits.device))
    local_top = raw.amax(-1)
    local_sum = torch.exp(raw - local_top[..., None]).sum(-1)
    scores = raw
    if mode.penalty:
        assert seen is not None
        factor = params["penalty"][:, None, None]
        marked = mesh.mark(seen.reshape(batch, parts, width // parts), split_axes)
        scores = torch.where(
            marked, torch.where(scores < 0, scores * factor, scores / factor), scores
        )
    if mode.sample:
        scores = _perturb(scores, ids, mode, params, positions)
    best = scores.argmax(-1)
    best_score = scores.amax(-1)
    one_hot = torch.arange(width // parts, device=logits.device)[None, None, :] == best[..., None]
    best_raw = torch.where(one_hot, raw, torch.zeros((), device=logits.device)).sum(-1)
    offset = torch.arange(parts, device=logits.device)[None, :] * (width // parts)
    # One small tensor crosses: per device its candidate, the candidate's score and logit, and its part of the normaliser. Ids are exact in
    # fp32 below 2^24.
    candidates = torch.stack(
        [(best + offset).float(), best_score, best_raw, local_top, local_sum], dim=-1
    )
    candidates = mesh.mark(mesh.mark(candidates, split_axes).clone(), (DATA, None, None))
    token, score, raw_score, top, total = candidates.unbind(-1)
    winner = torch.arange(parts, device=logits.device)[None, :] == score.argmax(-1, keepdim=True)
    zero = torch.zeros((), device=logits.device)
    chosen = torch.where(winner, token, zero).sum(-1).long()
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

    hidden = torch.full((), _HIDDEN, device=scores.device)
    temperature = per_row("temperature")
    warm = temperature > 0
    scores = scores / torch.where(warm, temperature, torch.ones_like(temperature))
    if mode.top_k:
        wanted = torch.where(
            per_row("top_k") > 0, per_row("top_k"), torch.full_like(per_row("top_k"), 2**31 - 1)
        )
        ones = torch.ones((), device=scores.device)
        # With all kept (0) no threshold is reached by enough tokens, and the search ends below every score.
        keep = _reaching(scores, ones.expand(scores.shape), wanted.float())
        scores = torch.where(keep | ~warm, scores, hidden)
    peak = scores.amax((1, 2), keepdim=True)
    if mode.top_p:
        mass = torch.exp(scores - peak)
        top_p = per_row("top_p")
        goal = torch.where(
            top_p < 1, top_p * mass.sum((1, 2), keepdim=True), torch.full_like(top_p, torch.inf)
        )
        keep = _reaching(scores, mass, goal)
        scores = torch.where(keep | ~warm, scores, hidden)
    floor = torch.log(torch.clamp(per_row("min_p"), min=1e-30)) + peak
    scores = torch.where((scores >= floor) | (per_row("min_p") == 0) | ~warm, scores, hidden)
    noise = _gumbel(params["seed"], positions, ids)
    return scores + torch.where(
        warm & (scores > _HIDDEN / 2), noise, torch.zeros((), device=scores.device)
    )


def _reaching(scores: torch.Tensor, weight: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Tokens at or above the largest threshold whose total weight (of all scores reaching it) is at least `goal`; all if none is.

    Args:
        scores, weight: `[B, N, V / N]`.
        goal: `[B, 1, 1]`.
    """
    bits = float_bits(scores)
    # Order-preserving: negative floats have their magnitude bits flipped.
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    lowest = -(1 << 31)
    threshold = torch.full_like(goal, lowest, dtype=torch.int32)
    digits = torch.arange(1, 16, device=scores.device, dtype=torch.int32)
    for shift in range(28, -1, -4):
        step = digits << shift
        tries = (threshold + step)[:, :, None, :]
        reached = torch.where(
            keys[..., None] >= tries, weight[..., None], torch.zeros((), device=scores.device)
        ).sum(2)
        enough = (reached.sum(1, keepdim=True) >= goal).to(torch.int32).sum(-1, keepdim=True)
        threshold = threshold + (enough << shift)
    return keys >= threshold


def _gumbel(seed: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise from a hash of row seed `[B]`, position `[B]` and token id `[1, N, V / N]`."""
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
    """Logical shift to the right. torch-xla divides for `>>`, which rounds negative numbers up: clear what would be rounded first."""
    return ((x & -(1 << by)) >> by) & ((1 << (32 - by)) - 1)
