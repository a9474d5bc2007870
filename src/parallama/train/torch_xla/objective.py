"""The loss over a vocabulary that is split over devices, and its gradient.

A micro-step needs two small collectives: one for each position's largest logit, one for its
normaliser and its target's logit. Shapes: `N` positions of a device, `V` the device's part of the
vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from ...engine.torch_xla.loss import stretches
from ...engine.torch_xla.mesh import DeviceMesh
from ...plan.mesh_shape import MODEL
from ..batch import IGNORED

_HIDDEN = -1e30


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        places: torch.Tensor,
        real: torch.Tensor | None,
        mesh: DeviceMesh | None,
    ) -> torch.Tensor:
        scores = logits.float()
        if real is not None:
            scores = torch.where(real, scores, torch.full((), _HIDDEN, device=logits.device))
        top = scores.amax(-1, keepdim=True)
        if mesh is not None:
            top = mesh.all_reduce(top, MODEL, kind="max")
        scores = scores - top
        # In stretches: see `engine.torch_xla.loss`.
        cut = scores.unflatten(-1, (stretches(scores.shape[-1], 1), -1))
        inner = cut.exp().sum(-1)
        # A logarithm stands between the two sums. XLA would merge them into one loop otherwise, in
        # which small terms vanish beside 1.
        normaliser = torch.logsumexp(inner.clamp_min(torch.finfo(torch.float32).tiny).log(), dim=-1)
        hit = places[None, :] == targets[:, None]
        own = torch.where(hit, scores, torch.zeros((), device=logits.device)).sum(-1)
        if mesh is not None:
            sums = mesh.all_reduce(torch.stack([normaliser.exp(), own], dim=-1), MODEL)
            normaliser, own = sums[:, 0].log(), sums[:, 1]
        counted = targets != IGNORED
        ctx.save_for_backward(scores, normaliser, hit, counted)
        ctx.dtype = logits.dtype
        return torch.where(counted, normaliser - own, torch.zeros((), device=logits.device))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        scores, normaliser, hit, counted = ctx.saved_tensors
        chance = (scores - normaliser[:, None]).exp() - hit.float()
        scale = torch.where(counted, gradients[0], torch.zeros((), device=scores.device))
        return (chance * scale[:, None]).to(ctx.dtype), None, None, None, None


def token_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    places: torch.Tensor,
    *,
    real: torch.Tensor | None = None,
    mesh: DeviceMesh | None = None,
) -> torch.Tensor:
    """Cross-entropy of each position in nats, 0 where its target is `IGNORED`; computed in float32.

    Args:
        logits: `[N, V]`.
        targets: `[N]` token ids.
        places: `[V]`, the token id of each of the device's logits.
        real: `[V]`, false where a logit is padding; None if none is.
        mesh: the vocabulary is split over its "model" axis; None if it is whole.
    """
    return _TokenLosses.apply(logits, targets, places, real, mesh)
