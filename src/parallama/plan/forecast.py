"""A forecast: what a plan takes before anything runs, whether that fits, and which device counts suit the model. Pure; every figure is predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import FitError, PlanError, UsageError, lines
from ..model.known_configs import ITEMSIZES
from ..model.spec import ModelSpec
from . import heads
from .collectives import INFERENCE, Collective, Phase, expected_collectives
from .cost import Memory, memory, parameter_count, shown_bytes
from .hardware import Hardware
from .layer_patterns import LayerPattern, layer_patterns, local_elements
from .make_plan import make_plan
from .mesh_shape import MeshShape
from .placement import Plan
from .program_shapes import chunk_size
from .train_collectives import TrainStep, expected_in_training
from .train_cost import TrainMemory, train_memory

MOST_DEVICES = 64
DEFAULT_PROMPT = 512


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a plan is asked to do.

    Attributes:
        batch: rows over all devices.
        seq: tokens of each prompt, or of each row in training.
        max_model_len: positions of the cache, prompt and answer together.
        dtype: of weights, cache and activations: a name of `configs.ITEMSIZES`.
        stored_dtype: of the checkpoint, if its config says so.
        train: forecast this training step too; its sizes are those of the request.
        optimizer_slots: numbers that the optimizer keeps of each that is trained.
        hardware: to say whether it fits.
    """

    batch: int
    seq: int
    max_model_len: int
    dtype: str
    stored_dtype: str | None = None
    train: TrainStep | None = None
    optimizer_slots: int = 2
    hardware: Hardware | None = None

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class DeviceCount:
    """How a model lies on so many devices along "model".

    Attributes:
        kind: of the head layout: divide, pad, repeat, repeat+pad.
        query_heads, kv_heads, intermediate, vocab: after layout and padding.
        extra_weight_percent: weights beyond the model's own, over all devices, in % (replicated norms not counted).
        extra_cache_percent: the same of the KV cache.
        param_bytes_per_device: weights of each device.
    """

    devices: int
    kind: str
    query_heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    extra_weight_percent: float
    extra_cache_percent: float
    param_bytes_per_device: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether a request fits a hardware's devices.

    Attributes:
        fits: a training step as it is asked for, with --train.
        needed_bytes: on each device.
        largest_batch: at the given context; 0 if no batch fits.
        largest_context: at the given batch, up to the model's maximum; 0 if none fits. In training the rows' length.
    """

    fits: bool
    needed_bytes: int
    largest_batch: int
    largest_context: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """All that is said of a plan. Made by `forecast`."""

    name: str
    plan: Plan
    training_plan: Plan
    request: Request
    patterns: tuple[LayerPattern, ...]
    memory: Memory
    train: TrainMemory | None
    collectives: Mapping[Phase, tuple[Collective, ...]]
    device_counts: tuple[DeviceCount, ...]
    fit: Fit | None

    @property
    def prefill_positions(self) -> int:
        """`S` of one prefill program: a longer prompt takes several."""
        return chunk_size(self.request.seq)

    def check(self) -> None:
        """Raise `FitError` if it is known not to fit."""
        hardware = self.request.hardware
        if self.fit is None or hardware is None or self.fit.fits:
            return
        largest = f"the largest batch is {self.fit.largest_batch} at this context, the largest context {self.fit.largest_context} at this batch"
        some = self.fit.largest_batch or self.fit.largest_context
        raise FitError(
            lines(
                f"{self.name} on mesh {self.plan.mesh} needs {shown_bytes(self.fit.needed_bytes)} on each device, "
                f"{hardware.name} has {shown_bytes(hardware.memory_bytes)}",
                largest if some else "no batch and no context fits",
                "use more devices along 'model', or a smaller dtype, batch or context",
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        layout, request, train = self.plan.head_layout, self.request, self.train
        totals: dict[str, Any] = {
            "param_bytes_per_device": self.memory.params,
            "kv_bytes_per_device": self.memory.kv,
            "kv_growth_bytes_per_device": self.memory.growth,
            "activation_bytes_per_device": self.memory.activations,
            "logits_bytes_per_device": self.memory.logits,
            "total_bytes_per_device": self.memory.total,
            "train": None,
        }
        if train is not None:
            totals["train"] = {
                "rematerialized_layers": len(request.train.rematerialized)
                if request.train is not None
                else 0,
                "param_bytes_per_device": train.params,
                "gradient_bytes_per_device": train.gradients,
                "optimizer_bytes_per_device": train.optimizer,
                "copy_bytes_per_device": train.copies,
                "activation_bytes_per_device": train.activations,
                "activation_remat_bytes_per_device": train.activations_remat,
                "logits_bytes_per_device": train.logits,
                "working_bytes_per_device": train.working,
                "total_bytes_per_device": train.total,
                "total_remat_bytes_per_device": train.total_remat,
            }
        hardware = None
        if request.hardware is not None and self.fit is not None:
            hardware = {
                "name": request.hardware.name,
                "memory_bytes_per_device": request.hardware.memory_bytes,
                "needed_bytes_per_device": self.fit.needed_bytes,
                "largest_batch": self.fit.largest_batch,
                "largest_context": self.fit.largest_context,
            }
        return {
            "model": self.name,
            "parameter_count": parameter_count(self.plan.model),
            "mesh": dict(self.plan.mesh),
            "dtype": request.dtype,
            "stored_dtype": request.stored_dtype,
            "batch": request.batch,
            "seq": request.seq,
            "max_model_len": request.max_model_len,
            "prefill_positions": self.prefill_positions,
            "parameters": [
                {
                    "name": placement.name,
                    "shape": list(placement.shape),
                    "dtype": request.dtype,
                    "partition": list(placement.axes),
                    "style": placement.style,
                    "bytes_per_device": local_elements(self.plan, placement) * request.itemsize,
                    "reason": placement.reason,
                }
                for placement in self.plan.parameters
            ],
            "heads": {
                "query_heads": layout.query_heads,
                "kv_heads": layout.kv_heads,
                "head_dim": self.plan.model.head_dim,
                "kind": layout.kind,
                "group": layout.group,
                "laid_out_query_heads": len(layout.query_sources),
                "laid_out_kv_heads": layout.slots,
                "extra_weight_percent": layout.extra_weight_percent,
                "extra_score_percent": layout.extra_score_percent,
                "extra_cache_percent": layout.extra_cache_percent,
                "reason": layout.reason,
            },
            "totals": totals,
            "collectives": {
                phase: [asdict(item) for item in found] for phase, found in self.collectives.items()
            },
            "device_counts": [asdict(count) for count in self.device_counts],
            "hardware": hardware,
            "fits": None if self.fit is None else self.fit.fits,
        }


def forecast(
    name: str, plan: Plan, request: Request, training_plan: Plan | None = None
) -> Forecast:
    """Say what a plan takes for a request.

    Args:
        training_plan: the same for a training run, with adapters and what is split over "data"; the plan itself if None.

    Raises:
        UsageError: a number of the request is out of range.
    """
    _check(plan.model, request)
    phases: dict[Phase, tuple[Collective, ...]] = {}
    for phase in INFERENCE:
        positions = chunk_size(request.seq) if phase == "prefill" else request.seq
        phases[phase] = expected_collectives(
            plan, phase, batch=request.batch, positions=positions, itemsize=request.itemsize
        )
    training_plan = training_plan or plan
    phases["train"] = _train_collectives(training_plan, request)
    return Forecast(
        name=name,
        plan=plan,
        training_plan=training_plan,
        request=request,
        patterns=layer_patterns(plan),
        memory=_memory(plan, request),
        train=None
        if request.train is None
        else train_memory(training_plan, _step(request), optimizer_slots=request.optimizer_slots),
        collectives=phases,
        device_counts=device_counts(
            plan.model, _suggested(plan.model, plan.mesh), request.itemsize
        ),
        fit=_fit(plan, training_plan, request, request.hardware)
        if request.hardware is not None
        else None,
    )


def device_counts(
    model: ModelSpec, counts: Sequence[int], itemsize: int
) -> tuple[DeviceCount, ...]:
    """How the model would lie on each of these device counts, by its own plan."""
    own = _parameter_elements(model, 1)[0]
    rows = []
    for devices in counts:
        everywhere, local = _parameter_elements(model, devices)
        layout = heads.choose(model.query_heads, model.kv_heads, devices)
        rows.append(
            DeviceCount(
                devices=devices,
                kind=layout.kind,
                query_heads=len(layout.query_sources),
                kv_heads=layout.slots,
                intermediate=heads.padded(model.intermediate, devices),
                vocab=heads.padded(model.vocab, devices),
                extra_weight_percent=100.0 * (everywhere / own - 1),
                extra_cache_percent=layout.extra_cache_percent,
                param_bytes_per_device=local * itemsize,
            )
        )
    return tuple(rows)


def largest(fits: Callable[[int], bool], most: int | None = None) -> int:
    """The largest number from 1 (up to `most`) that fits, where all below a fitting one fit too; 0 if none does. Without `most` some number must not fit."""
    if not fits(1):
        return 0
    if most is not None and fits(most):
        return most
    good, bad = 1, 2
    while (most is None or bad < most) and fits(bad):
        good, bad = bad, bad * 2
    bad = bad if most is None else min(bad, most)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _check(model: ModelSpec, request: Request) -> None:
    for name, value, most in (
        ("--batch", request.batch, 1 << 20),
        ("--max-model-len", request.max_model_len, model.max_positions),
        ("--seq", request.seq, request.max_model_len),
    ):
        if not 1 <= value <= most:
            whose = {
                "--max-model-len": ", the model's maximum",
                "--seq": ", the maximum length",
            }.get(name, "")
            raise UsageError(lines(f"{name} is {value}", f"expected 1 to {most}{whose}"))


def _memory(plan: Plan, request: Request) -> Memory:
    return memory(
        plan,
        batch=request.batch,
        prompt=request.seq,
        max_model_len=request.max_model_len,
        itemsize=request.itemsize,
    )


def _train_collectives(plan: Plan, request: Request) -> tuple[Collective, ...]:
    """Empty for a plan of a user's own that training refuses."""
    try:
        return expected_in_training(plan, _step(request))
    except PlanError:
        return ()


def _step(request: Request) -> TrainStep:
    sizes: dict[str, Any] = {
        "batch": request.batch,
        "seq": request.seq,
        "itemsize": request.itemsize,
    }
    return replace(request.train, **sizes) if request.train is not None else TrainStep(**sizes)


def _fit(plan: Plan, training_plan: Plan, request: Request, hardware: Hardware) -> Fit:
    def needed(changed: Request) -> int:
        if changed.train is None:
            return _memory(plan, changed).total
        return train_memory(
            training_plan, _step(changed), optimizer_slots=changed.optimizer_slots
        ).total

    def at_context(length: int) -> Request:
        if request.train is not None:
            return replace(request, seq=length)
        return replace(request, max_model_len=length, seq=min(request.seq, length))

    return Fit(
        fits=needed(request) <= hardware.memory_bytes,
        needed_bytes=needed(request),
        largest_batch=largest(
            lambda batch: needed(replace(request, batch=batch)) <= hardware.memory_bytes
        ),
        largest_context=largest(
            lambda length: needed(at_context(length)) <= hardware.memory_bytes,
            plan.model.max_positions,
        ),
    )


def _parameter_elements(model: ModelSpec, devices: int) -> tuple[int, int]:
    """Elements of all parameters after layout and padding, each counted once, and those that one device holds. Layers are alike: one is planned."""
    plan = make_plan(replace(model, layers=1), MeshShape(model=devices))
    everywhere = local = 0
    for placement in plan.parameters:
        times = model.layers if ".layers." in placement.name else 1
        everywhere += times * math.prod(int(size) for size in placement.shape)
        local += times * local_elements(plan, placement)
    return everywhere, local


def _suggested(model: ModelSpec, mesh: MeshShape) -> list[int]:
    """Device counts worth a line: powers of two, divisors of the KV heads and their doubles, and the one asked for."""
    powers = {1 << power for power in range(MOST_DEVICES.bit_length())}
    divisors = {
        count
        for count in range(1, MOST_DEVICES + 1)
        if model.kv_heads % count == 0 or (2 * model.kv_heads) % count == 0
    }
    return sorted({count for count in powers | divisors if count <= MOST_DEVICES} | {mesh.model})
