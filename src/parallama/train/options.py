"""How a training step is done. Pure data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError, lines

Remat = Literal["none", "full"] | int
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters beside frozen linear weights (Hu et al., "LoRA", 2021).

    Attributes:
        rank: inner size of an adapter.
        alpha: an adapter's output is scaled by `alpha / rank`.
        targets: the linears that get one, by the last part of their name, as PEFT's `target_modules`.
        dropout: share of an adapter's inputs that are dropped in training.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise UsageError(
                lines(f"lora rank is {self.rank!r}", "expected a whole number of at least 1")
            )
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(lines(f"lora alpha is {self.alpha!r}", "expected a number above 0"))
        if not 0 <= self.dropout < 1:
            raise UsageError(
                lines(f"lora dropout is {self.dropout!r}", "expected at least 0 and less than 1")
            )
        unknown = [target for target in self.targets if target not in LORA_TARGETS]
        if unknown or not self.targets or len(set(self.targets)) != len(self.targets):
            raise UsageError(
                lines(
                    f"lora targets are {', '.join(self.targets) or 'none'}",
                    f"expected some of {', '.join(LORA_TARGETS)}, each once",
                )
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """One optimizer step.

    Attributes:
        batch_size: `B`, sequences of one micro-step over all devices.
        seq_len: `S`, tokens of a sequence.
        grad_accum: `A`, micro-steps of one optimizer step. Gradients are of the mean loss of all target tokens of the step.
        remat: which layers' activations are computed again for the backward pass instead of kept: `none`, `full`, or every n-th layer.
        fsdp: split weights, gradients and optimizer state over "data" too.
        sequence_parallel: split norms and residuals over "model" along the sequence.
        dtype: of products and activations. Weights are kept, and updated, in float32.
        optimizer: `adamw` (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019) or `sgd`.
        betas, eps: of AdamW.
        momentum: of SGD.
        weight_decay: decoupled for AdamW, added to the gradient for SGD; none on norms and biases.
        max_grad_norm: gradients are scaled down to this global L2 norm; None leaves them.
        lora: train adapters, and nothing else; None trains all parameters.
    """

    batch_size: int = 8
    seq_len: int = 512
    grad_accum: int = 1
    remat: Remat = "none"
    fsdp: bool = False
    sequence_parallel: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    lora: LoraOptions | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "grad_accum"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UsageError(
                    lines(f"{name} is {value!r}", "expected a whole number of at least 1")
                )
        if self.seq_len < 2:
            raise UsageError(
                lines(
                    "seq_len is 1", "expected at least 2: a token is predicted from those before it"
                )
            )
        if not (self.remat in ("none", "full") or (type(self.remat) is int and self.remat >= 1)):
            raise UsageError(
                lines(f"remat is {self.remat!r}", "expected none, full, or n for every n-th layer")
            )
        for name, known in (("dtype", ("float32", "bfloat16")), ("optimizer", ("adamw", "sgd"))):
            if getattr(self, name) not in known:
                raise UsageError(
                    lines(f"{name} is {getattr(self, name)!r}", f"expected {' or '.join(known)}")
                )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(
                lines(
                    f"betas are {self.betas!r}",
                    "expected two numbers of at least 0 and less than 1",
                )
            )
        if not 0 <= self.momentum < 1:
            raise UsageError(
                lines(f"momentum is {self.momentum!r}", "expected at least 0 and less than 1")
            )
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise UsageError(lines(f"eps is {self.eps!r}", "expected a number above 0"))
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UsageError(
                lines(f"weight_decay is {self.weight_decay!r}", "expected a number of at least 0")
            )
        if self.max_grad_norm is not None and not (
            math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0
        ):
            raise UsageError(
                lines(
                    f"max_grad_norm is {self.max_grad_norm!r}", "expected a number above 0, or none"
                )
            )

    def rematerialized(self, layer: int) -> bool:
        """Whether a layer's activations are computed again."""
        return self.remat == "full" or (isinstance(self.remat, int) and layer % self.remat == 0)


def slots(options: StepOptions) -> tuple[str, ...]:
    """What an optimizer keeps of each parameter, as prefixes of names in the state."""
    if options.optimizer == "adamw":
        return ("adam.m", "adam.v")
    return ("sgd.momentum",) if options.momentum else ()


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What came of one optimizer step.

    Attributes:
        loss: mean over the step's target tokens, in nats, with the weights as they were before it.
        grad_norm: global L2 norm of the gradient, before clipping.
        tokens: target tokens.
        finite: loss and gradient are numbers. Where they aren't, the step left the state as it was.
        seconds: from the call to the result.
    """

    loss: float
    grad_norm: float
    tokens: int
    finite: bool
    seconds: float
