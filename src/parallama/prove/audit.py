"""Hold a compiled step against its plan: the collectives in its optimized HLO, what the devices really store, and whether the cache is updated in place.

Two things are judged. The program against the plan: what was predicted must be what is there, to the byte, and nothing else. And the plan against the least that this mesh needs: a plan of the user's own
may be carried out faithfully and still cost more than it has to.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..engine.interface import Compiled, Steps
from ..engine.steps import StepKey
from ..inference.programs import ProgramSet
from ..plan.collectives import Collective, Phase, expected_collectives, grouped, minimal_collectives
from ..plan.layer_patterns import ranges, without_layer
from ..plan.mesh_shape import MeshShape
from ..plan.placement import Plan
from ..plan.program_shapes import CHUNK, cache_buckets, chunk_size
from ..sharded.device_weights import bytes_per_device
from . import hlo

ModuleOf = Callable[[hlo.Instruction, hlo.Module, Plan], str]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        module: where, as transformers names it; `*` stands for every layer it happens in.
        what: in words.
        bytes: what it costs each device a step, or what a device stores too much (less than 0: too little).
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
        programs: how many the phase compiled to.
        aliased: cache tensors, in training tensors of the state, whose buffers the program updates in place.
        cache_tensors: how many there are.
        param_bytes_per_device: measured on the devices.
        working_bytes: what the program takes on each device beside its arguments and results, as XLA sets it aside; of a training step.
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


def step_key(phase: Phase, batch: int, positions: int) -> StepKey:
    """The program that a session would use for a phase.

    Args:
        batch: rows over all devices.
        positions: of the prompt, for prefill; already cached, for decode.
    """
    if phase == "decode":
        return StepKey(
            kind="decode", batch=batch, length=cache_buckets(positions + 1, rows=batch)[-1]
        )
    new = chunk_size(positions)
    return StepKey(
        kind="prefill",
        batch=batch,
        length=cache_buckets(max(positions, new), rows=batch)[-1],
        new=new,
        fresh=positions <= CHUNK,
    )


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
        programs: of these steps; the key must not be among them yet.
        accept_plan: only judge the program against the plan.

    Raises:
        RunError: the engine was not started with `keep_hlo`.
    """
    mesh, plan = steps.mesh, steps.plan
    modules = [hlo.parse(text) for text in compiled(programs, key).hlo()]
    itemsize = steps.dtype.itemsize
    sizes: dict[str, Any] = {
        "batch": key.batch,
        "positions": key.new,
        "itemsize": itemsize,
        "sum_itemsize": max(itemsize, 4)
        if mesh.backend.name == "cpu"
        else None,  # XLA:CPU sums 16-bit numbers as fp32
    }
    wanted = expected_collectives(plan, phase, **sizes)
    layers = plan.model.layers
    found = collectives_of(modules, plan)
    findings = [*differences(wanted, found)]
    findings += _stored(steps)
    local = (
        -(-key.batch // plan.mesh.data),
        plan.head_layout.slots // plan.mesh.model,
        key.length,
        plan.model.head_dim,
    )
    aliased, cache_findings = _cache(modules, local, 2 * layers, itemsize)
    findings += cache_findings
    if len(modules) != 1:
        findings.append(
            Finding(
                module="program",
                what=f"{len(modules)} programs were compiled for one step",
                bytes=0,
            )
        )
    if not accept_plan:
        findings += over_the_least(wanted, minimal_collectives(plan, phase, **sizes))
    return Audit(
        phase=phase,
        expected=wanted,
        found=found,
        findings=tuple(findings),
        programs=len(modules),
        aliased=aliased,
        cache_tensors=2 * layers,
        param_bytes_per_device=tuple(bytes_per_device(mesh, steps.weights)),
    )


def compiled(programs: ProgramSet, key: StepKey) -> Compiled:
    """A step's program, compiled now if it isn't yet."""
    programs.warm_up([key])
    return programs[key]


def collectives_of(
    modules: Iterable[hlo.Module], plan: Plan, module_of: ModuleOf | None = None
) -> tuple[Collective, ...]:
    """The collectives of compiled programs, with the modules that they come from.

    Args:
        module_of: says whose a collective is; the module it was traced in, or whose product needs it, if None.
    """
    module_of = module_of or _module_of
    found = Counter(
        Collective(
            kind=instruction.opcode,
            axis=axis_of(hlo.replica_groups(instruction.text, plan.mesh.devices), plan.mesh),
            count=1,
            bytes=instruction.bytes,
            module=module_of(instruction, module, plan),
        )
        for module in modules
        for instruction in module.collectives
    )
    return grouped(found, plan.model.layers)


def axis_of(groups: Sequence[Sequence[int]], mesh: MeshShape) -> str:
    """The mesh axis along which groups of devices take part: `data`, `model`, `data+model`, or the groups themselves where they are none of these."""
    found = {tuple(sorted(group)) for group in groups}
    axes = list(mesh)
    for count in range(1, len(axes) + 1):
        for chosen in itertools.combinations(reversed(axes), count):
            if {tuple(group) for group in mesh.groups(*chosen)} == found:
                return "+".join(axis for axis in axes if axis in chosen)
    return str(sorted(found))


def _module_of(instruction: hlo.Instruction, module: hlo.Module, plan: Plan) -> str:
    """The module that makes a collective necessary: the one it was traced in, if that has a weight; else the one whose product reads the result."""
    if f"{instruction.scope}.weight" in plan or instruction.scope in ("sampling", "lm_head"):
        return instruction.scope
    reader = module.next_of(instruction, "dot")
    return reader.scope if reader is not None and reader.scope else instruction.scope or "input"


def differences(wanted: Sequence[Collective], found: Sequence[Collective]) -> Iterable[Finding]:
    """What is found and not wanted, and the other way round."""
    there, planned = _counts(found), _counts(wanted)
    for (kind, axis, size, module), count in (there - planned).items():
        what = f"{kind} over {axis!r}, {count} of {size} bytes, which the plan does not need"
        yield Finding(module=module, what=what, bytes=count * size)
    for (kind, axis, size, module), count in (planned - there).items():
        what = f"{kind} over {axis!r}, {count} of {size} bytes, is planned and not there"
        yield Finding(module=module, what=what, bytes=-count * size)


def over_the_least(
    wanted: Sequence[Collective], minimum: Sequence[Collective]
) -> Iterable[Finding]:
    """What a plan needs and the least for its mesh doesn't have."""
    for (kind, axis, size, module), count in (_counts(wanted) - _counts(minimum)).items():
        what = f"the plan needs {kind} over {axis!r}, {count} of {size} bytes, which this mesh can do without"
        yield Finding(module=module, what=what, bytes=count * size)


def _counts(collectives: Sequence[Collective]) -> Counter[tuple[str, str, int, str]]:
    return Counter(
        {(each.kind, each.axis, each.bytes, each.module): each.count for each in collectives}
    )


def _stored(steps: Steps) -> Iterable[Finding]:
    """Parameters that lie otherwise than planned, on any device."""
    wrong: dict[tuple[str, str, str], list[tuple[int | None, int]]] = {}
    for placement in steps.plan.parameters:
        planned = placement.local_shape(steps.plan.mesh)
        for shape in dict.fromkeys(steps.mesh.local_shapes(steps.weights[placement.name])):
            if shape != planned:
                name, layer = without_layer(placement.name.removesuffix(".weight"))
                wrong.setdefault((name, str(list(shape)), str(list(planned))), []).append(
                    (layer, math.prod(shape) - math.prod(planned))
                )
    for (name, lying, wanted), members in wrong.items():
        numbers = [layer for layer, _ in members if layer is not None]
        module = (
            name
            if len(numbers) in (0, steps.plan.model.layers)
            else name.replace("*", ranges(numbers), 1)
        )
        what = f"{len(members)} parameter(s) lie as {lying} on a device, planned {wanted}"
        yield Finding(
            module=module, what=what, bytes=sum(more for _, more in members) * steps.dtype.itemsize
        )


def _cache(
    modules: Sequence[hlo.Module], local: tuple[int, ...], tensors: int, itemsize: int
) -> tuple[int, list[Finding]]:
    """How many cache tensors are updated in place, and what is wrong with the others.

    Args:
        local: shape of a cache tensor on a device.
    """
    size, findings = math.prod(local) * itemsize, []
    given = [
        number
        for module in modules
        for number, each in module.parameters.items()
        if each.results[0].shape == local
    ]
    aliased = [
        number for module in modules for number in module.aliases.values() if number in given
    ]
    # Some widen 16-bit caches on the way: a copy is a copy in any dtype.
    copies = [
        each for module in modules for each in module.of("copy") if each.results[0].shape == local
    ]
    if len(given) != tensors:
        what = f"{len(given)} of {tensors} tensors lie as {list(local)} on a device, as planned"
        findings.append(Finding(module="cache", what=what, bytes=0))
    elif len(aliased) != tensors:
        what = f"{tensors - len(aliased)} of {tensors} tensors are not updated in place: each step writes them anew"
        findings.append(Finding(module="cache", what=what, bytes=(tensors - len(aliased)) * size))
    if copies:
        findings.append(
            Finding(
                module="cache",
                what=f"{len(copies)} whole tensors are copied every step",
                bytes=len(copies) * size,
            )
        )
    return len(aliased), findings
