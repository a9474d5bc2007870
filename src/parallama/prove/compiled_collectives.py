"""The collectives of compiled programs, and how they differ from the plan's. Pure."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..plan.collectives import Collective, grouped
from ..plan.mesh_shape import MeshShape
from ..plan.placement import Plan
from . import hlo
from .findings import Finding

_WITHOUT_WEIGHT = ("lm_head", "sampling", "sampling.truncation")
ModuleOf = Callable[[hlo.Instruction, hlo.Module, Plan], str]
"""Says which module of the model a collective belongs to."""


def needing_module(instruction: hlo.Instruction, module: hlo.Module, plan: Plan) -> str:
    """The module of the model that makes a collective necessary.

    It is the one that the collective was traced in, if that has a weight; else the one whose
    product reads the result.
    """
    if f"{instruction.scope}.weight" in plan or instruction.scope in _WITHOUT_WEIGHT:
        return instruction.scope
    reader = module.next_of(instruction, "dot")
    if reader is not None and reader.scope:
        return reader.scope
    return instruction.scope or "input"


def collectives_of(
    modules: Iterable[hlo.Module], plan: Plan, module_of: ModuleOf = needing_module
) -> tuple[Collective, ...]:
    """The collectives of compiled programs, with the modules of the model that they belong to."""
    found = Counter(
        Collective(
            kind=instruction.opcode,
            axis=axis_of(hlo.replica_groups(instruction.text, plan.mesh.devices), plan.mesh),
            count=1,
            bytes=instruction.bytes,
            module=module_of(instruction, module, plan),
        )
        for module in modules
        # Those of branches and loops come last, as in the plan.
        for instruction in sorted(module.collectives, key=lambda each: not each.entry)
    )
    return grouped(found, plan.model.layers)


def axis_of(groups: Sequence[Sequence[int]], mesh: MeshShape) -> str:
    """The mesh axis along which groups of devices communicate.

    Returns:
        `data`, `model` or `data+model`; the groups themselves where they are none of these.
    """
    found = {tuple(sorted(group)) for group in groups}
    axes = list(mesh)
    for count in range(1, len(axes) + 1):
        for chosen in itertools.combinations(reversed(axes), count):
            if {tuple(group) for group in mesh.groups(*chosen)} == found:
                return "+".join(axis for axis in axes if axis in chosen)
    return str(sorted(found))


def differences(wanted: Sequence[Collective], found: Sequence[Collective]) -> Iterator[Finding]:
    """What is found and not wanted, and what is wanted and not found."""
    there, planned = _counts(found), _counts(wanted)
    for (kind, axis, size, module), count in (there - planned).items():
        what = f"{kind} over {axis!r}, {count} of {size} bytes, which the plan does not need"
        yield Finding(module=module, what=what, bytes=count * size)
    for (kind, axis, size, module), count in (planned - there).items():
        what = f"{kind} over {axis!r}, {count} of {size} bytes, is planned and not there"
        yield Finding(module=module, what=what, bytes=-count * size)


def over_the_least(
    wanted: Sequence[Collective], minimum: Sequence[Collective]
) -> Iterator[Finding]:
    """What a plan needs beyond the least for its mesh."""
    for (kind, axis, size, module), count in (_counts(wanted) - _counts(minimum)).items():
        collective = f"{kind} over {axis!r}, {count} of {size} bytes"
        what = f"the plan needs {collective}, which this mesh can do without"
        yield Finding(module=module, what=what, bytes=count * size)


def _counts(collectives: Sequence[Collective]) -> Counter[tuple[str, str, int, str]]:
    return Counter(
        {(each.kind, each.axis, each.bytes, each.module): each.count for each in collectives}
    )
