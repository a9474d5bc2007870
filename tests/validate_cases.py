"""What the tests of validation run in a worker."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import parallama
from parallama.__main__ import run
from parallama.engine.torch_xla.steps import Steps
from parallama.prove.module_parity import compare_modules, first_fault
from parallama.prove.reference import ReferenceOutputs, ReferenceRequest
from parallama.prove.tolerance import Tolerance
from parallama.prove.validation import judge

Alter = Callable[[list[torch.Tensor]], None]
"""Changes the devices' parts of a weight, in place."""


def judged(
    mesh: str, request: dict[str, Any], answers: str, dtype: str = "float32", plan: Any = None
) -> dict[str, Any]:
    """A validation with answers that are there already, and its document."""
    llm = parallama.load(request["model"], mesh=mesh, dtype=dtype, plan=plan)
    found = judge(llm, ReferenceRequest(**request), ReferenceOutputs(Path(answers)))
    return asdict(found) | {
        "document": found.to_dict(),
        "faults": found.faults,
        "passed": found.passed,
    }


def with_fault(mesh: str, fault: str, request: dict[str, Any], answers: str) -> dict[str, Any]:
    """The modules out of tolerance, alone and altogether, after a fault was planted."""
    llm = parallama.load(request["model"], mesh=mesh)
    PLANT[fault](llm.steps)
    tolerance = Tolerance(dtype="float32", devices=llm.mesh.shape.model)
    modules = compare_modules(
        llm.steps, ReferenceOutputs(Path(answers)), request["ids"][: request["traced"]], tolerance
    )
    return {
        "alone": [
            module.name for module in modules if not module.alone_relative_l2 <= module.tolerance
        ],
        "inputs": {module.name: module.inputs_ok for module in modules},
        "bad": [module.name for module in modules if not module.ok],
        "first": first_fault(modules),
    }


def validated(mesh: str, folder: str, ids: list[int], decode: int) -> dict[str, Any]:
    """The public function, with its own reference process."""
    found = parallama.validate(parallama.load(folder, mesh=mesh), ids, decode=decode)
    return found.to_dict()


def refused(folder: str, calls: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """What `parallama.validate` raises: type, exit code, message."""
    llm, raised = parallama.load(folder), []
    for call in calls:
        try:
            parallama.validate(llm, **call)
            raised.append(("nothing", 0, ""))
        except parallama.ParallamaError as error:
            raised.append((type(error).__name__, error.exit_code, str(error)))
    return raised


def vanished(folder: str, ids: list[int]) -> str:
    """What is said when the checkpoint is gone before the reference reads it."""
    llm = parallama.load(folder)
    (Path(folder) / "model.safetensors").unlink()
    try:
        parallama.validate(llm, ids, decode=2)
    except parallama.ParallamaError as error:
        return f"{type(error).__name__} {error}"
    return "nothing"


def command(arguments: list[str]) -> tuple[int, str, str]:
    """A command line, in this process: exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    return code, out.getvalue(), err.getvalue()


# -- faults, planted in what lies on the devices


def _altered(name: str, alter: Alter) -> Callable[[Steps], None]:
    def plant(steps: Steps) -> None:
        weights = steps.weights
        parts = [part.clone() for part in steps.mesh.shards(weights[name])]
        alter(parts)
        weights[name] = steps.mesh.put_shards(lambda device: parts[device], steps.plan[name].axes)

    return plant


def _swap_heads(parts: list[torch.Tensor]) -> None:
    """The first two query heads of the first device."""
    parts[0][:16] = parts[0][:16].roll(8, 0)


def _swap_columns(parts: list[torch.Tensor]) -> None:
    """Two query heads of a device in the middle, where they are multiplied out."""
    device = len(parts) // 4
    parts[device][:, :16] = parts[device][:, :16].roll(8, 1)


def _drop_others(parts: list[torch.Tensor]) -> None:
    """What an all-reduce that isn't one gives: one device's partial sums."""
    for part in parts[1:]:
        part.zero_()


def _transpose_slice(parts: list[torch.Tensor]) -> None:
    parts[0][:4, :4] = parts[0][:4, :4].t().clone()


def _one_nan(parts: list[torch.Tensor]) -> None:
    parts[0][1, 2] = torch.nan


def _slower_rotation(steps: Steps) -> None:
    """As if a linear RoPE scaling of 2 stood in the config."""
    name = "rotary_emb.inv_freq"
    steps._buffers[name] = steps.mesh.put(
        steps.mesh.fetch(steps._buffers[name], (None,)) / 2, (None,)
    )


def _other_temperature(steps: Steps) -> None:
    steps.base.layers[0].self_attn.scaling *= 1.01


def _second_copy(steps: Steps) -> None:
    """A repeated KV head that differs from its first copy."""
    sources = steps.plan.head_layout.kv_sources
    place = next(place for place, source in enumerate(sources) if source in sources[:place])
    slots = len(sources) // steps.mesh.shape.model

    def alter(parts: list[torch.Tensor]) -> None:
        parts[place // slots][(place % slots) * 8] *= 1.001

    _altered("model.layers.0.self_attn.k_proj.weight", alter)(steps)


PLANT: dict[str, Callable[[Steps], None]] = {
    "swapped heads": _altered("model.layers.1.self_attn.q_proj.weight", _swap_heads),
    "swapped heads in the output": _altered(
        "model.layers.0.self_attn.o_proj.weight", _swap_columns
    ),
    "dropped all-reduce after attention": _altered(
        "model.layers.1.self_attn.o_proj.weight", _drop_others
    ),
    "dropped all-reduce after the MLP": _altered(
        "model.layers.0.mlp.down_proj.weight", _drop_others
    ),
    "wrong RoPE scaling": _slower_rotation,
    "wrong softmax scaling": _other_temperature,
    "one NaN": _altered("model.layers.1.self_attn.v_proj.weight", _one_nan),
    "transposed slice": _altered("model.layers.0.mlp.gate_proj.weight", _transpose_slice),
    "a second copy that differs": _second_copy,
}
