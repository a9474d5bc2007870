"""Holds a compiled training step against its plan: its collectives to the byte, what the devices
store, and whether the state is updated in place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..plan.layer_patterns import without_layer
from ..plan.make_plan import make_plan
from ..plan.placement import Plan
from ..plan.train_collectives import expected_in_training
from ..plan.train_cost import train_memory
from ..train.layout import train_step, training_plan
from ..train.options import slots
from . import hlo
from .audit import one_program
from .compiled_collectives import collectives_of, differences, over_the_least
from .findings import Audit, Finding

if TYPE_CHECKING:
    from ..train.trainer import Trainer

_SCALAR_BYTES = 64
"""Copies of a few numbers cost nothing."""


def audit_training(trainer: Trainer, *, accept_plan: bool = False) -> Audit:
    """Compile the step of a trainer that isn't compiled yet, and judge it.

    Args:
        accept_plan: judge only the program against the plan.

    Raises:
        RunError: the engine was not started with `keep_hlo`.
    """
    plan, options = trainer.plan, trainer.options
    program = trainer.compile()
    modules = [hlo.parse(text) for text in program.hlo()]
    step = train_step(options, plan.model.layers, trainer.mesh.traits.sum_bytes)
    wanted = expected_in_training(plan, step)
    found = collectives_of(modules, plan, _scope)
    changing = trainer.changing()
    aliased = sum(len(module.aliases) for module in modules)
    findings = [
        *differences(wanted, found),
        *_misplaced(trainer),
        *_rewritten(modules, aliased, len(changing)),
        *one_program(modules),
    ]
    if not accept_plan:
        own = training_plan(make_plan(plan.model, plan.mesh), fsdp=options.fsdp, lora=options.lora)
        findings += over_the_least(wanted, expected_in_training(own, step))
    return Audit(
        phase="train",
        expected=wanted,
        found=found,
        findings=tuple(findings),
        programs=len(modules),
        aliased=aliased,
        cache_tensors=len(changing),
        param_bytes_per_device=tuple(trainer.bytes_per_device()["params"]),
        working_bytes=program.temp_bytes(),
        predicted_working_bytes=train_memory(
            plan, step, optimizer_slots=len(slots(options))
        ).working,
    )


def _scope(instruction: hlo.Instruction, _module: hlo.Module, _plan: Plan) -> str:
    """The module of a collective; in training every one is made in a named scope: see `regions`."""
    return instruction.scope or "input"


def _misplaced(trainer: Trainer) -> Iterator[Finding]:
    """Tensors of the state that are placed otherwise than planned, on any device."""
    wrong: Counter[tuple[str, str, str]] = Counter()
    cost: Counter[tuple[str, str, str]] = Counter()
    for name, tensor in trainer.state.items():
        planned = trainer.layout(name).local_shape(trainer.plan.mesh)
        for shape in dict.fromkeys(trainer.mesh.local_shapes(tensor)):
            if shape != planned:
                key = (without_layer(name)[0], str(list(shape)), str(list(planned)))
                wrong[key] += 1
                cost[key] += (math.prod(shape) - math.prod(planned)) * tensor.element_size()
    for key, count in wrong.items():
        name, shape_text, planned_text = key
        what = f"{count} tensor(s) are stored as {shape_text} on a device, planned {planned_text}"
        yield Finding(module=name, what=what, bytes=cost[key])


def _rewritten(modules: list[hlo.Module], aliased: int, changing: int) -> Iterator[Finding]:
    """Tensors of the state that are not updated in place, or copied.

    Args:
        aliased: tensors that are updated in place.
        changing: tensors that the step changes.
    """
    if aliased != changing:
        what = f"{changing - aliased} of {changing} tensors are not updated in place"
        yield Finding(module="state", what=f"{what}: each step writes them anew", bytes=0)
    copies = [size for module in modules for size in _copies(module)]
    if copies:
        what = f"{len(copies)} whole tensors are copied every step"
        yield Finding(module="state", what=what, bytes=sum(copies))


def _copies(module: hlo.Module) -> Iterator[int]:
    """Bytes of every copy of a whole tensor of the state, read from or written over its buffer."""
    parameters = module.parameters
    aliased = {
        parameters[number].name for number in module.aliases.values() if number in parameters
    }
    for each in module.of("copy"):
        if each.entry and aliased.intersection(each.operands) and each.bytes > _SCALAR_BYTES:
            yield each.bytes
