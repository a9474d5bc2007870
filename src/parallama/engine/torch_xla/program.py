"""Programs: trace a functional step once, then replay its executable.

Lazy tensors re-trace a step on every call, and that costs more than running it. Here a step is traced once with real device tensors as
arguments; torch-xla tells which device buffers its graph reads, so each later call hands the executable its buffers directly
(the way torch-xla's own dynamo bridge does, without dynamo).

A step is functional: named tensors in, named tensors out, no writes to anything else. A donated argument must come out again under its
own name: XLA then updates the buffer in place, and the tensor that was passed in is dead.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import ProgramError, RunError, lines, listed
from ..interface import Compiled
from . import backends, counters
from .mesh import DeviceMesh

_ORDERS = 4
"""Times that outputs are put in another order before it is given up."""
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
        arguments: tensors to trace with; they are read, not changed, and may be used for the first call.
        donated: names of arguments whose buffers the outputs of the same name take over.
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
            written = backends.written_hlo()
            self._compile(step, arguments, donated)
            self._dumps = (backends.written_hlo() or set()) - (written or set())

    def _compile(
        self, step: Step, arguments: Mapping[str, torch.Tensor], donated: Sequence[str]
    ) -> None:
        import torch_xla
        from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

        xlac: Any = torch_xla._XLAC
        self._run = xlac._run_cached_graph
        began = time.perf_counter()
        # What the user has traced and not run yet is run here: below, all that is pending is cleared.
        self.mesh.run()
        self.mesh.wait()
        for key in donated:
            xlac._set_buffer_donation(arguments[key], True)
        # By buffer, not by torch-xla's tensor ids. A buffer has the id of the last tensor that a
        # trace has read it through, so a second program would take its arguments for constants.
        by_buffer = dict(
            zip(xlac._get_tensors_handle(list(arguments.values())), arguments, strict=True)
        )
        assert len(by_buffer) == len(arguments), f"{self.name}: two arguments are one buffer"
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
        self.mesh.wait()
        read, values = self._order(outputs, by_buffer, donated)
        ordered = [outputs[key] for key in self._output_names]
        self.trace_s = time.perf_counter() - began
        with alias_with_buffer_donor_config():
            self._hash = xlac._get_graph_hash(ordered)
            xlac._xla_warm_up_cache(ordered, [])
        xlac._clear_pending_irs(str(self.mesh.device))
        self._template: list[Any] = [
            value if key is None else None for key, value in zip(read, values, strict=True)
        ]
        self._slots = [(slot, key) for slot, key in enumerate(read) if key is not None]
        self._checked = {key: _Signature.of(argument) for key, argument in arguments.items()}

    def hlo(self) -> list[str]:
        """See `Compiled`."""
        return [path.read_text() for path in self._written("after_optimizations.txt")]

    def temp_bytes(self) -> int:
        """See `Compiled`; read from what XLA writes about its buffers."""
        texts = (path.read_text() for path in self._written("buffer-assignment.txt"))
        return sum(int(size) for text in texts for size in _TEMPORARY.findall(text))

    def _written(self, ending: str) -> list[Path]:
        found = sorted(path for path in self._dumps if path.name.endswith(ending))
        if not found:
            raise RunError(
                lines(
                    f"XLA wrote no {ending} of program {self.name}",
                    "expected one file a program",
                    "start the engine with keep_hlo",
                )
            )
        return found

    def _order(
        self,
        outputs: Mapping[str, torch.Tensor],
        by_buffer: Mapping[int, str],
        donated: Sequence[str],
    ) -> tuple[list[str | None], list[Any]]:
        """Put the outputs in order; what the graph reads then, in order: arguments by name, None for other buffers, and all of them.

        XLA pairs donated buffers with outputs of the same shape in the order of the graph's parameters; any other order would cross the pairs and copy every buffer. And that order follows from
        that of the outputs: the graph is walked from the first one on.
        """
        import torch_xla

        xlac: Any = torch_xla._XLAC
        before = names = list(outputs)
        for _ in range(_ORDERS):
            _, values = xlac._get_tensors_xla_device_data_node([outputs[key] for key in names])
            read = [by_buffer.get(handle) for handle in xlac._get_tensors_handle(values)]
            kept = [key for key in read if key in donated]
            missing = [key for key in donated if key not in outputs or key not in kept]
            assert not missing, f"{self.name}: donated but not returned or not read: {missing}"
            self._output_names = [key for key in outputs if key not in donated] + [
                key for key in kept if key is not None
            ]
            if self._output_names == names:
                return read, values
            before, names = names, self._output_names
        crossed = sorted(key for key, other in zip(before, names, strict=True) if key != other)
        raise ProgramError(
            lines(
                f"program {self.name}: its outputs have no order in which the buffers of {listed(crossed)} are read",
                "expected donated arguments that can be paired with the outputs of their names",
                "give it a first output that reads them all",
            )
        )

    def __call__(self, arguments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the executable. Donated arguments are dead afterwards; take them from the result.

        Raises:
            ProgramError: an argument has another shape or dtype than the one the program was made with.
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
