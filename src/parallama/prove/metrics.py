"""How close two tensors are, and two sequences of logits. Sums are taken in float64, on the host.

Shapes: `N` positions, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_POSITIONS = 64
"""Positions at once: float64 logits of a whole sequence would be the largest tensor in memory."""


@dataclass(frozen=True, kw_only=True)
class LogitFigures:
    """How logits differ from a reference's.

    Attributes:
        pcc: Pearson's correlation of all logits.
        relative_l2: length of the difference over that of the reference.
        max_abs_diff: largest difference of one logit.
        top1_agreement: share of positions with the same best token.
        top5_agreement: share of the reference's five best tokens that are among the five best here.
        kl_nats: mean over positions of KL(reference || ours) of the next token's distributions.
        perplexity: of the text, by these logits; None where no token follows.
        reference_perplexity: by the reference's logits.
    """

    pcc: float
    relative_l2: float
    max_abs_diff: float
    top1_agreement: float
    top5_agreement: float
    kl_nats: float
    perplexity: float | None
    reference_perplexity: float | None


def pcc(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Pearson's correlation of all elements; NaN where one of the two is constant."""
    a, b = ours.double().flatten(), reference.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length else math.nan


def relative_l2(ours: torch.Tensor, reference: torch.Tensor, floor: float = 0.0) -> float:
    """`|ours - reference| / |reference|`; NaN if either has a NaN or an infinity.

    Args:
        floor: the least length to divide by.
    """
    length = max(float(reference.double().norm()), floor)
    difference = float((ours.double() - reference.double()).norm())
    if not (math.isfinite(length) and math.isfinite(difference)):
        return math.nan
    return difference / length if length else math.inf if difference else 0.0


def max_abs_diff(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference of two elements; NaN if there is one."""
    return float((ours.double() - reference.double()).abs().max())


def compare_logits(
    ours: torch.Tensor, reference: torch.Tensor, targets: Sequence[int]
) -> LogitFigures:
    """Compare logits with a reference's.

    Args:
        ours: `[N, V]`.
        reference: `[N, V]`.
        targets: the tokens that follow the first positions, at most `N`.
    """
    count = ours.shape[0]
    best = min(5, ours.shape[1])
    same = among = divergence = 0.0
    losses = [0.0, 0.0]
    for first in range(0, count, _POSITIONS):
        pair = [logits[first : first + _POSITIONS].double() for logits in (ours, reference)]
        tops = [logits.topk(best, dim=-1).indices for logits in pair]
        same += float((tops[0][:, 0] == tops[1][:, 0]).sum())
        among += float((tops[0][:, :, None] == tops[1][:, None, :]).any(1).sum()) / best
        logprobs = [torch.log_softmax(logits, dim=-1) for logits in pair]
        divergence += float((logprobs[1].exp() * (logprobs[1] - logprobs[0])).sum())
        following = torch.tensor(targets[first : first + _POSITIONS], dtype=torch.long)
        for index, logprob in enumerate(logprobs):
            losses[index] -= float(logprob[: len(following)].gather(1, following[:, None]).sum())
    perplexities = [
        math.exp(min(loss / len(targets), 700.0)) if targets else None for loss in losses
    ]
    return LogitFigures(
        pcc=pcc(ours, reference),
        relative_l2=relative_l2(ours, reference),
        max_abs_diff=max_abs_diff(ours, reference),
        top1_agreement=same / count,
        top5_agreement=among / count,
        kl_nats=divergence / count,
        perplexity=perplexities[0],
        reference_perplexity=perplexities[1],
    )
