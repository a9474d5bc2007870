"""Programs: trace a functional step once, then replay its executable.

A step is functional: named tensors in, named tensors out, no writes to anything else. A donated
argument comes out again under its own name: XLA then updates the buffer in place, and the tensor
that was passed in is dead.
"""

# Lazy tensors re-trace a step on every call, and that costs more than running it. Here a step is
# traced once with real device tensors as arguments. torch-xla tells which device buffers its graph
# reads, so each later call gives the executable its buffers directly, as torch-xla's own dynamo
# bridge does.

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import ProgramError, RunError, lines
from ..interface import Compiled
from . import counters
from .mesh import DeviceMesh
from .ordering import order_outputs
from .xla_output import written_files

_TEMPORARY = re.compile(r"^allocation \d+: size (\d+), preallocated-temp", re.MULTILINE)
Step = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class _Signature:
    """What of an argument is fixed by the executable."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Signature:
        return cls(tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class Program(Compiled):
    """One compiled step.

    Args:
        name: for messages.
        step: named device tensors to named device tensors.
        arguments: tensors to trace with; they are read, not changed, and may be used for the first
            call.
        donated: names of arguments whose buffers the outputs of the same name take over.

    Raises:
        ProgramError: the step cannot be traced, two arguments share a buffer, or a donated one
            doesn't come out again. Whatever tracing or compiling raises, nothing is left behind.
    """

    def __init__(
        self,
        name: str,
        mesh: DeviceMesh,
        step: Step,
        arguments: Mapping[str, torch.Tensor],
        donated: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.mesh = mesh
        self.last_run_s = 0.0
        with mesh.lock:
            written = written_files()
            self._compile(step, arguments, donated)
            self._files = written_files() - written

    def _compile(
        self, step: Step, arguments: Mapping[str, torch.Tensor], donated: Sequence[str]
    ) -> None:
        import torch_xla
        from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

        xlac: Any = torch_xla._XLAC
        self._run = xlac._run_cached_graph
        began = time.perf_counter()
        # What the user has traced and not run yet is run here: below, all that is pending is
        # cleared.
        self.mesh.run()
        self.mesh.wait()
        by_buffer = self._by_buffer(arguments)
        try:
            for key in donated:
                xlac._set_buffer_donation(arguments[key], True)
            outputs = self._traced(step, arguments)
            self.mesh.wait()
            order = order_outputs(self.name, outputs, donated, by_buffer)
            self._output_names, read, values = order
            ordered = [outputs[key] for key in self._output_names]
            self.trace_s = time.perf_counter() - began
            with alias_with_buffer_donor_config():
                self._hash = xlac._get_graph_hash(ordered)
                xlac._xla_warm_up_cache(ordered, [])
        finally:
            # A program made later must neither run what was traced nor donate these buffers.
            xlac._clear_pending_irs(str(self.mesh.device))
            for key in donated:
                xlac._set_buffer_donation(arguments[key], False)
        self._template: list[Any] = [
            value if key is None else None for key, value in zip(read, values, strict=True)
        ]
        self._slots = [(slot, key) for slot, key in enumerate(read) if key is not None]
        self._checked = {key: _Signature.of(argument) for key, argument in arguments.items()}

    def _by_buffer(self, arguments: Mapping[str, torch.Tensor]) -> dict[int, str]:
        """The arguments' names by their buffers.

        Not by torch-xla's tensor ids. A buffer has the id of the last tensor that a trace has read
        it through, so a second program would take its arguments for constants.
        """
        import torch_xla

        handles = torch_xla._XLAC._get_tensors_handle(list(arguments.values()))
        by_buffer: dict[int, str] = {}
        for name, handle in zip(arguments, handles, strict=True):
            if handle in by_buffer:
                raise ProgramError(
                    lines(
                        f"program {self.name}: arguments {by_buffer[handle]!r} and {name!r} are "
                        "one buffer",
                        "expected a tensor of its own for each",
                    )
                )
            by_buffer[handle] = name
        return by_buffer

    def _traced(self, step: Step, arguments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The step's outputs, not computed yet."""
        before = counters.fallbacks()
        with torch.no_grad():
            outputs = step(arguments)
        fallen = [key for key, count in counters.fallbacks().items() if count > before.get(key, 0)]
        if fallen:
            # What went through the host while tracing would be a constant of the executable.
            raise ProgramError(
                lines(
                    f"program {self.name}: torch-xla cannot trace {', '.join(sorted(fallen))}",
                    "expected operations that stay on the device",
                )
            )
        return outputs

    def hlo(self) -> list[str]:
        """See `Compiled`."""
        return [path.read_text() for path in self._written("after_optimizations.txt")]

    def temp_bytes(self) -> int:
        """See `Compiled`; read from what XLA writes about its buffers."""
        texts = (path.read_text() for path in self._written("buffer-assignment.txt"))
        return sum(int(size) for text in texts for size in _TEMPORARY.findall(text))

    def _written(self, ending: str) -> list[Path]:
        found = sorted(path for path in self._files if path.name.endswith(ending))
        if not found:
            raise RunError(
                lines(
                    f"XLA wrote no {ending} of program {self.name}",
                    "expected one file a program",
                    "start the engine with keep_hlo",
                )
            )
        return found

    def __call__(self, arguments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the executable. Donated arguments are dead afterwards; take them from the result.

        Raises:
            ProgramError: an argument has another shape or dtype than the one that the program was
                made with.
        """
        for key, signature in self._checked.items():
            given = arguments[key]
            if given.shape != signature.shape or given.dtype != signature.dtype:
                raise ProgramError(
                    lines(
                        f"program {self.name}: argument {key!r} is {_Signature.of(given)}",
                        f"expected {signature}",
                        "it would need another program",
                    )
                )
        inputs = self._template.copy()
        for slot, key in self._slots:
            inputs[slot] = arguments[key]
        with self.mesh.lock:
            began = time.perf_counter()
            outputs = self._run(self._hash, inputs)
            self.last_run_s = time.perf_counter() - began
        return dict(zip(self._output_names, outputs, strict=True))
