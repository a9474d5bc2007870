"""A forecast: what a plan takes before anything runs, and whether that fits. Pure.

Every figure is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import FitError, PlanError, lines
from .alternatives import Alternatives
from .collectives import INFERENCE, Collective, Phase, expected_collectives
from .cost import Memory, parameter_count, shown_bytes
from .device_counts import DeviceCount, device_counts, suggested
from .fit import Fit, fit
from .layer_patterns import LayerPattern, layer_patterns, local_elements
from .placement import Plan
from .program_shapes import run_slots, slot_chunk
from .request import Request
from .train_collectives import expected_in_training
from .train_cost import TrainMemory, train_memory


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
    alternatives: Alternatives | None

    @property
    def prefill_positions(self) -> int:
        """`S` of one prefill step: a longer prompt takes several."""
        return slot_chunk(self.request.seq)

    def check(self) -> None:
        """Raise `FitError` if it is known not to fit."""
        hardware = self.request.hardware
        if self.fit is None or hardware is None or self.fit.fits:
            return
        largest = (
            f"the largest batch is {self.fit.largest_batch} at this context, "
            f"the largest context {self.fit.largest_context} at this batch"
        )
        some = self.fit.largest_batch or self.fit.largest_context
        raise FitError(
            lines(
                f"{self.name} on mesh {self.plan.mesh} needs "
                f"{shown_bytes(self.fit.needed_bytes)} on each device, "
                f"{hardware.name} has {shown_bytes(hardware.memory_bytes)}",
                largest if some else "no batch and no context fits",
                "use more devices along 'model', or a smaller dtype, batch or context"
                if self.alternatives is None
                else self.alternatives.advice(),
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        request = self.request
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
            "parameters": self._parameters(),
            "heads": self._heads(),
            "totals": self._totals(),
            "collectives": {
                phase: [asdict(each) for each in found] for phase, found in self.collectives.items()
            },
            "device_counts": [asdict(count) for count in self.device_counts],
            "hardware": self._hardware(),
            "fits": None if self.fit is None else self.fit.fits,
        }

    def _parameters(self) -> list[dict[str, Any]]:
        dtype, itemsize = self.request.dtype, self.request.itemsize
        return [
            {
                "name": placement.name,
                "shape": list(placement.shape),
                "dtype": dtype,
                "partition": list(placement.axes),
                "style": placement.style,
                "bytes_per_device": local_elements(self.plan, placement) * itemsize,
                "reason": placement.reason,
            }
            for placement in self.plan.parameters
        ]

    def _heads(self) -> dict[str, Any]:
        layout = self.plan.head_layout
        return {
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
        }

    def _totals(self) -> dict[str, Any]:
        return {
            "param_bytes_per_device": self.memory.params,
            "kv_bytes_per_device": self.memory.kv,
            "state_bytes_per_device": self.memory.state,
            "activation_bytes_per_device": self.memory.activations,
            "logits_bytes_per_device": self.memory.logits,
            "total_bytes_per_device": self.memory.total,
            "train": self._train_totals(),
        }

    def _train_totals(self) -> dict[str, Any] | None:
        train = self.train
        if train is None:
            return None
        return {
            "rematerialized_layers": self.request.rematerialized_layers,
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

    def _hardware(self) -> dict[str, Any] | None:
        hardware, found, instead = self.request.hardware, self.fit, self.alternatives
        smallest = None if instead is None else instead.smallest_mesh
        if hardware is None or found is None:
            return None
        return {
            "name": hardware.name,
            "memory_bytes_per_device": hardware.memory_bytes,
            "needed_bytes_per_device": found.needed_bytes,
            "largest_batch": found.largest_batch,
            "largest_context": found.largest_context,
            "sizing_only": hardware.sizing_only,
            "flops": hardware.flops,
            "memory_bytes_per_s": hardware.memory_bytes_per_s,
            "link_bytes_per_s": hardware.link_bytes_per_s,
            "smallest_mesh": None if instead is None or smallest is None else dict(smallest),
            "alternatives": [
                {
                    "options": each.options,
                    "needed_bytes_per_device": each.needed_bytes,
                    "saved_bytes_per_device": each.saved_bytes,
                    "fits": each.fits,
                }
                for each in (() if instead is None else instead.changes)
            ],
        }


def forecast(
    name: str,
    plan: Plan,
    request: Request,
    training_plan: Plan | None = None,
    alternatives: Callable[[], Alternatives | None] = lambda: None,
) -> Forecast:
    """Say what a plan takes for a request.

    Args:
        alternatives: finds what would fit instead.
        training_plan: of the training run, with adapters and what is split over "data"; the plan
            itself if None.

    Raises:
        UsageError: a number of the request is out of range.
    """
    request.check(plan.model)
    training_plan = training_plan or plan
    hardware, train = request.hardware, None
    if request.train is not None:
        slots = request.optimizer_slots
        train = train_memory(training_plan, request.train_step(), optimizer_slots=slots)
    counts, instead = suggested(plan.model, plan.mesh), alternatives()
    fits = None if instead is None else instead.counts
    return Forecast(
        name=name,
        plan=plan,
        training_plan=training_plan,
        request=request,
        patterns=layer_patterns(plan),
        memory=request.memory(plan),
        train=train,
        collectives=_collectives(plan, training_plan, request),
        device_counts=device_counts(plan.model, counts, request.itemsize, fits),
        fit=None if hardware is None else fit(plan, training_plan, request, hardware),
        alternatives=instead,
    )


def _collectives(
    plan: Plan, training_plan: Plan, request: Request
) -> dict[Phase, tuple[Collective, ...]]:
    """By phase; none in training for a plan of a user's own that training refuses."""
    found: dict[Phase, tuple[Collective, ...]] = {}
    for phase in INFERENCE:
        # A chunk of a prompt on every data shard, then one position of each slot.
        batch = plan.mesh.data if phase == "prefill" else run_slots(request.batch)
        positions = slot_chunk(request.seq)
        found[phase] = expected_collectives(
            plan, phase, batch=batch, positions=positions, itemsize=request.itemsize
        )
    try:
        found["train"] = expected_in_training(training_plan, request.train_step())
    except PlanError:
        found["train"] = ()
    return found
