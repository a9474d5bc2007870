"""Holds a compiled step against its plan: the collectives in its optimized HLO, what the devices
really store, and whether the cache is updated in place.

The program is judged against the plan: what was predicted must be there, to the byte, and nothing
else. And the plan is judged against the least that its mesh needs: a plan of the user's own may be
carried out faithfully and still cost more than it has to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ..engine.interface import Compiled, Steps
from ..engine.steps import StepKey
from ..inference.programs import ProgramSet
from ..inference.slot_shapes import SlotShapes
from ..plan.collectives import Phase, expected_collectives, minimal_collectives
from ..plan.layer_patterns import ranges, without_layer
from ..plan.program_shapes import slot_chunk
from ..sharded.device_weights import bytes_per_device
from . import hlo
from .compiled_collectives import collectives_of, differences, over_the_least
from .findings import Audit, Finding


def step_key(phase: Phase, slots: int, positions: int, shards: int) -> StepKey:
    """The program that a session with slots would use for a phase; of decode the one for all slots.

    Args:
        positions: of the prompt, for prefill; already cached, for others.
        shards: size of the mesh's data axis.
    """
    together = positions + (phase != "prefill")
    shapes = SlotShapes.of(slots=slots, positions=together, shards=shards)
    if phase == "prefill":
        return shapes.prefill(slot_chunk(positions))
    return shapes.copy() if phase == "copy" else shapes.decode(shapes.per_shard)


def audit(
    steps: Steps,
    programs: ProgramSet,
    phase: Phase,
    key: StepKey,
    *,
    accept_plan: bool = False,
) -> Audit:
    """Compile one step and judge it.

    Args:
        programs: of these steps.
        accept_plan: judge only the program against the plan.

    Raises:
        RunError: the engine was not started with `keep_hlo`.
    """
    mesh, plan, itemsize = steps.mesh, steps.plan, steps.dtype.itemsize
    modules = [hlo.parse(text) for text in compiled(programs, key).hlo()]
    sizes: dict[str, Any] = {
        "batch": mesh.shape.data if key.kind == "slot_prefill" else key.rows or key.batch,
        "positions": key.new,
        "itemsize": itemsize,
        "sum_itemsize": max(itemsize, mesh.traits.sum_bytes),
        "slots": key.kind.startswith("slot_"),
    }
    wanted = expected_collectives(plan, phase, **sizes)
    found = collectives_of(modules, plan)
    tensors = 2 * plan.model.layers
    cache_shape = (
        key.batch // plan.mesh.data,
        plan.head_layout.slots // plan.mesh.model,
        key.length,
        plan.model.head_dim,
    )
    aliased = _aliased(modules, cache_shape)
    findings = [
        *differences(wanted, found),
        *_misplaced(steps),
        *_cache_findings(modules, cache_shape, tensors, itemsize),
        *one_program(modules),
    ]
    if not accept_plan:
        findings += over_the_least(wanted, minimal_collectives(plan, phase, **sizes))
    return Audit(
        phase=phase,
        expected=wanted,
        found=found,
        findings=tuple(findings),
        programs=len(modules),
        aliased=aliased,
        cache_tensors=tensors,
        param_bytes_per_device=tuple(bytes_per_device(mesh, steps.weights)),
    )


def compiled(programs: ProgramSet, key: StepKey) -> Compiled:
    """A step's program, compiled now if it isn't yet."""
    programs.warm_up([key])
    return programs[key]


def one_program(modules: Sequence[hlo.Module]) -> Iterator[Finding]:
    """A finding if a step was compiled to more programs than one, or to none."""
    if len(modules) != 1:
        what = f"{len(modules)} programs were compiled for one step"
        yield Finding(module="program", what=what, bytes=0)


def _misplaced(steps: Steps) -> Iterator[Finding]:
    """Parameters that are placed otherwise than planned, on any device."""
    wrong: dict[tuple[str, str, str], list[tuple[int | None, int]]] = {}
    for placement in steps.plan.parameters:
        planned = placement.local_shape(steps.plan.mesh)
        for shape in dict.fromkeys(steps.mesh.local_shapes(steps.weights[placement.name])):
            if shape != planned:
                name, layer = without_layer(placement.name.removesuffix(".weight"))
                key = (name, str(list(shape)), str(list(planned)))
                more = math.prod(shape) - math.prod(planned)
                wrong.setdefault(key, []).append((layer, more))
    for (name, shape_text, planned_text), members in wrong.items():
        layers = [layer for layer, _ in members if layer is not None]
        if len(layers) not in (0, steps.plan.model.layers):
            name = name.replace("*", ranges(layers), 1)
        stored = f"{len(members)} parameter(s) are stored as {shape_text} on a device"
        size = sum(more for _, more in members) * steps.dtype.itemsize
        yield Finding(module=name, what=f"{stored}, planned {planned_text}", bytes=size)


def _cache_parameters(module: hlo.Module, shape: tuple[int, ...]) -> set[int]:
    """The numbers of the arguments that have a cache tensor's shape on a device."""
    return {number for number, each in module.parameters.items() if each.shape == shape}


def _aliased(modules: Sequence[hlo.Module], shape: tuple[int, ...]) -> int:
    """How many cache tensors are updated in place."""
    return sum(
        number in _cache_parameters(module, shape)
        for module in modules
        for number in module.aliases.values()
    )


def _cache_findings(
    modules: Sequence[hlo.Module], shape: tuple[int, ...], tensors: int, itemsize: int
) -> Iterator[Finding]:
    """What is wrong with the cache.

    Args:
        shape: of a cache tensor on a device.
        tensors: how many there are.
        itemsize: bytes of a number.
    """
    size = math.prod(shape) * itemsize
    given = sum(len(_cache_parameters(module, shape)) for module in modules)
    rewritten = tensors - _aliased(modules, shape)
    if given != tensors:
        what = f"{given} of {tensors} tensors are stored as {list(shape)} on a device, as planned"
        yield Finding(module="cache", what=what, bytes=0)
    elif rewritten:
        what = f"{rewritten} of {tensors} tensors are not updated in place"
        yield Finding(
            module="cache", what=f"{what}: each step writes them anew", bytes=rewritten * size
        )
    # Some programs widen 16-bit caches on the way: a copy is a copy in any dtype.
    copies = sum(each.shape == shape for module in modules for each in module.of("copy"))
    if copies:
        what = f"{copies} whole tensors are copied every step"
        yield Finding(module="cache", what=what, bytes=copies * size)
