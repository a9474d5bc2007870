"""One optimizer step as one program: traced once, replayed for every step, its state updated in place.

All micro-steps, the reduction, clipping and the update are in it. It runs as one manually partitioned region (see `regions`), so that what crosses between devices is what `collectives` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from ...engine.torch_xla.mesh import DeviceMesh
from ...engine.torch_xla.ordering import read_backwards
from ...engine.torch_xla.program import Program
from ...engine.torch_xla.scopes import name_scopes, scope
from ...errors import CheckpointError, lines, listed
from ...files.checkpoint import Checkpoint
from ...files.nonfinite import finite_only
from ...files.skeleton import make_skeleton
from ...host import lean_host_memory
from ...model.spec import ModelSpec
from ...plan import heads
from ...plan.make_plan import make_plan
from ...plan.mesh_shape import DATA
from ...plan.placement import Axes, Blocks, Placement, Plan
from ...plan.train_collectives import TOGETHER
from ...sharded.device_weights import put_parameter
from ...sharded.layout import take_off
from ..batch import Batch
from ..layout import TrainingPlan, check_fit, training_plan
from ..options import StepOptions, StepResult, slots
from . import lora, optimizer, packed
from .optimizer import Reduction
from .passes import MicroStep, Passes

PARAMETER = "param."
STEP = "step"
_INPUTS = ("ids", "targets", "positions", "documents")
_BATCH_AXES: Axes = (None, DATA, None)


class Trainer:
    """A model in training on a mesh.

    Args:
        checkpoint: config and weights to begin with.
        mesh: the devices.
        plan: how parameters lie; the default plan of the mesh if None.
        seed: of adapters and of dropout.
        progress: called while weights are read, with tensors done and their number.
        allow_nonfinite: begin with weights that hold NaN or infinity, too.

    Attributes:
        plan: with what `options.fsdp` and `options.lora` make of it.
        state: all that a step changes, and with adapters the frozen weights: `param.NAME`, `adam.m.NAME`, `adam.v.NAME` or `sgd.momentum.NAME`, and `step` `[1]` fp32, the number of steps
            taken. A step gives new tensors and kills those before.

    Raises:
        FitError: rows don't divide over "data", or positions over "model" with sequence parallelism.
        PlanError: the plan is not one that training follows.
        CheckpointError: a tensor is missing, not as the config says, or holds NaN or infinity where that isn't allowed.
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
        self.skeleton = make_skeleton(checkpoint.config)
        self._base = self.skeleton.model
        self._base.config._attn_implementation = packed.PACKED
        name_scopes(self._base, "model")
        self._step: Program | None = None
        self._evaluate: Program | None = None
        self.state: dict[str, torch.Tensor] = {}
        with lean_host_memory():
            tensors = checkpoint.tensors(spec)
            self._read(
                tensors if allow_nonfinite else finite_only(tensors, checkpoint.file_of), progress
            )
        for name in self._zeros():
            placement = self.layout(name)
            self.state[name] = mesh.put_shards(partial(_zero_part, placement, mesh), placement.axes)
        inverse = self._base.rotary_emb.inv_freq
        self._constants = {"inv_freq": mesh.put(inverse, (None,))}
        self._constant_axes: dict[str, Axes] = {"inv_freq": (None,)}
        for axis, size in mesh.shape.items():
            self._constants[f"rank.{axis}"] = mesh.put(torch.arange(size), (axis,))
            self._constant_axes[f"rank.{axis}"] = (axis,)
        self._heads: dict[str, str] = {}
        for placement in self.plan.trained:
            self._put_heads(placement, self.plan.blocks(placement.name))

    # -- state

    def layout(self, name: str) -> Placement:
        """How a tensor of the state lies: `axes` over the mesh, `shape` over all devices, `source_shape` in the checkpoint's layout. `blocks` has more."""
        if name == STEP:
            return Placement(
                name=STEP,
                kind="buffer",
                source_shape=(1,),
                shape=(1,),
                axes=(None,),
                style="replicate",
                reason="the number of steps taken",
            )
        return self.plan[parameter_of(name)]

    def blocks(self, name: str) -> Blocks | None:
        """How the laid-out dim of a tensor of the state is made from the checkpoint's, or None if it lies as there."""
        return None if name == STEP else self.plan.blocks(parameter_of(name))

    def names(self) -> list[str]:
        """Of all tensors of the state, in order."""
        return [PARAMETER + placement.name for placement in self.plan.parameters] + self._zeros()

    def changing(self) -> list[str]:
        """Of the tensors of the state that a step changes: what a checkpoint must hold. Frozen weights beside adapters are not among them."""
        return [PARAMETER + placement.name for placement in self.plan.trained] + self._zeros()

    def fetch(self, name: str) -> torch.Tensor:
        """A tensor of the state on the host, in the checkpoint's layout."""
        laid_out = self.mesh.fetch(self.state[name], self.layout(name).axes)
        return (
            laid_out
            if name == STEP
            else take_off(laid_out, self.plan, parameter_of(name)).contiguous()
        )

    def load(
        self, tensors: Mapping[str, Callable[[], torch.Tensor]] | Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        """Put tensors of the state on the devices, from the host and in the checkpoint's layout.

        Args:
            tensors: name to a function that reads it, or an iterator that gives names and tensors; those of `changing`, and others of the state if there are any.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape.
        """
        loaded: dict[str, torch.Tensor] = {}
        known = set(self.names())
        for name, source in (
            ((name, read()) for name, read in tensors.items())
            if isinstance(tensors, Mapping)
            else tensors
        ):
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
                loaded[name] = put_parameter(
                    source, self.plan, self.mesh, parameter_of(name), torch.float32
                )
        missing = [name for name in self.changing() if name not in loaded]
        if missing:
            raise CheckpointError(
                lines(
                    f"missing tensors of the state: {listed(missing)}",
                    "expected all that a step changes",
                )
            )
        self.state.update(loaded)

    def load_parts(self, name: str, part: Callable[[int], torch.Tensor]) -> None:
        """Put one tensor of the state on the devices from each device's own part, as `mesh.local_shards` gave them on the same mesh."""
        self.state[name] = self.mesh.put_shards(part, self.layout(name).axes)

    def host_parameters(self, *, merged: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's parameters on the host, fp32, by the checkpoint's names and in its layout, one at a time.

        Args:
            merged: add adapters to their weights; else the weights are as they came.
        """
        for placement in self.plan.parameters:
            if placement.name in self.plan.adapters:
                continue
            weight = self.fetch(PARAMETER + placement.name)
            base = placement.name.removesuffix(".weight")
            if (
                merged
                and self.options.lora is not None
                and f"{base}.lora_A.weight" in self.plan.adapters
            ):
                low, high = (
                    self.fetch(f"{PARAMETER}{base}.lora_{letter}.weight") for letter in "AB"
                )
                weight = lora.merge(weight, low, high, self.options.lora)
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
            self._step = Program(
                "train",
                self.mesh,
                self._trace_step,
                self._arguments(self._blank(), lr=0.0),
                self.changing(),
            )
        if evaluate and self._evaluate is None:
            self._evaluate = Program(
                "evaluate", self.mesh, self._trace_evaluate, self._arguments(self._blank(), lr=0.0)
            )
        return self._step

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
        out = step(self._arguments(batch, lr=lr))
        self.state.update({name: out[name] for name in self.changing()})
        report = self.mesh.fetch(out["report"], (None,))
        loss, norm, finite = report.tolist()
        return StepResult(
            loss=loss,
            grad_norm=norm,
            tokens=batch.target_tokens,
            finite=finite > 0,
            seconds=time.perf_counter() - began,
        )

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """The sum of a batch's losses, in nats, and how many tokens it is of; without dropout."""
        self.compile(evaluate=True)
        assert self._evaluate is not None
        batch.check(self.plan.model.vocab)
        out = self._evaluate(self._arguments(batch, lr=0.0))
        return float(self.mesh.fetch(out["loss"], (None,))[0]), batch.target_tokens

    def gradients(self, batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
        """The gradient of a batch's mean loss by parameter name, on the host, in the checkpoint's layout; before clipping. Compiles a program of its own each time."""
        batch.check(self.plan.model.vocab)
        arguments = self._arguments(batch, lr=0.0)
        out = Program("gradients", self.mesh, self._trace_gradients, arguments)(arguments)
        for placement in self.plan.trained:
            yield (
                placement.name,
                take_off(
                    self.mesh.fetch(out[placement.name], placement.axes), self.plan, placement.name
                ),
            )

    # -- arguments

    def _arguments(self, batch: Batch, *, lr: float) -> dict[str, torch.Tensor]:
        arrays = {
            "ids": batch.ids,
            "targets": batch.targets,
            "positions": batch.positions,
            "documents": batch.documents,
        }
        given = {
            name: self.mesh.put(torch.from_numpy(arrays[name]), _BATCH_AXES) for name in _INPUTS
        }
        scalars = torch.tensor([lr, 1.0 / max(1, batch.target_tokens)])
        return self.state | given | self._constants | {"scalars": self.mesh.put(scalars, (None,))}

    def _blank(self) -> Batch:
        import numpy as np

        shape = (self.options.grad_accum, self.options.batch_size, self.options.seq_len)
        zeros = np.zeros(shape, dtype=np.int64)
        return Batch(ids=zeros, labels=zeros, positions=zeros, documents=zeros)

    # -- what is traced

    def _enter(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each device's own part of every argument."""

        def axes(name: str) -> Sequence[str | None]:
            if name in _INPUTS:
                return _BATCH_AXES
            if name in self._constant_axes:
                return self._constant_axes[name]
            return (None,) if name == "scalars" else self.layout(name).axes

        return {name: self.mesh.enter_manual(tensor, axes(name)) for name, tensor in given.items()}

    def _passes(self, own: Mapping[str, torch.Tensor]) -> Passes:
        parts = {
            placement.name: own[PARAMETER + placement.name] for placement in self.plan.parameters
        }
        return Passes(
            self._base,
            self.plan,
            self.mesh,
            self.options,
            parts,
            {"rotary_emb.inv_freq": own["inv_freq"]},
            own["rank.model"],
        )

    def _run(
        self, own: Mapping[str, torch.Tensor], *, backward: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum of the device's losses `[1]`, and its sums of gradients of the mean loss."""
        passes = self._passes(own)
        losses = torch.zeros(1, device=own["scalars"].device)
        for index in range(self.options.grad_accum):
            micro_step = MicroStep(**{name: own[name][index] for name in _INPUTS})
            dropout = None
            if backward and self.options.lora is not None and self.options.lora.dropout:
                dropout = lora.Dropout(
                    self.options.lora.dropout,
                    self.seed,
                    own[STEP].to(torch.int64) * self.options.grad_accum + index,
                    own["rank.data"],
                    own["rank.model"],
                    self.plan,
                )
            losses = losses + passes.run(
                micro_step, own["scalars"][1] if backward else None, dropout
            )
        return losses, passes.gradients.sums

    def _trace_step(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = self._enter(given)
        losses, sums = self._run(own, backward=True)
        with scope(TOGETHER):
            gradients = self._reduction(own)(sums)
            square = self._reduction(own).square_norm(
                gradients,
                {name: own[f"first.{key}"] for name, key in self._heads.items()},
                self._ranks(own),
            )
            only_once = losses
            for axis, rank in self._ranks(own).items():
                if axis != DATA:
                    only_once = torch.where(rank == 0, only_once, torch.zeros_like(losses))
            everywhere = self.mesh.all_reduce(
                torch.cat([only_once * own["scalars"][1], square]), *self.mesh.shape
            )
        loss, norm = everywhere[:1], everywhere[1:].sqrt()
        # It stands first, and the update depends on it.
        order = read_backwards([own[name] for name in self.changing()])
        finite = torch.isfinite(loss) & torch.isfinite(norm) & torch.isfinite(order).all()
        out = {"order": order, "report": torch.cat([loss, norm, finite.float()])}
        with scope("optimizer"):
            updated = self._updated(own, gradients, norm, finite)
            out |= {name: updated[name] for name in self.changing()}
        return {name: self._leave(name, tensor) for name, tensor in out.items()}

    def _updated(
        self,
        own: Mapping[str, torch.Tensor],
        gradients: Mapping[str, torch.Tensor],
        norm: torch.Tensor,
        finite: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The state after the step; as it was where loss or gradient is no number."""
        options, lr, step = self.options, own["scalars"][:1], own[STEP] + 1
        clip = (
            None
            if options.max_grad_norm is None
            else (options.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        )
        out = {STEP: torch.where(finite, step, own[STEP])}
        for placement in self.plan.trained:
            names = [
                PARAMETER + placement.name,
                *(f"{slot}.{placement.name}" for slot in slots(options)),
            ]
            before = [own[name] for name in names]
            gradient = (
                gradients[placement.name] if clip is None else gradients[placement.name] * clip
            )
            after = optimizer.update(
                options, placement, before[0], gradient, tuple(before[1:]), lr, step, finite
            )
            out |= dict(zip(names, after, strict=True))
        return out

    def _trace_evaluate(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = self._enter(given)
        losses, _ = self._run(own, backward=False)
        return {"loss": self._leave("report", self.mesh.all_reduce(losses, DATA))}

    def _trace_gradients(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = self._enter(given)
        _, sums = self._run(own, backward=True)
        return {
            name: self._leave(PARAMETER + name, gradient)
            for name, gradient in self._reduction(own)(sums).items()
        }

    def _reduction(self, own: Mapping[str, torch.Tensor]) -> Reduction:
        return Reduction(
            self.plan,
            self.mesh,
            self.options,
            {name: own[f"heads.{key}"] for name, key in self._heads.items()},
        )

    def _ranks(self, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {axis: own[f"rank.{axis}"] for axis in self.mesh.shape}

    def _leave(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        placement = None if name in ("report", "order") else self.layout(name)
        if placement is None:
            return self.mesh.leave_manual(tensor, (None,), tuple(tensor.shape))
        return self.mesh.leave_manual(
            tensor, placement.axes, [int(size) for size in placement.shape]
        )

    # -- beginnings

    def _zeros(self) -> list[str]:
        return [
            *(
                f"{slot}.{placement.name}"
                for placement in self.plan.trained
                for slot in slots(self.options)
            ),
            STEP,
        ]

    def _read(
        self,
        tensors: Iterator[tuple[str, torch.Tensor]],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        wanted = [
            placement.name
            for placement in self.plan.parameters
            if placement.name not in self.plan.adapters
        ]
        for name, source in tensors:
            self.state[PARAMETER + name] = put_parameter(
                source, self.plan, self.mesh, name, torch.float32
            )
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
            self.state[PARAMETER + name] = put_parameter(
                source, self.plan, self.mesh, name, torch.float32
            )

    def _put_heads(self, placement: Placement, blocks: Blocks | None) -> None:
        """What of the checkpoint each of a device's blocks of heads is, and whether it is the first of its copies."""
        if blocks is None or blocks.heads is None:
            return
        axis = placement.axes[blocks.dim]
        key = f"{blocks.heads}.{axis}"
        self._heads[placement.name] = key
        if f"heads.{key}" in self._constants:
            return
        first = [
            source != heads.EMPTY and blocks.sources.index(source) == place
            for place, source in enumerate(blocks.sources)
        ]
        for name, values in (
            ("heads", torch.tensor(blocks.sources)),
            ("first", torch.tensor(first)),
        ):
            self._constants[f"{name}.{key}"] = self.mesh.put(values, (axis,))
            self._constant_axes[f"{name}.{key}"] = (axis,)


def _zero_part(placement: Placement, mesh: DeviceMesh, _device: int) -> torch.Tensor:
    return torch.zeros(placement.local_shape(mesh.shape))


def parameter_of(name: str) -> str:
    """The parameter that a tensor of the state belongs to: `adam.m.model.norm.weight` -> `model.norm.weight`."""
    for prefix in (PARAMETER, "adam.m.", "adam.v.", "sgd.momentum."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    raise KeyError(name)
