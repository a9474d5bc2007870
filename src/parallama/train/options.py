"""The options of training that decide how an optimizer step is done, each declared once. Pure.

`parallama train` reads them as keys (`settings`). `plan`, `audit` and `bench` take from here what
they offer of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError, lines
from .declared import Declared, option

Remat = Literal["none", "full"] | int
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Declared):
    """Low-rank adapters beside frozen linear weights (Hu et al., "LoRA", 2021).

    The targets are named by the last part of the linear's name, as PEFT's `target_modules`.
    """

    rank: int = option(8, "rank of the adapters, which alone are trained", least=1)
    alpha: float = option(16.0, "the product is scaled by alpha / rank", above=0)
    targets: tuple[str, ...] = option(
        ("q_proj", "v_proj"),
        "modules that get an adapter, by their last name, as q_proj,v_proj; all-linear: all",
        words=True,
        aliases={"all-linear": LORA_TARGETS, "all": LORA_TARGETS},
    )
    dropout: float = option(
        0.0, "share of an adapter's inputs that is dropped in training", least=0, below=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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
class StepOptions(Declared):
    """One optimizer step: `A` micro-steps of `B` sequences of `S` tokens.

    AdamW is that of Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    Gradients are of the mean loss of all target tokens of the step.
    """

    batch_size: int = option(4, "sequences of one micro-step, over all devices", least=1)
    grad_accum: int = option(1, "micro-steps of one optimizer step", least=1)
    seq_len: int = option(512, "tokens of a sequence", least=2)
    remat: Remat = option(
        "none",
        "recompute activations in the backward pass: none, full, or n for every n-th layer",
        least=1,
    )
    fsdp: bool = option(False, 'weights, gradients and optimizer state are split over "data" too')
    sequence_parallel: bool = option(
        False, 'norms and the residual stream are split over "model" along the sequence'
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "of products and activations; weights are kept, and updated, in float32",
        aliases={"bf16": "bfloat16", "fp32": "float32"},
    )
    optimizer: Literal["adamw", "sgd"] = option("adamw", "adamw or sgd")
    beta1: float = option(0.9, "AdamW's decay of the gradient's mean", least=0, below=1)
    beta2: float = option(0.999, "AdamW's decay of its square's mean", least=0, below=1)
    eps: float = option(1e-8, "AdamW's epsilon", above=0)
    momentum: float = option(0.0, "SGD's momentum", least=0, below=1)
    weight_decay: float = option(
        0.0,
        "decoupled for AdamW, added to the gradient for SGD; none on norms and biases",
        least=0,
    )
    max_grad_norm: float | None = option(
        1.0, "gradients are scaled down to this global L2 norm; null: never", above=0
    )
    lora: LoraOptions | None = option(
        None, "rank, alpha, targets, dropout of adapters; null trains every weight"
    )

    @property
    def betas(self) -> tuple[float, float]:
        return self.beta1, self.beta2

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
        loss: mean over the step's target tokens, in nats, with the weights before the step.
        grad_norm: global L2 norm of the gradient, before clipping.
        tokens: target tokens.
        finite: loss and gradient are numbers. If not, the step left the state as it was.
        seconds: from the call to the result.
    """

    loss: float
    grad_norm: float
    tokens: int
    finite: bool
    seconds: float
