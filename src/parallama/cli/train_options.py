"""The training options of `audit` and `plan`; help and defaults are those of `train.options`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import typer

from ..train.declared import declaration
from ..train.options import LoraOptions, StepOptions
from .unused_options import refuse


def _option(spelling: str, show_default: str | bool = True) -> Any:
    """The option of a key, spelled as `--grad-accum` or `--lora.rank`."""
    first, _, inner = spelling.removeprefix("--").replace("-", "_").partition(".")
    declared = declaration(LoraOptions, inner) if inner else declaration(StepOptions, first)
    return typer.Option(spelling, help=f"train: {declared.help}.", show_default=show_default)


@dataclass(frozen=True, kw_only=True)
class AuditedStep:
    """What `audit` offers of the options of a step."""

    fsdp: Annotated[bool, _option("--fsdp")] = StepOptions.fsdp
    sequence_parallel: Annotated[bool, _option("--sequence-parallel")] = (
        StepOptions.sequence_parallel
    )
    grad_accum: Annotated[int, _option("--grad-accum")] = StepOptions.grad_accum
    remat: Annotated[str, _option("--remat")] = str(StepOptions.remat)

    def options(self, **more: Any) -> StepOptions:
        """The options of the step, with `more` of them.

        Raises:
            UsageError: a value is out of its range.
        """
        return StepOptions(**self._keys(), **more)

    def _keys(self) -> dict[str, Any]:
        remat = int(self.remat) if self.remat.isdigit() else self.remat
        return asdict(self) | {"remat": remat}

    @classmethod
    def refuse(cls, context: typer.Context, expected: str) -> None:
        """Raise `UsageError` where one of these options stands on the command line."""
        names = {field.name for field in fields(cls)}
        refuse(context, names, "is about training", expected)


@dataclass(frozen=True, kw_only=True)
class PlannedStep(AuditedStep):
    """What `plan` offers of them: with either of the last two, adapters alone are trained."""

    optimizer: Annotated[str, _option("--optimizer")] = StepOptions.optimizer
    lora_rank: Annotated[int | None, _option("--lora.rank", str(LoraOptions.rank))] = None
    lora_targets: Annotated[
        str | None, _option("--lora.targets", ",".join(LoraOptions.targets))
    ] = None

    def _keys(self) -> dict[str, Any]:
        keys = super()._keys()
        rank, targets = keys.pop("lora_rank"), keys.pop("lora_targets")
        given: dict[str, Any] = {}
        if rank is not None:
            given["rank"] = rank
        if targets is not None:
            given["targets"] = targets
        return keys | {"lora": LoraOptions(**given) if given else None}
