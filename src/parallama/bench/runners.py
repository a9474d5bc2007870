"""The engines of a run: each with its process, or with the reason why it has none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import ParallamaError, RunError
from ..plan.mesh_shape import MeshShape
from .options import EngineOptions
from .processes import EngineProcess
from .profile import recording
from .rows import Profile, What


@dataclass
class Runner:
    """An engine in the run, and what it has done of the present case.

    Attributes:
        processes: how many it has itself.
        process: None if it could not start.
        error: why it could not start.
        case_error: why it cannot do the present case.
        tokens: that it chose, step by step.
        last: its replies so far, the last of each key.
    """

    name: str
    mesh: str
    processes: int
    process: EngineProcess | None = None
    error: str | None = None
    case_error: str | None = None
    tokens: list[list[int]] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    profiles: dict[What, Profile] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def started(self) -> dict[str, Any]:
        """What its process said when it was ready."""
        assert self.process is not None
        return self.process.started

    def begin(self) -> None:
        """Forget the last case."""
        self.case_error = self.error
        self.tokens, self.prefill_s, self.decode_s = [], [], []
        self.profiles, self.last = {}, {}

    def ask(self, do: str, **arguments: Any) -> dict[str, Any] | None:
        """A command's reply, or None once something of this case has failed."""
        if self.process is None or self.case_error is not None:
            return None
        try:
            self.last = self.last | self.process.ask(do, **arguments)
        except RunError as error:
            self.case_error = first_line(error, self.name)
            return None
        return self.last

    def sample(self, what: What, cores: int, times: int, **arguments: Any) -> None:
        """Ask for `what` so many times, and take a profile of that."""
        if self.process is None or self.case_error is not None:
            return
        with recording(self.process.pid) as taken:
            replies = [self.ask(what, **arguments) for _ in range(times)]
        seconds = [each for reply in replies if reply is not None for each in reply["seconds"]]
        if seconds:
            self.profiles[what] = taken.profile(seconds, cores)


class Starter:
    """Starts engines, which end with the stack.

    Args:
        progress: called with one line for each.
    """

    def __init__(
        self,
        options: EngineOptions,
        stack: contextlib.ExitStack,
        progress: Callable[[str], None],
    ) -> None:
        self._options, self._stack, self._progress = options, stack, progress

    def process(self, name: str, mesh: MeshShape, processes: int = 1) -> EngineProcess:
        """An engine's process.

        Raises:
            ParallamaError: it could not start.
        """
        self._progress(f"starting {name} {mesh}")
        return self._stack.enter_context(
            EngineProcess(self._options.engine(name, mesh), processes=processes)
        )

    def ours(self, mesh: MeshShape) -> Runner:
        """parallama; errors as for `process`."""
        process = self.process("parallama", mesh)
        return Runner(name="parallama", mesh=str(mesh), processes=1, process=process)

    def peer(self, name: str, mesh: MeshShape) -> Runner:
        """A peer, with the reason if it does not start."""
        processes = mesh.devices if name == "hf-tp" else 1
        runner = Runner(name=name, mesh=str(mesh), processes=processes)
        runner.error = _no_way(name, mesh)
        if runner.error is None:
            try:
                runner.process = self.process(name, mesh, processes)
            except ParallamaError as error:
                runner.error = first_line(error, name)
        return runner


def _no_way(peer: str, mesh: MeshShape) -> str | None:
    """Why a peer cannot run on a mesh."""
    if mesh.data > 1:
        return f"{peer} splits over one axis only, not {mesh}"
    if peer == "hf-tp" and mesh.devices == 1:
        return "hf-tp needs two processes; on one it is hf"
    return None


def first_line(error: ParallamaError, name: str) -> str:
    """What an engine says that went wrong."""
    return str(error).splitlines()[0].removeprefix(f"{name}: ")


def reading(machine: EngineProcess) -> dict[str, float]:
    """The machine's limits, as it is now."""
    reply = machine.ask("measure")
    return {name: reply[name] for name in ("bandwidth_bytes_per_s", "gemm_flops_per_s")}
