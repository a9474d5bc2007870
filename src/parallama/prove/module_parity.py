"""A sharded model against the reference module by module: which module is the first to leave its
tolerance.

Two programs run the steps' own forward on the devices. One runs it as it is, and gives every
activation. The other replaces each activation by the reference's as soon as it is computed: there
every module is judged alone, on right inputs, and a fault shows in one module and not in all that
follow. Each data row of the mesh runs the sequence itself, so that all devices are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..engine.interface import Steps
from ..engine.steps import STATE_AXES
from ..engine.torch_xla.program import Program
from ..engine.torch_xla.steps import TorchXlaSteps
from ..errors import BackendError, UsageError, lines
from ..inference.state import put_span
from ..sharded.layout import correspondence
from .activations import Activation, activations, hooked
from .metrics import max_abs_diff, relative_l2
from .reference import ReferenceOutputs
from .tolerance import Tolerance

MOST_POSITIONS = 128
"""Modules are compared on at most so many positions.

All activations are kept, and are on the devices twice at once: the reference's and ours. In float32
they take 164 MB for SmolLM2 and 1.3 GB for an 8B Llama."""
_INSTEAD = "instead."


@dataclass(frozen=True, kw_only=True)
class ModuleFigures:
    """A module's activation against the reference's.

    Attributes:
        name: of the module; `activations` says what it stands for.
        relative_l2: in our run.
        max_abs_diff: in our run.
        inputs_ok: the module's inputs in our run were within their own tolerances.
        alone_relative_l2: on the reference's inputs.
        tolerance: of `alone_relative_l2`.
        ok: within it, and the error of our run does not begin here.
    """

    name: str
    relative_l2: float
    max_abs_diff: float
    inputs_ok: bool
    alone_relative_l2: float
    tolerance: float
    ok: bool


def torch_steps(steps: Steps) -> TorchXlaSteps:
    """The steps, of an engine that runs transformers' modules.

    Raises:
        BackendError: they are another engine's.
    """
    if not isinstance(steps, TorchXlaSteps):
        raise BackendError(
            lines(
                f"backend {steps.mesh.backend.name!r} runs none of transformers' modules",
                "expected a backend of torch-xla: modules are compared by hooks in them",
            )
        )
    return steps


def compare_modules(
    steps: Steps, reference: ReferenceOutputs, ids: Sequence[int], tolerance: Tolerance
) -> list[ModuleFigures]:
    """Run the first tokens of a text, and compare every module with the reference, in order.

    Args:
        ids: at most `MOST_POSITIONS`, the same as the reference's `traced`.

    Raises:
        BackendError: the engine runs none of transformers' modules.
        UsageError: there are more ids.
    """
    if len(ids) > MOST_POSITIONS:
        raise UsageError(
            lines(
                f"{len(ids)} tokens to compare modules on",
                f"expected at most {MOST_POSITIONS}: all activations are kept",
            )
        )
    steps = torch_steps(steps)
    watched = activations(steps.plan.model)
    longest = max(activation.terms for activation in watched)
    ours = dict(_distances(steps, reference, ids, watched, replaced=False))
    alone = dict(_distances(steps, reference, ids, watched, replaced=True))
    found: list[ModuleFigures] = []
    within: dict[str, bool] = {}
    for activation in watched:
        name, limit = activation.name, activation.alone(tolerance, len(ids))
        distance, largest = ours[name]
        alone_distance, _ = alone[name]
        inputs_ok = all(within[each] for each in activation.inputs)
        within[name] = distance <= max(limit, tolerance.depth(activation.depth, longest))
        found.append(
            ModuleFigures(
                name=name,
                relative_l2=distance,
                max_abs_diff=largest,
                inputs_ok=inputs_ok,
                alone_relative_l2=alone_distance,
                tolerance=limit,
                ok=alone_distance <= limit and (within[name] or not inputs_ok),
            )
        )
    return found


def first_fault(modules: Sequence[ModuleFigures]) -> str | None:
    """The first module that is out of its tolerance on the reference's inputs.

    If there is none, the first at which our run leaves the reference.
    """
    alone = (module.name for module in modules if not module.alone_relative_l2 <= module.tolerance)
    return next(alone, next((module.name for module in modules if not module.ok), None))


def _distances(
    steps: TorchXlaSteps,
    reference: ReferenceOutputs,
    ids: Sequence[int],
    watched: tuple[Activation, ...],
    *,
    replaced: bool,
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Relative L2 and largest difference of every activation, of one run on the devices.

    Args:
        replaced: each activation is replaced by the reference's.
    """
    plan, mesh, rows = steps.plan, steps.mesh, steps.mesh.shape.data
    by_name = {activation.name: activation for activation in watched}
    host = torch.tensor(ids)
    start = torch.zeros(rows, dtype=torch.int32)
    given = {
        "ids": mesh.put(host.expand(rows, *host.shape), STATE_AXES["ids"]),
        "start": mesh.put(start, STATE_AXES["start"]),
        **put_span(steps, len(ids)),
    }
    if replaced:
        for activation in watched:
            wanted = _laid_out(steps, activation, reference.activation(activation.name))[0]
            wanted = wanted.to(steps.dtype)
            given[_INSTEAD + activation.name] = mesh.put(
                wanted.expand(rows, *wanted.shape), activation.axes(plan)
            )

    def step(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
            seen[name] = mesh.mark(tensor, by_name[name].axes(plan))
            return given.get(_INSTEAD + name)

        def module(name: str) -> torch.nn.Module:
            return steps.base.get_submodule(name.removeprefix("model."))

        in_base = tuple(activation for activation in watched if activation.name != "lm_head")
        with hooked(in_base, module, keep):
            seen["lm_head"] = steps.logits(given)["logits"]
        return seen

    kind = "alone" if replaced else "together"
    outputs = Program(f"modules({kind}, {len(ids)} positions)", mesh, step, given)(given)
    del given
    for activation in watched:
        name = activation.name
        wanted = reference.activation(name)
        yield name, _distance(steps, activation, outputs.pop(name), wanted)


def _laid_out(
    steps: TorchXlaSteps, activation: Activation, reference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's `[S, W]` laid out for the devices, and which elements of its last dim are
    real: the others are padding, whose values mean nothing.
    """
    blocks = None if activation.like is None else steps.plan.blocks(activation.like[0])
    if blocks is None:
        return reference, torch.ones(reference.shape[-1], dtype=torch.bool)
    places, sources = correspondence(blocks)
    width = blocks.block * len(blocks.sources)
    real = torch.zeros(width, dtype=torch.bool)
    real[places] = True
    laid_out = reference.new_zeros(*reference.shape[:-1], width)
    return laid_out.index_copy_(-1, places, reference.index_select(-1, sources)), real


def _distance(
    steps: TorchXlaSteps, activation: Activation, tensor: torch.Tensor, reference: torch.Tensor
) -> tuple[float, float]:
    """Relative L2 and largest difference of all devices' parts from the reference's.

    NaN if anything, padding included, isn't finite.
    """
    mesh, axes = steps.mesh, activation.axes(steps.plan)
    wanted, real = _laid_out(steps, activation, reference)
    wanted = wanted.expand(tensor.shape)
    ours, theirs = [], []
    for device, part in enumerate(mesh.shards(tensor)):
        if not torch.isfinite(part).all():
            return math.nan, math.nan
        slices = mesh.local_slices(wanted.shape, axes, device)
        kept = real[slices[-1]]
        ours.append(part[..., kept].float().flatten())
        theirs.append(wanted[slices][..., kept].flatten())
    flat = torch.cat(ours), torch.cat(theirs)
    return relative_l2(*flat), max_abs_diff(*flat)
