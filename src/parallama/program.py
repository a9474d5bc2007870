"""Programs: trace a functional step once, then replay its executable.

Lazy tensors re-trace a step on every call, and that costs more than running it. Here a step is traced once with real device tensors as
arguments; torch-xla tells which device buffers its graph reads, so each later call hands the executable its buffers directly
(the way torch-xla's own dynamo bridge does, without dynamo).

A step is functional: named tensors in, named tensors out, no writes to anything else. A donated argument must come out again under its
own name: XLA then updates the buffer in place, and the tensor that was passed in is dead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ProgramError, lines, listed
from .mesh import DeviceMesh

_ORDERS = 4
"""Times that outputs are put in another order before it is given up."""
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


class Program:
    """One compiled step.

    Args:
        name: for messages.
        step: named device tensors to named device tensors.
        arguments: tensors to trace with; they are read, not changed, and may be used for the first call.
        donated: names of arguments whose buffers the outputs of the same name take over.
    """

    def __init__(self, name: str, mesh: DeviceMesh, step: Step, arguments: Mapping[str, torch.Tensor], donated: Sequence[str] = ()) -> None:
        import torch_xla
        from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

        self.name = name
        self._run = torch_xla._XLAC._run_cached_graph
        xlac: Any = torch_xla._XLAC
        began = time.perf_counter()
        torch_xla.sync()
        mesh.wait()
        for key in donated:
            xlac._set_buffer_donation(arguments[key], True)
        # By buffer, not by torch-xla's tensor ids: a buffer has the id of the last tensor that a trace has read it through, so a second program would take its arguments for constants.
        by_buffer = dict(zip(xlac._get_tensors_handle(list(arguments.values())), arguments, strict=True))
        assert len(by_buffer) == len(arguments), f"{name}: two arguments are one buffer"
        before = _fallbacks()
        with torch.no_grad():
            outputs = step(arguments)
        fallen = [key for key, count in _fallbacks().items() if count > before.get(key, 0)]
        if fallen:
            # What went through the host while tracing would be a constant of the executable.
            raise ProgramError(
                lines(f"program {name}: torch-xla cannot trace {', '.join(sorted(fallen))}", "expected operations that stay on the device")
            )
        mesh.wait()
        read, values = self._order(outputs, by_buffer, donated)
        ordered = [outputs[key] for key in self._output_names]
        self.trace_s = time.perf_counter() - began
        with alias_with_buffer_donor_config():
            self._hash = xlac._get_graph_hash(ordered)
            xlac._xla_warm_up_cache(ordered, [])
        xlac._clear_pending_irs(str(mesh.device))
        self._template: list[Any] = [value if key is None else None for key, value in zip(read, values, strict=True)]
        self._slots = [(slot, key) for slot, key in enumerate(read) if key is not None]
        self._checked = {key: _Signature.of(argument) for key, argument in arguments.items()}
        self.last_run_s = 0.0

    def _order(
        self, outputs: Mapping[str, torch.Tensor], by_buffer: Mapping[int, str], donated: Sequence[str]
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
            self._output_names = [key for key in outputs if key not in donated] + [key for key in kept if key is not None]
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
        began = time.perf_counter()
        outputs = self._run(self._hash, inputs)
        self.last_run_s = time.perf_counter() - began
        return dict(zip(self._output_names, outputs, strict=True))


class ProgramSet:
    """The programs of a run: declared before it, compiled by `warm_up`, then closed.

    Args:
        build: makes the program of a key.
        describe: a key's parts by name, for the error that shows what differed.
    """

    def __init__(self, build: Callable[[Any], Program], describe: Callable[[Any], Mapping[str, object]]) -> None:
        self._build = build
        self._describe = describe
        self._programs: dict[Hashable, Program] = {}
        self.trace_s = 0.0

    def __len__(self) -> int:
        return len(self._programs)

    def warm_up(self, keys: Sequence[Hashable], progress: Callable[[int, int], None] | None = None) -> None:
        """Compile the programs of `keys` that aren't yet."""
        todo = [key for key in dict.fromkeys(keys) if key not in self._programs]
        for done, key in enumerate(todo):
            if progress is not None:
                progress(done, len(todo))
            self._programs[key] = self._build(key)
            self.trace_s += self._programs[key].trace_s
        if progress is not None and todo:
            progress(len(todo), len(todo))

    def __getitem__(self, key: Hashable) -> Program:
        """The program of a key.

        Raises:
            ProgramError: it was not declared; the message names the part that differs from the nearest one that was.
        """
        try:
            return self._programs[key]
        except KeyError:
            raise ProgramError(self._difference(key)) from None

    def _difference(self, key: Hashable) -> str:
        asked = dict(self._describe(key))
        known = [dict(self._describe(other)) for other in self._programs]
        if not known:
            return lines(f"no program was compiled before the run; {asked} was asked for", "call warm_up first")
        nearest = min(known, key=lambda other: sum(asked.get(part) != other.get(part) for part in asked | other))
        parts = [
            f"{part} is {asked.get(part)!r}, known: {nearest.get(part)!r}"
            for part in asked | nearest
            if asked.get(part) != nearest.get(part)
        ]
        return lines(f"this step is none of the {len(known)} programs known before the run", "; ".join(parts), "declare it in warm_up")


def _fallbacks() -> dict[str, int]:
    """Operations that torch-xla has run on the host, by how often."""
    from torch_xla.debug import metrics

    return {name: metrics.counter_value(name) for name in metrics.counter_names() if name.startswith("aten::")}


def compiled_programs() -> int:
    """How many programs torch-xla has compiled in this process, lazily run ones included."""
    from torch_xla.debug import metrics

    data = metrics.metric_data("CompileTime")
    return int(data[0]) if data else 0
