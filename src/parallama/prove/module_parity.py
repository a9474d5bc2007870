"""A sharded model against the reference module by module: which is the first to leave its tolerance.

Two programs run the steps' own forward on the devices. In one it runs as it is, and every point's output comes out. In the other each output is replaced by the reference's
as soon as it is taken, so that every module is judged alone, on inputs that are right; a fault shows in one module and not in all that follow.

All devices are looked at, those too that hold copies of the same: each of the mesh's rows runs the sequence itself.
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
from ..errors import BackendError, lines
from ..inference.state import put_span
from ..sharded.layout import correspondence
from .activations import Point, points, tapped
from .metrics import max_abs_diff, relative_l2
from .reference import Answers
from .tolerance import Tolerance

MOST_POSITIONS = 128
"""Modules are compared on so many positions at most. All their outputs are kept, in float32 164 MB for SmolLM2 and 1.3 GB for an 8B Llama, and they lie on the devices twice at once:
the reference's and ours."""
_INSTEAD = "instead."


@dataclass(frozen=True, kw_only=True)
class ModuleFigures:
    """A module's output against the reference's.

    Attributes:
        name: of the module; `points` says what it stands for.
        relative_l2: in our run.
        max_abs_diff: in our run.
        inputs_ok: what the module was given in our run was within its own tolerances.
        alone_relative_l2: when it was given the reference's inputs.
        tolerance: of `alone_relative_l2`.
        ok: within it; and in our run not the place where the error begins.
    """

    name: str
    relative_l2: float
    max_abs_diff: float
    inputs_ok: bool
    alone_relative_l2: float
    tolerance: float
    ok: bool


def compare_modules(
    steps: Steps, answers: Answers, ids: Sequence[int], tolerance: Tolerance
) -> list[ModuleFigures]:
    """Run the first tokens of a text, and hold every module against the reference, in order.

    Args:
        ids: at most `MOST_POSITIONS`, the same as the reference's `traced`.
    """
    assert len(ids) <= MOST_POSITIONS
    if not isinstance(steps, TorchXlaSteps):
        raise BackendError(
            lines(
                f"backend {steps.mesh.backend.name!r} has no transformers modules to look into",
                "expected one that torch-xla runs",
            )
        )
    watched = points(steps.plan.model)
    longest = max(point.terms for point in watched)
    ours, alone = (
        dict(_distances(steps, answers, ids, watched, replaced=replaced))
        for replaced in (False, True)
    )
    found: list[ModuleFigures] = []
    within: dict[str, bool] = {}
    for point in watched:
        limit = point.alone(tolerance, len(ids))
        (distance, largest), (alone_distance, _) = ours[point.name], alone[point.name]
        inputs_ok = all(within[name] for name in point.inputs)
        within[point.name] = distance <= max(limit, tolerance.depth(point.depth, longest))
        found.append(
            ModuleFigures(
                name=point.name,
                relative_l2=distance,
                max_abs_diff=largest,
                inputs_ok=inputs_ok,
                alone_relative_l2=alone_distance,
                tolerance=limit,
                ok=alone_distance <= limit and (within[point.name] or not inputs_ok),
            )
        )
    return found


def first_fault(modules: Sequence[ModuleFigures]) -> str | None:
    """The first module that is out of its tolerance on the reference's inputs, or else where our run leaves the reference."""
    alone = (module.name for module in modules if not module.alone_relative_l2 <= module.tolerance)
    return next(alone, next((module.name for module in modules if not module.ok), None))


def _distances(
    steps: TorchXlaSteps,
    answers: Answers,
    ids: Sequence[int],
    watched: tuple[Point, ...],
    *,
    replaced: bool,
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Relative L2 and largest difference of every point, of one run on the devices."""
    plan, mesh = steps.plan, steps.mesh
    by_name = {point.name: point for point in watched}
    rows = mesh.shape.data

    def put(name: str, host: torch.Tensor) -> torch.Tensor:
        return mesh.put(
            host.expand(rows, *host.shape),
            STATE_AXES[name] if name in STATE_AXES else by_name[name].axes(plan),
        )

    arguments = {
        "ids": put("ids", torch.tensor(ids)),
        "start": mesh.put(torch.zeros(rows, dtype=torch.int32), STATE_AXES["start"]),
    }
    arguments |= put_span(steps, len(ids))
    if replaced:
        for point in watched:
            reference = _laid_out(steps, point, answers.point(point.name))[0].to(steps.dtype)
            arguments[_INSTEAD + point.name] = put(point.name, reference)

    def step(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def tap(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
            seen[name] = mesh.mark(tensor, by_name[name].axes(plan))
            return given.get(_INSTEAD + name)

        in_base = tuple(point for point in watched if point.name != "lm_head")
        with tapped(
            in_base, lambda name: steps.base.get_submodule(name.removeprefix("model.")), tap
        ):
            seen["lm_head"] = steps.logits(given)["logits"]
        return seen

    kind = "alone" if replaced else "together"
    outputs = Program(f"modules({kind}, {len(ids)} positions)", mesh, step, arguments)(arguments)
    del arguments
    for point in watched:
        yield (
            point.name,
            _distance(steps, point, outputs.pop(point.name), answers.point(point.name)),
        )


def _laid_out(
    steps: TorchXlaSteps, point: Point, reference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's `[S, W]` as it lies over the devices, and which of the last dim are real: the others are padding, whose values mean nothing."""
    blocks = None if point.like is None else steps.plan.blocks(point.like[0])
    if blocks is None:
        return reference, torch.ones(reference.shape[-1], dtype=torch.bool)
    places, sources = correspondence(blocks)
    width = blocks.block * len(blocks.sources)
    real = torch.zeros(width, dtype=torch.bool)
    real[places] = True
    return reference.new_zeros(*reference.shape[:-1], width).index_copy_(
        -1, places, reference.index_select(-1, sources)
    ), real


def _distance(
    steps: TorchXlaSteps, point: Point, tensor: torch.Tensor, reference: torch.Tensor
) -> tuple[float, float]:
    """Every device's part of a point against the reference's: relative L2 and largest difference. NaN if anything, padding included, isn't finite."""
    mesh, axes = steps.mesh, point.axes(steps.plan)
    wanted, real = _laid_out(steps, point, reference)
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
