"""What sessions share: named tensors on the devices, programs that move them, and figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..engine.interface import DeviceTensor, Steps
from ..engine.steps import STATE_AXES, StepKey
from ..plan.mesh_shape import DATA
from ..sharded.reshard import Mover
from . import state
from .programs import ProgramSet, make_programs
from .run_stats import Choice, RunStats


class DeviceState:
    """The state of a session. Each of its steps has the devices alone.

    Args:
        steps: the model.
        programs: from `make_programs`.

    Attributes:
        stats: what the session has measured.
    """

    def __init__(self, steps: Steps, programs: ProgramSet) -> None:
        self.steps, self.mesh = steps, steps.mesh
        self.stats = RunStats()
        self._programs = programs
        self._state: dict[str, DeviceTensor] = {}
        self._told: dict[str, DeviceTensor] = {}  # what the last step gave besides

    def _compile(
        self, keys: Sequence[StepKey], progress: Callable[[int, int], None] | None
    ) -> None:
        """Compile the programs of `keys` that aren't yet."""
        began, traced = time.perf_counter(), self._programs.trace_s
        with self.mesh.counted() as compiled:
            self._programs.warm_up(keys, progress)
            self.stats.trace_s += self._programs.trace_s - traced
            self.stats.programs_compiled += compiled()
        self.stats.compile_s += time.perf_counter() - began

    # -- moving to another mesh

    def tensors(self) -> list[DeviceTensor]:
        """What it holds on the devices that would move with it."""
        return list(self._state.values())

    def leave(self) -> None:
        """Let go of the programs, which hold the model's weights: what follows is `move`."""
        self._programs = make_programs(self.steps)

    def _take_along(
        self, steps: Steps, programs: ProgramSet, mover: Mover, *, kept: int, rows: int
    ) -> None:
        """Go on with the same model on another mesh.

        Args:
            kept: rows that move; those behind them are left.
            rows: how many there are then.
        """
        old, new = self.steps.plan, steps.plan
        layouts = {
            name: state.layout_of(name, tuple(tensor.shape), old)
            for name, tensor in self._state.items()
        }

        def shape(name: str) -> tuple[int, ...]:
            before = layouts[name]
            return (rows, *before.shape[1:]) if before.axes[0] == DATA else before.shape

        self.steps, self.mesh, self._programs = steps, steps.mesh, programs
        self._told = {}
        self._state = mover(
            self._state,
            layouts.__getitem__,
            lambda name: state.layout_of(name, shape(name), new),
            rows=kept,
        )

    # -- running

    def cache_bytes_per_device(self) -> list[int]:
        """Bytes of KV cache on each device, measured on its shards."""
        totals = [0] * self.mesh.shape.devices
        for name, tensor in self._state.items():
            if name.startswith("cache."):
                sizes = self.mesh.local_bytes(tensor)
                totals = [total + size for total, size in zip(totals, sizes, strict=True)]
        return totals

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Have the devices alone, and count what is compiled meanwhile."""
        with self.mesh.counted() as compiled:
            try:
                yield
            finally:
                self.stats.programs_after_warmup += compiled()

    def _advance(self, key: StepKey, given: Mapping[str, DeviceTensor]) -> tuple[float, float]:
        """Hand one step to the devices.

        Args:
            given: its arguments besides the state, or in place of some of it.

        Returns:
            When that was done, and the seconds spent in the executable's call.
        """
        program = self._programs[key]
        outputs = program({**self._state, **given})
        launched = time.perf_counter()
        self._told = {name: each for name, each in outputs.items() if name not in self._state}
        self._state |= {name: each for name, each in outputs.items() if name in self._state}
        return launched, program.last_run_s

    def _read(self, rows: Sequence[int]) -> list[Choice]:
        """What these rows have chosen."""
        if not rows:
            return []
        tokens, logprobs = (
            self.mesh.fetch(self._state[name], STATE_AXES[name]).tolist()
            for name in ("token", "logprob")
        )
        return [Choice(row, tokens[row], logprobs[row]) for row in rows]
