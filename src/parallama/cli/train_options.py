"""Training options of `plan` and `audit`: help and defaults are those of `train.options`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..train.declared import declaration
from ..train.options import LoraOptions, Remat, StepOptions


def _option(spelling: str) -> Any:
    """The option of a key, as `--grad-accum` or `--lora.rank`."""
    first, _, inner = spelling.removeprefix("--").replace("-", "_").partition(".")
    declared = declaration(LoraOptions, inner) if inner else declaration(StepOptions, first)
    return typer.Option(spelling, help=f"train: {declared.help}.")


Fsdp = Annotated[bool, _option("--fsdp")]
SequenceParallel = Annotated[bool, _option("--sequence-parallel")]
GradAccum = Annotated[int, _option("--grad-accum")]
RematText = Annotated[str, _option("--remat")]
Optimizer = Annotated[str, _option("--optimizer")]
LoraRank = Annotated[int, _option("--lora.rank")]
LoraTargets = Annotated[str, _option("--lora.targets")]

NAMES = {"fsdp", "sequence_parallel", "grad_accum", "remat", "optimizer"}
LORA_NAMES = {"lora_rank", "lora_targets"}
REMAT = str(StepOptions.remat)
TARGETS = ",".join(LoraOptions.targets)


def read_remat(text: str) -> Remat:
    """`none`, `full` or a number; what it is none of, `StepOptions` refuses."""
    return int(text) if text.isdigit() else text  # type: ignore[return-value]
