"""Hold a compiled training step against its plan: collectives to the byte, what the devices store, and whether the state is updated in place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from ..plan.layer_patterns import without_layer
from ..plan.make_plan import make_plan
from ..plan.placement import Plan
from ..plan.train_collectives import expected_in_training
from ..plan.train_cost import train_memory
from ..train.layout import train_step, training_plan
from ..train.options import slots
from ..train.torch_xla.step import Trainer
from . import hlo
from .audit import Audit, Finding, collectives_of, differences, over_the_least


def audit_training(trainer: Trainer, *, accept_plan: bool = False) -> Audit:
    """Compile the step of a trainer that hasn't yet, and judge it.

    Args:
        accept_plan: only judge the program against the plan.

    Raises:
        RunError: the engine was not started with `keep_hlo`.
    """
    plan, options = trainer.plan, trainer.options
    program = trainer.compile()
    modules = [hlo.parse(text) for text in program.hlo()]
    step = train_step(options, plan.model.layers, trainer.mesh.traits.sum_bytes)
    wanted, found = expected_in_training(plan, step), collectives_of(modules, plan, _traced_in)
    findings = [*differences(wanted, found), *_stored(trainer)]
    changing = trainer.changing()
    aliased = sum(len(module.aliases) for module in modules)
    copies = list(_copies(trainer, modules))
    if aliased != len(changing):
        findings.append(
            Finding(
                module="state",
                what=f"{len(changing) - aliased} of {len(changing)} tensors are not updated in place: each step writes them anew",
                bytes=0,
            )
        )
    if copies:
        findings.append(
            Finding(
                module="state",
                what=f"{len(copies)} whole tensors are copied every step",
                bytes=sum(copies),
            )
        )
    if len(modules) != 1:
        findings.append(
            Finding(
                module="program",
                what=f"{len(modules)} programs were compiled for one step",
                bytes=0,
            )
        )
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


def _traced_in(instruction: hlo.Instruction, _module: hlo.Module, _plan: Plan) -> str:
    """Every collective is asked for by name: see `regions`."""
    return instruction.scope or "input"


def _stored(trainer: Trainer) -> Iterator[Finding]:
    """Tensors of the state that lie otherwise than planned, on any device."""
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
        yield Finding(
            module=key[0],
            what=f"{count} tensor(s) lie as {key[1]} on a device, planned {key[2]}",
            bytes=cost[key],
        )


def _copies(trainer: Trainer, modules: list[hlo.Module]) -> Iterator[int]:
    """Bytes of every copy of a whole tensor of the state, read from or written over its buffer."""
    for module in modules:
        aliased = {
            module.parameters[number].name
            for number in module.aliases.values()
            if number in module.parameters
        }
        for each in module.of("copy"):
            if each.entry and aliased.intersection(each.operands) and each.bytes > 64:
                yield each.bytes
