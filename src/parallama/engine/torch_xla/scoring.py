"""How likely given tokens are, on the devices, where the vocabulary stays split over them.

Of each position every device gives only its largest logit, its normaliser, the given token's logit
and its best token. `loss` says why the normaliser is summed in stretches.

Shapes: `B` rows, `S` positions, `V` padded vocabulary, `N` devices along "model"; split logits are
`[B, S, N, V / N]`.
"""

from __future__ import annotations

import torch

from ...plan.mesh_shape import DATA, MODEL
from ..row_sampling import HIDDEN
from .loss import stretches
from .mesh import DeviceMesh
from .ops import whole_as_float, whole_of_float


def score(
    logits: torch.Tensor, targets: torch.Tensor, mesh: DeviceMesh, vocab: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How likely each position's token is.

    Args:
        logits: `[B, S, V]`, split over "model"; ids from `vocab` on are padding, which no
            probability goes to.
        targets: `[B, S]` int64, the token that is to follow at each position.

    Returns:
        Log-probabilities `[B, S]` fp32 in nats; `[B, S]` bool: the token is the one that greedy
        decoding would choose; and `[B, S, 2]` fp32, see `sampling.Chosen.normaliser`.
    """
    device, parts = logits.device, mesh.shape.model
    batch, length, width = logits.shape
    split_axes = (DATA, None, MODEL, None)
    scores = mesh.mark(logits.float().reshape(batch, length, parts, width // parts), split_axes)
    ids = torch.arange(width, device=device).reshape(1, 1, parts, width // parts)
    if width != vocab:
        scores = torch.where(ids < vocab, scores, torch.full((), HIDDEN, device=device))
    zero = torch.zeros((), device=device)
    top = scores.amax(-1)
    shifted = scores - top[..., None]
    cut = shifted.unflatten(-1, (stretches(width // parts, 1), -1))
    normaliser = torch.logsumexp(torch.logsumexp(cut, dim=-1), dim=-1)
    own = torch.where(ids == targets[..., None, None], scores, zero).sum(-1)
    best = shifted.argmax(-1) + torch.arange(parts, device=device) * (width // parts)
    # Of each device one small tensor is gathered.
    found = torch.stack([top, normaliser, own, whole_as_float(best)], dim=-1)
    found = mesh.resplit(found, split_axes, (DATA, None, None, None))
    top, normaliser, own, best = found.unbind(-1)
    peak = top.amax(-1)
    log_total = torch.log(torch.exp(normaliser + top - peak[..., None]).sum(-1))
    winner = torch.arange(parts, device=device) == top.argmax(-1, keepdim=True)
    chosen = whole_of_float(torch.where(winner, best, zero).sum(-1))
    over = torch.stack([peak, log_total], dim=-1)
    return own.sum(-1) - peak - log_total, chosen == targets, over
