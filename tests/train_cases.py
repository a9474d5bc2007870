"""What the tests of training run in a worker."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parallama.engine.torch_xla.counters import compilations
from parallama.engine.torch_xla.mesh import DeviceMesh
from parallama.engine.torch_xla.program import Program
from parallama.files.find import find
from parallama.host import rss_bytes
from parallama.model.spec import ModelSpec
from parallama.plan.make_plan import make_plan
from parallama.plan.train_cost import train_memory
from parallama.train.batch import Batch
from parallama.train.layout import train_step
from parallama.train.options import LoraOptions, StepOptions
from parallama.train.torch_xla import lora
from parallama.train.torch_xla.step import Trainer


def trainer(
    model: str,
    mesh: str,
    options: dict[str, Any],
    *,
    plan: dict[str, Any] | None = None,
    seed: int = 0,
) -> Trainer:
    options = dict(options)
    if options.get("lora"):
        options["lora"] = LoraOptions(**options["lora"])
    checkpoint = find(model)
    device_mesh = DeviceMesh(mesh)
    made = (
        None
        if plan is None
        else make_plan(ModelSpec.from_config(checkpoint.config), device_mesh.shape, plan)
    )
    return Trainer(checkpoint, device_mesh, StepOptions(**options), plan=made, seed=seed)


def batch_of(arrays: dict[str, np.ndarray]) -> Batch:
    return Batch(**arrays)


def gradients(
    model: str, mesh: str, options: dict[str, Any], arrays: dict[str, np.ndarray], **more: Any
) -> dict[str, torch.Tensor]:
    return dict(trainer(model, mesh, options, **more).gradients(batch_of(arrays)))


def run(
    model: str,
    mesh: str,
    options: dict[str, Any],
    batches: list[dict[str, np.ndarray]],
    lr: float,
    *,
    final: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Some steps: their results, the parameters at the end if asked for, and late compilations."""
    made = trainer(model, mesh, options, **more)
    made.compile()
    compiled = compilations()
    results = [made.step(batch_of(arrays), lr) for arrays in batches]
    return {
        "losses": [each.loss for each in results],
        "norms": [each.grad_norm for each in results],
        "finite": [each.finite for each in results],
        "compiled_later": compilations() - compiled,
        "parameters": dict(made.host_parameters()) if final else {},
    }


def grown(
    model: str, mesh: str, options: dict[str, Any], arrays: dict[str, np.ndarray], steps: int
) -> dict[str, int]:
    """By how many bytes the process grew over the last ten of so many steps, and the prediction.

    Of eight steps the most counts: with several devices some buffers may be freed when a step is
    read, or not yet, which makes one reading up to 200 MB less than another.
    """
    made = trainer(model, mesh, options)
    held = []
    for _ in range(steps):
        made.step(batch_of(arrays), 1e-3)
        held.append(rss_bytes())
    predicted = train_memory(
        made.plan, train_step(made.options, made.plan.model.layers, sum_bytes=4)
    )
    return {"growth": max(held[-8:]) - max(held[-18:-10]), "activations": predicted.activations}


def adapted(
    model: str,
    mesh: str,
    options: dict[str, Any],
    batches: list[dict[str, np.ndarray]],
    lr: float,
    folder: str,
) -> dict[str, Any]:
    """Train adapters for some steps and save them.

    Returns: their gradients afterwards, on the first batch, and the model with them merged.
    """
    made = trainer(model, mesh, options)
    for arrays in batches:
        made.step(batch_of(arrays), lr)
    assert made.options.lora is not None
    lora.save_adapter(Path(folder), made.adapters(), made.options.lora, model)
    return {
        "gradients": dict(made.gradients(batch_of(batches[0]))),
        "merged": dict(made.host_parameters()),
    }


def hundred_steps(
    model: str,
    mesh: str,
    options: dict[str, Any],
    arrays: dict[str, np.ndarray],
    lr: float,
    steps: int,
) -> dict[str, Any]:
    """What the devices hold afterwards, and the same placed anew from the checkpoint."""
    made = trainer(model, mesh, options)
    for _ in range(steps):
        last = made.step(batch_of(arrays), lr)
    before = {name: made.mesh.shards(made.state[name]) for name in made.changing()}
    made.load({name: partial(made.fetch, name) for name in made.changing()})
    equal = {
        name: all(map(torch.equal, before[name], made.mesh.shards(made.state[name])))
        for name in before
    }
    return {
        "last": last.loss,
        "equal": equal,
        "held": made.bytes_per_device(),
        "planned": made.plan.parameter_bytes(4),
    }


def skipped(
    model: str, mesh: str, options: dict[str, Any], arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    """A step with a learning rate, and one with a weight that is NaN: is the state as it was?"""
    made = trainer(model, mesh, options)
    first = made.step(batch_of(arrays), 1e-3)
    name = "param.model.layers.0.mlp.up_proj.weight"
    broken = made.fetch(name)
    broken[1, 2] = float("inf")
    made.load(
        {each: partial(made.fetch, each) for each in made.changing()} | {name: lambda: broken}
    )
    before = {each: made.fetch(each) for each in made.changing()}
    second = made.step(batch_of(arrays), 1e-3)
    same = {each: torch.equal(made.fetch(each), before[each]) for each in made.changing()}
    return {"finite": [first.finite, second.finite], "same": same}


def dropped(
    model: str,
    mesh: str,
    options: dict[str, Any],
    batches: list[dict[str, np.ndarray]],
    lr: float,
    seed: int,
) -> dict[str, Any]:
    """Steps with dropout of adapters, and the mean loss of the last batch.

    It is evaluated before and after them, by a trainer without dropout that has the same state, and
    as one more step has it.
    """
    made = trainer(model, mesh, options, seed=seed)
    plain = trainer(model, mesh, options | {"lora": options["lora"] | {"dropout": 0.0}}, seed=seed)

    def evaluated(which: Trainer, arrays: dict[str, np.ndarray]) -> float:
        total, count = which.evaluate(batch_of(arrays))
        return total / count

    before = evaluated(made, batches[0])
    losses = [made.step(batch_of(arrays), lr).loss for arrays in batches]
    plain.load({name: partial(made.fetch, name) for name in made.changing()})
    found = {
        "evaluated": evaluated(made, batches[-1]),
        "evaluated_without_dropout": evaluated(plain, batches[-1]),
    }
    return found | {
        "losses": losses,
        "evaluated_before": before,
        "stepped": made.step(batch_of(batches[-1]), 0.0).loss,
    }


def evaluated_between_steps(
    model: str, mesh: str, options: dict[str, Any], arrays: dict[str, np.ndarray], lr: float
) -> dict[str, Any]:
    """Losses of a batch by `evaluate` and by `step` in turns; both programs are made before."""
    made, batch = trainer(model, mesh, options), batch_of(arrays)
    made.compile(evaluate=True)
    compiled = compilations()
    found: dict[str, Any] = {"evaluated": [], "stepped": []}
    for turn in range(4):
        total, count = made.evaluate(batch)
        found["evaluated"].append(total / count)
        if turn < 3:
            found["stepped"].append(made.step(batch, lr).loss)
    return found | {"late": compilations() - compiled}


def held(model: str, mesh: str, options: dict[str, Any]) -> dict[str, Any]:
    """Bytes that each device holds of weights, optimizer and gradients, measured and predicted.

    And bytes of what the plan splits over all devices, and of what is whole on each.
    """
    made = trainer(model, mesh, options)
    shape = (made.options.grad_accum, made.options.batch_size, made.options.seq_len)
    arrays = {name: np.ones(shape, dtype=np.int64) for name in ("ids", "labels")}
    arrays |= {
        "positions": np.broadcast_to(np.arange(shape[2]), shape).copy(),
        "documents": np.zeros(shape, dtype=np.int64),
    }
    arguments = made.arguments(batch_of(arrays), lr=0.0)
    gradients = Program("gradients", made.mesh, made.traced.gradients, arguments)(arguments)
    made.mesh.wait()
    each = [made.mesh.local_bytes(gradient) for gradient in gradients.values()]
    split = whole = 0
    for placement in made.plan.parameters:
        size = 4 * int(np.prod(placement.shape))
        if any(placement.axes):
            split += size
        else:
            whole += size
    predicted = train_memory(
        made.plan, train_step(made.options, made.plan.model.layers, sum_bytes=4)
    )
    return made.bytes_per_device() | {
        "gradients": [sum(sizes) for sizes in zip(*each, strict=True)],
        "predicted": asdict(predicted),
        "split_bytes": split,
        "whole_bytes": whole,
    }
