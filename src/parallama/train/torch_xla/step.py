"""A model in training on a mesh: its state on the devices, and the programs that change it.

A program is traced once and replayed for every step. The state is updated in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial

import numpy as np
import torch

from ...engine.torch_xla.mesh import DeviceMesh
from ...engine.torch_xla.program import Program
from ...engine.torch_xla.scopes import name_scopes
from ...errors import CheckpointError, lines, listed
from ...files.checkpoint import Checkpoint
from ...files.nonfinite import finite_only
from ...files.skeleton import make_skeleton
from ...host import lean_host_memory
from ...model.spec import ModelSpec
from ...plan.make_plan import make_plan
from ...plan.placement import Blocks, Placement, Plan
from ...sharded.device_weights import put_parameter
from ...sharded.layout import take_off
from ..batch import Batch
from ..layout import TrainingPlan, check_fit, training_plan
from ..options import StepOptions, StepResult
from . import lora, packed
from .state_layout import PARAMETER, STEP, StateLayout, parameter_of
from .traced_step import BATCH_AXES, TracedStep


class Trainer:
    """A model in training on a mesh.

    Args:
        checkpoint: config and weights to begin with.
        mesh: the devices.
        plan: how parameters are placed; the default plan of the mesh if None.
        seed: of adapters and of dropout.
        progress: called while weights are read, with tensors done and their number.
        allow_nonfinite: begin with weights that hold NaN or infinity, too.

    Attributes:
        plan: with what `options.fsdp` and `options.lora` make of it.
        state: all that a step changes, and the weights that are frozen beside adapters; see
            `state_layout` for the names. A step gives new tensors, and those before are gone.

    Raises:
        FitError: rows don't divide over "data", or positions over "model" with sequence
            parallelism.
        PlanError: the plan is not one that training follows.
        CheckpointError: a tensor is missing, not as the config says, or holds NaN or infinity
            where that isn't allowed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        mesh: DeviceMesh,
        options: StepOptions,
        *,
        plan: Plan | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        allow_nonfinite: bool = False,
    ) -> None:
        spec = ModelSpec.from_config(checkpoint.config)
        self.mesh, self.options, self.seed = mesh, options, seed
        self.plan: TrainingPlan = training_plan(
            plan or make_plan(spec, mesh.shape), fsdp=options.fsdp, lora=options.lora
        )
        check_fit(options, self.plan)
        packed.register()
        base = make_skeleton(checkpoint.config).model
        base.config._attn_implementation = packed.PACKED
        name_scopes(base, "model")
        self._layout = StateLayout(self.plan, options)
        self.state: dict[str, torch.Tensor] = {}
        with lean_host_memory():
            tensors = checkpoint.tensors(spec)
            if not allow_nonfinite:
                tensors = finite_only(tensors, checkpoint.file_of, torch.float32)
            self._read(tensors, progress)
        for name in self._layout.optimizer_names():
            placement = self.layout(name)
            self.state[name] = mesh.put_shards(partial(_zero_part, placement, mesh), placement.axes)
        self.traced = TracedStep(base, self._layout, mesh, options, seed)
        self._step: Program | None = None
        self._evaluate: Program | None = None

    # -- state

    def layout(self, name: str) -> Placement:
        """How a tensor of the state is placed."""
        return self._layout.placement(name)

    def blocks(self, name: str) -> Blocks | None:
        """See `StateLayout.blocks`."""
        return self._layout.blocks(name)

    def changing(self) -> list[str]:
        """See `StateLayout.changing`."""
        return self._layout.changing()

    def fetch(self, name: str) -> torch.Tensor:
        """A tensor of the state on the host, in the checkpoint's layout."""
        placed = self.mesh.fetch(self.state[name], self.layout(name).axes)
        if name == STEP:
            return placed
        return take_off(placed, self.plan, parameter_of(name)).contiguous()

    def optimizer_differs(self, names: Collection[str]) -> bool:
        """Whether a state's tensors are of another optimizer than this one."""
        kept = {name for name in self.changing() if not name.startswith(PARAMETER)}
        return kept != {name for name in names if not name.startswith(PARAMETER)}

    def load(
        self,
        tensors: Mapping[str, Callable[[], torch.Tensor]] | Iterator[tuple[str, torch.Tensor]],
        *,
        other_optimizer: bool = False,
    ) -> None:
        """Put tensors of the state on the devices, from the host and in the checkpoint's layout.

        Args:
            tensors: name to a function that reads it, or an iterator that gives names and tensors;
                those of `changing`, and others of the state if there are any.
            other_optimizer: they are of another one. Its part is not read, and this one's begins
                anew.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape.
        """
        if isinstance(tensors, Mapping):
            tensors = ((name, read()) for name, read in tensors.items())
        loaded: dict[str, torch.Tensor] = {}
        known = set(self._layout.names())
        for name, source in tensors:
            if other_optimizer and not name.startswith(PARAMETER):
                continue
            if name not in known:
                raise CheckpointError(
                    lines(
                        f"{name!r} is no tensor of this run's state",
                        "expected the state of a run with the same model, adapters and optimizer",
                    )
                )
            if name == STEP:
                loaded[name] = self.mesh.put(source.reshape(1).float().contiguous(), (None,))
            else:
                loaded[name] = self._put(parameter_of(name), source)
        missing = [
            name
            for name in self.changing()
            if name not in loaded and (name.startswith(PARAMETER) or not other_optimizer)
        ]
        if missing:
            raise CheckpointError(
                lines(
                    f"missing tensors of the state: {listed(missing)}",
                    "expected all that a step changes",
                )
            )
        self.state.update(loaded)

    def host_parameters(self, *, merged: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's parameters on the host, one at a time.

        They are fp32, by the checkpoint's names and in its layout.

        Args:
            merged: add adapters to their weights; else the weights are as they came.
        """
        adapters, options = self.plan.adapters, self.options.lora
        for placement in self.plan.parameters:
            if placement.name in adapters:
                continue
            weight = self.fetch(PARAMETER + placement.name)
            base = placement.name.removesuffix(".weight")
            if merged and options is not None and f"{base}.lora_A.weight" in adapters:
                low = self.fetch(f"{PARAMETER}{base}.lora_A.weight")
                high = self.fetch(f"{PARAMETER}{base}.lora_B.weight")
                weight = lora.merge(weight, low, high, options)
            yield placement.name, weight

    def adapters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The adapters on the host, by name, in the checkpoint's layout."""
        for name in self.plan.adapters:
            yield name, self.fetch(PARAMETER + name)

    def bytes_per_device(self) -> dict[str, list[int]]:
        """What each device holds, measured: `params`, `optimizer`."""
        found = {kind: [0] * self.mesh.shape.devices for kind in ("params", "optimizer")}
        for name, tensor in self.state.items():
            totals = found["params" if name.startswith(PARAMETER) else "optimizer"]
            for device, size in enumerate(self.mesh.local_bytes(tensor)):
                totals[device] += size
        return found

    # -- steps

    def compile(self, *, evaluate: bool = False) -> Program:
        """Make the program of a step, and of `evaluate` if it is to be used.

        Nothing is compiled later.
        """
        if self._step is None:
            arguments = self.arguments(self._blank(), lr=0.0)
            self._step = Program("train", self.mesh, self.traced.step, arguments, self.changing())
        if evaluate:
            self._evaluation()
        return self._step

    def _evaluation(self) -> Program:
        if self._evaluate is None:
            arguments = self.arguments(self._blank(), lr=0.0)
            self._evaluate = Program("evaluate", self.mesh, self.traced.evaluate, arguments)
        return self._evaluate

    def step(self, batch: Batch, lr: float) -> StepResult:
        """One optimizer step.

        Args:
            batch: of the options' sizes.
            lr: learning rate of this step.

        Raises:
            UsageError: a token is not the model's, or no position has a label.
            ProgramError: the batch has other sizes.
        """
        step = self.compile()
        batch.check(self.plan.model.vocab)
        began = time.perf_counter()
        out = step(self.arguments(batch, lr=lr))
        self.state.update({name: out[name] for name in self.changing()})
        loss, norm, finite = self.mesh.fetch(out["report"], (None,)).tolist()
        return StepResult(
            loss=loss,
            grad_norm=norm,
            tokens=batch.target_tokens,
            finite=finite > 0,
            seconds=time.perf_counter() - began,
        )

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """The sum of a batch's losses, in nats, and how many tokens it is of; without dropout."""
        evaluation = self._evaluation()
        batch.check(self.plan.model.vocab)
        out = evaluation(self.arguments(batch, lr=0.0))
        return float(self.mesh.fetch(out["loss"], (None,))[0]), batch.target_tokens

    def gradients(self, batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
        """The gradient of a batch's mean loss by parameter name, before clipping.

        They are on the host, in the checkpoint's layout. Each call compiles a program of its own.
        """
        batch.check(self.plan.model.vocab)
        arguments = self.arguments(batch, lr=0.0)
        out = Program("gradients", self.mesh, self.traced.gradients, arguments)(arguments)
        for placement in self.plan.trained:
            name = placement.name
            yield name, take_off(self.mesh.fetch(out[name], placement.axes), self.plan, name)

    def arguments(self, batch: Batch, *, lr: float) -> dict[str, torch.Tensor]:
        """What the programs take in: the state, a batch, the learning rate, and constants."""
        arrays = {
            "ids": batch.ids,
            "targets": batch.targets,
            "positions": batch.positions,
            "documents": batch.documents,
        }
        given = {
            name: self.mesh.put(torch.from_numpy(array), BATCH_AXES)
            for name, array in arrays.items()
        }
        scalars = torch.tensor([lr, 1.0 / max(1, batch.target_tokens)])
        constants = self.traced.constants | {"scalars": self.mesh.put(scalars, (None,))}
        return self.state | given | constants

    def _blank(self) -> Batch:
        shape = (self.options.grad_accum, self.options.batch_size, self.options.seq_len)
        zeros = np.zeros(shape, dtype=np.int64)
        return Batch(ids=zeros, labels=zeros, positions=zeros, documents=zeros)

    # -- beginnings

    def _read(
        self,
        tensors: Iterator[tuple[str, torch.Tensor]],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Put the checkpoint's weights, and new adapters, on the devices."""
        wanted = [
            placement.name
            for placement in self.plan.parameters
            if placement.name not in self.plan.adapters
        ]
        for name, source in tensors:
            self.state[PARAMETER + name] = self._put(name, source)
            if progress is not None:
                progress(len(self.state), len(wanted))
        missing = [name for name in wanted if PARAMETER + name not in self.state]
        if missing:
            raise CheckpointError(
                lines(
                    f"missing tensors: {listed(missing)}", "expected every parameter of the model"
                )
            )
        for name, source in lora.initial(self.plan, self.seed):
            self.state[PARAMETER + name] = self._put(name, source)

    def _put(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """A parameter, or what the optimizer keeps of it, on the devices."""
        return put_parameter(source, self.plan, self.mesh, name, torch.float32)


def _zero_part(placement: Placement, mesh: DeviceMesh, _device: int) -> torch.Tensor:
    return torch.zeros(placement.local_shape(mesh.shape))
