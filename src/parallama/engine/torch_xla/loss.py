"""The language-model loss, with a normaliser that doesn't lose the vocabulary's tail.

Shapes: `B` rows, `S` positions, `V` vocabulary.
"""

# Softmax over a vocabulary sums tens of thousands of exponentials. Where the model is sure of a
# token, the largest is 1 and most are below 2^-25. Added in float32 to a running sum that is 1
# already, they are rounded away, all in the same direction. torch's `log_softmax` on the host and
# XLA:CPU's sums in one loop both do that. A normaliser that is too small by 1e-5 doesn't matter to
# the loss. In its gradient every position gets a common part too much along the probabilities,
# which trained models' norms cancel to a much smaller rest.
#
# Here the vocabulary is cut into about as many stretches as a stretch has ids. Each has a
# normaliser of its own, and those are put together. XLA merges a sum of sums back into one loop,
# but not a logarithm between them.

from __future__ import annotations

import math

import torch


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor, *, parts: int = 1) -> torch.Tensor:
    """Mean cross-entropy of every token but the first, given those before it, in nats.

    It is computed in float32.

    Args:
        logits: `[B, S, V]`.
        ids: `[B, S]`, on the same device.
        parts: devices that the logits' last dim is split over.
    """
    rows, targets = logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
    # Near zero, where the model is sure, a normaliser has many digits after the point, and 1 minus
    # the token's probability comes out right.
    rows = rows - rows.detach().amax(-1, keepdim=True)
    cut = rows.unflatten(-1, (stretches(rows.shape[-1], parts), -1))
    normaliser = torch.logsumexp(torch.logsumexp(cut, dim=-1), dim=-1)
    # Of logits instead of log-probabilities this is minus the target's logit. Unlike a gather, it
    # stays on the device that has it.
    return (normaliser + torch.nn.functional.nll_loss(rows, targets, reduction="none")).mean()


def stretches(vocab: int, parts: int) -> int:
    """How many equal stretches to cut a vocabulary into, near the square root of a part's size.

    Args:
        parts: devices that share the vocabulary; each gets as many stretches if it divides.
    """
    own, rest = divmod(vocab, parts)
    if rest:
        return stretches(vocab, 1)
    return parts * next(count for count in range(math.isqrt(own), 0, -1) if own % count == 0)
