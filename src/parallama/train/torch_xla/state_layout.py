"""The tensors of a training state: their names, and how each is placed. Pure.

They are `param.NAME` of every parameter, what the optimizer keeps of each that is trained
(`adam.m.NAME`, `adam.v.NAME` or `sgd.momentum.NAME`), and `step` `[1]` fp32, the number of steps
taken.
"""

from __future__ import annotations

from ...plan.placement import Blocks, Placement
from ..layout import TrainingPlan
from ..options import StepOptions, slots

PARAMETER, STEP = "param.", "step"
_STEP_PLACEMENT = Placement(
    name=STEP,
    kind="buffer",
    source_shape=(1,),
    shape=(1,),
    axes=(None,),
    style="replicate",
    reason="the number of steps taken",
)


class StateLayout:
    """The state of one training plan and one optimizer."""

    def __init__(self, plan: TrainingPlan, options: StepOptions) -> None:
        self.plan, self._slots = plan, slots(options)

    def names(self) -> list[str]:
        """Of all tensors, in order."""
        return [PARAMETER + each.name for each in self.plan.parameters] + self.optimizer_names()

    def changing(self) -> list[str]:
        """Of the tensors that a step changes: what a checkpoint must hold.

        Frozen weights beside adapters are not among them.
        """
        return [PARAMETER + each.name for each in self.plan.trained] + self.optimizer_names()

    def optimizer_names(self) -> list[str]:
        """Of the tensors that begin as zeros."""
        return [f"{slot}.{each.name}" for each in self.plan.trained for slot in self._slots] + [
            STEP
        ]

    def of_parameter(self, name: str) -> list[str]:
        """A trained parameter's own tensors: itself, then what the optimizer keeps of it."""
        return [PARAMETER + name, *(f"{slot}.{name}" for slot in self._slots)]

    def placement(self, name: str) -> Placement:
        """How a tensor is placed."""
        return _STEP_PLACEMENT if name == STEP else self.plan[parameter_of(name)]

    def blocks(self, name: str) -> Blocks | None:
        """How the placed dim of a tensor is made from the checkpoint's; None if it is the same."""
        return None if name == STEP else self.plan.blocks(parameter_of(name))


def parameter_of(name: str) -> str:
    """The parameter that a tensor belongs to: `adam.m.model.norm.weight` -> `model.norm.weight`."""
    for prefix in (PARAMETER, "adam.m.", "adam.v.", "sgd.momentum."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    raise KeyError(name)
