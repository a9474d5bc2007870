"""How far two correct runs of a model may differ: relative L2 distances, by dtype. Pure.

Only rounding may differ between a sharded run and one on a single device: the sums are the same,
taken in another order. Let `u` be the unit roundoff of the run's dtype (2^-24 for float32, 2^-8 for
bfloat16), and `U` = 2^-24 that of the accumulators, which are float32. (A TPU multiplies float32 in
bfloat16 passes unless it is told otherwise. That is not allowed for here, and would be reported.)

- One product of `K` terms (`product`). Inputs, weights and the result are each rounded to the run's
  dtype. Where the sum is split over `n` devices, so is every addition of the all-reduce, which is
  `log2(n)` deep. Roundings are independent and add up as a random walk: `sqrt(3 + log2(n)) * u`.
  The accumulation adds `sqrt(K) * U`: the probabilistic bound of Higham and Mary (SIAM J. Sci.
  Comput. 41, 2019), relative to the result, for terms of random sign.
- Attention (`attention`). The exponential makes the absolute error of a score the relative error of
  its weight. `SCORES` is the size of a score that is allowed for.
- Angles (`rotary`). An angle is position times frequency, in float32. Its absolute error, and that
  of its cosine, is `U` times the position.
- A whole run (`depth`). Every layer adds two branches to the residual stream, each with the error
  of a product of its own: a random walk of `2 * layers + 1` steps.
- Gradients (`gradient`). Backward is a walk twice as long, over products of two operands that both
  have errors. The loss's sum over the vocabulary is left out. Summed in one loop its error has one
  direction, and no bound here would hold; so `loss` sums otherwise, and the reference computes its
  loss in float64.

`HEADROOM` multiplies all of them: these are laws of growth, not bounds with sharp constants.
Correct runs stay within half of the tolerances in `tests/test_validate.py`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

HEADROOM = 4.0
SCORES = 8.0
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
_ACCUMULATOR = UNIT_ROUNDOFF["float32"]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Relative L2 distances within which a run counts as equal.

    Attributes:
        dtype: `float32` or `bfloat16`, of weights and activations.
        devices: devices that a sum is split over.
    """

    dtype: str
    devices: int

    @property
    def unit_roundoff(self) -> float:
        return UNIT_ROUNDOFF[self.dtype]

    def product(self, terms: int) -> float:
        """Of a sum of so many terms, from equal inputs."""
        return HEADROOM * (
            math.sqrt(3 + math.log2(self.devices)) * self.unit_roundoff
            + math.sqrt(terms) * _ACCUMULATOR
        )

    def attention(self, terms: int) -> float:
        """Of attention whose scores and mixtures together have so many terms."""
        return SCORES * self.product(terms)

    def rotary(self, positions: int) -> float:
        """Of the rotary table of so many positions."""
        return HEADROOM * (self.unit_roundoff + positions * _ACCUMULATOR)

    def depth(self, layers: int, terms: int) -> float:
        """Of what comes after so many layers, whose longest sums have `terms` terms."""
        return math.sqrt(2 * layers + 1) * self.product(terms)

    def gradient(self, layers: int, terms: int) -> float:
        """Of a parameter's gradient in a model of so many layers."""
        return math.sqrt(2) * self.depth(2 * layers, terms)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The tolerances of one run.

    Attributes:
        unit_roundoff: `u` of the run's dtype.
        logits_relative_l2: for prefill and decode.
        gradients_relative_l2: for each parameter's gradient.
    """

    unit_roundoff: float
    logits_relative_l2: float
    gradients_relative_l2: float

    @classmethod
    def of(cls, tolerance: Tolerance, *, layers: int, terms: int) -> Limits:
        return cls(
            unit_roundoff=tolerance.unit_roundoff,
            logits_relative_l2=tolerance.depth(layers, terms),
            gradients_relative_l2=tolerance.gradient(layers, terms),
        )

    def to_dict(self) -> dict[str, float]:
        return asdict(self)
