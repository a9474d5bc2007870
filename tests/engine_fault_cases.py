"""What the tests of the engine's faults run in a worker."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from train_cases import batch_of, trainer

from parallama.engine.steps import LOGITS_AXES
from parallama.engine.torch_xla import attention_products, ops, scoring
from parallama.engine.torch_xla.counters import compilations
from parallama.engine.torch_xla.mesh import DeviceMesh
from parallama.engine.torch_xla.program import Program

_ROWS = (None, None)


def wholes(numbers: list[int]) -> list[int]:
    """Whole numbers, sent as floats."""
    mesh = DeviceMesh("1x1")
    given = {"numbers": mesh.put(torch.tensor(numbers), (None,))}

    def step(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"numbers": ops.whole_of_float(ops.whole_as_float(tensors["numbers"]))}

    return mesh.fetch(Program("wholes", mesh, step, given)(given)["numbers"], (None,)).tolist()


def greedy_targets(mesh: str, vocab: int, best: int, targets: list[int]) -> list[bool]:
    """Whether scoring takes each target for the best token, where `best` is."""
    device_mesh = DeviceMesh(mesh)
    logits = torch.zeros(1, 1, vocab)
    logits[..., best] = 1.0
    given = {"logits": device_mesh.put(logits, LOGITS_AXES)}
    found = []
    for target in targets:
        given["targets"] = device_mesh.put(torch.tensor([[target]]), ("data", None))

        def step(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            _, greedy, _ = scoring.score(tensors["logits"], tensors["targets"], device_mesh, vocab)
            return {"greedy": device_mesh.mark(greedy, ("data", None))}

        program = Program("scoring", device_mesh, step, given)
        found.append(bool(device_mesh.fetch(program(given)["greedy"], ("data", None)).item()))
    return found


def largest(vocab: int, best: list[int], mesh: str) -> tuple[list[int], list[float]]:
    """What the sampler chooses where each row's `best` has the largest logit."""
    from device_cases import choose

    logits = torch.zeros(len(best), vocab)
    logits[torch.arange(len(best)), torch.tensor(best)] = 1.0
    positions = torch.zeros(len(best), dtype=torch.int32)
    tokens, logprobs = choose(mesh, logits, [{}] * len(best), positions)
    return tokens.tolist(), logprobs.tolist()


def kept_of(vocab: int, top_k: int) -> int:
    """How many tokens `top_k` keeps of a vocabulary where so many have the best score."""
    from device_cases import choose

    logits = torch.zeros(1, vocab)
    logits[:, :top_k] = 1.0
    rows = [{"temperature": 1.0, "top_k": top_k}]
    kept = choose("1x1", logits, rows, torch.zeros(1, dtype=torch.int32), kept=True)
    return int(kept.sum())


def dropped_gradients(
    model: str, mesh: str, step: int, batches: list[dict[str, np.ndarray]]
) -> list[dict[str, torch.Tensor]]:
    """Gradients of adapters with dropout, after so many steps, of each of some batches."""
    options = {"batch_size": 2, "seq_len": 8, "grad_accum": 2}
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.5, "targets": ("q_proj",)}
    made = trainer(model, mesh, options | {"lora": lora})
    made.load({"step": lambda: torch.tensor([float(step)])} | _state(made))
    return [dict(made.gradients(batch_of(arrays))) for arrays in batches]


def _state(made: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """The rest of a trainer's state; `lora_B`, which begins as zero, as ones."""
    names = [name for name in made.changing() if name != "step"]
    tensors = {name: made.fetch(name) for name in names}
    for name, tensor in tensors.items():
        if name.startswith("param.") and "lora_B" in name:
            tensors[name] = torch.ones_like(tensor)
    return {name: lambda tensor=tensor: tensor for name, tensor in tensors.items()}


def operations_of_maxima(times: int) -> int:
    """How many operations are registered anew while a step with maxima is traced so often."""
    from torch_xla.core.xla_op_registry import Op

    mesh = DeviceMesh("1x1")
    rows = mesh.put(torch.ones(2, 4), _ROWS)

    def count() -> int:
        gc.collect()
        return sum(isinstance(each, Op) for each in gc.get_objects())

    attention_products.row_maximum(mesh, rows)
    before = count()
    for _ in range(times):
        attention_products.row_maximum(mesh, rows)
    return count() - before


class Broken(Exception):
    """A step breaks."""


def after_a_broken_step(mesh: str) -> dict[str, Any]:
    """What a step leaves behind that breaks while it is traced, with `state` donated."""
    device_mesh, axes = DeviceMesh(mesh), (None, "model")
    given = {"state": device_mesh.put(torch.ones(4, 8), axes)}
    traced = []

    def broken(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        traced.append(tensors["state"] * 3)
        raise Broken

    with contextlib.suppress(Broken):
        Program("broken", device_mesh, broken, given, ["state"])
    before = compilations()
    device_mesh.run()
    device_mesh.wait()
    ran = compilations() - before
    return {"ran": ran, **_doubled(device_mesh, given)}


def after_a_good_step(mesh: str) -> dict[str, Any]:
    """A tensor that a program was made with which donates it, and not run: what another makes."""
    device_mesh, axes = DeviceMesh(mesh), (None, "model")
    given = {"state": device_mesh.put(torch.ones(4, 8), axes)}
    Program(
        "update", device_mesh, lambda tensors: {"state": tensors["state"] + 1}, given, ["state"]
    )
    return _doubled(device_mesh, given)


def _doubled(mesh: DeviceMesh, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A program that only reads `state`, run twice: its results, and the state afterwards."""
    axes = (None, "model")
    double = Program("double", mesh, lambda tensors: {"double": tensors["state"] * 2}, given)
    sums = []
    for _ in range(2):
        sums.append(float(mesh.fetch(double(given)["double"], axes).sum()))
    return {"double": sums, "state": float(mesh.fetch(given["state"], axes).sum())}


def not_compiled(mesh: str) -> list[str]:
    """Steps that `Program` refuses: the errors' kinds."""
    device_mesh = DeviceMesh(mesh)
    x = device_mesh.put(torch.ones(4, 8), _ROWS)
    other = device_mesh.put(torch.ones(4, 8), _ROWS)
    found = []
    for step, given in (
        (lambda t: {"y": t["x"] + t["other"]}, {"x": x, "other": x}),
        (lambda t: {"y": t["x"] + t["other"]}, {"x": x, "other": other}),
        (lambda t: {"x": t["other"] + 1}, {"x": x, "other": other}),
    ):
        try:
            Program("refused", device_mesh, step, given, ["x"])
        except Exception as error:
            found.append(type(error).__name__)
        else:
            found.append("none")
    return found
