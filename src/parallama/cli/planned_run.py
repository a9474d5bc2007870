"""The run that `parallama plan` is asked about, and what would fit instead of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..model.spec import ModelSpec
from ..plan.alternatives import Alternative, Alternatives, bytes_on, smallest_mesh
from ..plan.device_counts import suggested
from ..plan.fit import Fit, fit, needed_bytes
from ..plan.make_plan import make_plan
from ..plan.mesh_shape import MeshShape
from ..plan.overrides import Overrides
from ..plan.placement import Plan
from ..plan.request import Request
from ..train.layout import train_step, training_plan
from ..train.options import LoraOptions, StepOptions, slots


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run on a mesh.

    Attributes:
        base: its sizes, without the training step.
        step: how a training step is done; None without one.
    """

    spec: ModelSpec
    mesh: MeshShape
    overrides: Overrides | None
    base: Request
    step: StepOptions | None

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self.spec, self.mesh, self.overrides)

    @cached_property
    def training_plan(self) -> Plan | None:
        """With adapters and what is split over "data"; None if it is the plan itself."""
        if self.step is None or not (self.step.fsdp or self.step.lora):
            return None
        return training_plan(self.plan, fsdp=self.step.fsdp, lora=self.step.lora)

    @cached_property
    def request(self) -> Request:
        if self.step is None:
            return self.base
        step = train_step(self.step, self.spec.layers)
        return replace(self.base, train=step, optimizer_slots=len(slots(self.step)))

    def alternatives(self) -> Alternatives | None:
        """What would fit instead; None where no hardware was given."""
        hardware = self.base.hardware
        if hardware is None:
            return None
        room, counts = hardware.memory_bytes, suggested(self.spec, self.mesh)
        needed = {self.mesh: self.needed}

        def on(mesh: MeshShape) -> int:
            if mesh not in needed:
                needed[mesh] = replace(self, mesh=mesh).needed
            return needed[mesh]

        def fits_on(count: int) -> bool:
            found = bytes_on(on, MeshShape(data=self.mesh.data, model=count))
            return found is not None and found <= room

        return Alternatives(
            smallest_mesh=smallest_mesh(on, room, rows=self.base.batch, counts=counts),
            counts={count: fits_on(count) for count in counts},
            changes=() if on(self.mesh) <= room else tuple(self._changes(room)),
        )

    @cached_property
    def needed(self) -> int:
        """Bytes on each device."""
        return needed_bytes(self.plan, self.training_plan or self.plan, self.request)

    @cached_property
    def fit(self) -> Fit:
        """Held against the hardware, which there is."""
        assert self.base.hardware is not None
        return fit(self.plan, self.training_plan or self.plan, self.request, self.base.hardware)

    def _changes(self, room: int) -> Iterator[Alternative]:
        """Single changes, those that suffice first, and all of them together."""

        def changed(options: str, needed: int) -> Alternative:
            saved = self.needed - needed
            return Alternative(
                options=options, needed_bytes=needed, saved_bytes=saved, fits=needed <= room
            )

        found = []
        for change in _CHANGES:
            made = change(self)
            if made is not None:
                found.append(changed(made[0], made[1].needed))
        if self.step is None:
            # A byte for each number; scales are small beside.
            weights, as_int8 = (
                self.plan.parameter_bytes(size)[0] for size in (self.base.itemsize, 1)
            )
            found.append(changed(_INT8, self.needed - weights + as_int8))
        useful = [each for each in found if each.saved_bytes > 0]
        yield from sorted(useful, key=lambda each: (not each.fits, each.needed_bytes))
        if not any(each.fits for each in useful if each.options != _INT8):
            several = changed(*self._several(room))
            if several.options not in {each.options for each in useful}:
                yield several

    def _several(self, room: int) -> tuple[str, int]:
        """As many changes as it takes, one after another: their options, and the bytes needed."""
        run, options = self, list[str]()
        for change in _CHANGES:
            made = change(run)
            if made is not None and made[1].needed < run.needed:
                options, run = [*options, made[0]], made[1]
            if run.needed <= room:
                break
        return " ".join(options), run.needed


_INT8 = "weights in int8, which parallama does not load"
_SHORT = 2048
"""A context that is offered where none fits by itself."""
_Change = Callable[[PlannedRun], tuple[str, PlannedRun] | None]
"""The options of a change, and the run with it; None where it changes nothing."""


def _fewer_bits(run: PlannedRun) -> tuple[str, PlannedRun] | None:
    if run.base.dtype == "bfloat16":
        return None
    step = None if run.step is None else replace(run.step, dtype="bfloat16")
    return "--dtype bfloat16", replace(run, base=replace(run.base, dtype="bfloat16"), step=step)


def _fewer_rows(run: PlannedRun) -> tuple[str, PlannedRun] | None:
    """As many as fit, or the fewest. In training the step's rows stay, in more micro-steps."""
    least, asked = run.mesh.data, run.base.batch
    most = max(run.fit.largest_batch, least)
    if run.step is None:
        rows = most - most % least
        if rows >= asked:
            return None
        return f"--batch {rows}", replace(run, base=replace(run.base, batch=rows))
    rows = max(
        rows for rows in range(least, max(min(most, asked), least) + 1, least) if asked % rows == 0
    )
    if rows >= asked:
        return None
    times = run.step.grad_accum * (asked // rows)
    step = replace(run.step, batch_size=rows, grad_accum=times)
    base = replace(run.base, batch=rows)
    return f"--batch {rows} --grad-accum {times}", replace(run, base=base, step=step)


def _shorter(run: PlannedRun) -> tuple[str, PlannedRun] | None:
    """The longest context that fits, or a short one."""
    asked = run.base.max_model_len if run.step is None else run.base.seq
    length = run.fit.largest_context or (_SHORT if run.step is None else _SHORT // 4)
    if length >= asked:
        return None
    if run.step is not None:
        length -= length % run.mesh.model if run.step.sequence_parallel else 0
        step = replace(run.step, seq_len=length)
        return f"--seq {length}", replace(run, base=replace(run.base, seq=length), step=step)
    base = replace(run.base, max_model_len=length, seq=min(run.base.seq, length))
    return f"--max-model-len {length}", replace(run, base=base)


def _training(options: str, **changes: Any) -> _Change:
    """A change of how a step is done."""

    def change(run: PlannedRun) -> tuple[str, PlannedRun] | None:
        step = run.step
        if step is None or all(getattr(step, key) == value for key, value in changes.items()):
            return None
        if "lora" in changes and step.lora is not None:
            return None
        if changes.get("sequence_parallel") and step.seq_len % run.mesh.model:
            return None
        return options, replace(run, step=replace(step, **changes))

    return change


_CHANGES: tuple[_Change, ...] = (
    _fewer_bits,
    _fewer_rows,
    _training("--remat full", remat="full"),
    _training("--fsdp", fsdp=True),
    _training("--sequence-parallel", sequence_parallel=True),
    _training("--lora.rank 8", lora=LoraOptions(rank=8)),
    _training("--optimizer sgd", optimizer="sgd"),
    _shorter,
)
