"""What an audit finds of a compiled step. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..plan.collectives import Collective, Phase


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        module: where, as transformers names it; `*` stands for every layer it happens in.
        what: in words.
        bytes: what it costs each device in a step, or what a device stores too much (less than 0:
            too little).
    """

    module: str
    what: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The outcome for one phase.

    Attributes:
        expected: collectives by the plan.
        found: collectives of the compiled program.
        programs: how many programs the step was compiled to.
        aliased: cache tensors whose buffers the program updates in place; in training, tensors of
            the state.
        cache_tensors: how many such tensors there are.
        param_bytes_per_device: measured on the devices.
        working_bytes: what a training step takes on each device beside its arguments and results,
            as the compiler allocates it.
        predicted_working_bytes: the same, predicted.
    """

    phase: Phase
    expected: tuple[Collective, ...]
    found: tuple[Collective, ...]
    findings: tuple[Finding, ...]
    programs: int
    aliased: int
    cache_tensors: int
    param_bytes_per_device: tuple[int, ...]
    working_bytes: int | None = None
    predicted_working_bytes: int | None = None

    @property
    def passed(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        return asdict(self) | {"passed": self.passed}
