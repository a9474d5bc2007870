"""What the tests of inspection run in a worker."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import parallama
from parallama.__main__ import run
from parallama.inference.llm import LLM
from parallama.prove.inspector import Inspector

Shards = list[torch.Tensor]


def inspected(
    folder: str,
    mesh: str,
    batch: int = 2,
    max_model_len: int = 256,
    contents: Sequence[str] = (),
    fault: str | None = None,
    plan: Any = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """An inspection's document and findings, and of the named tensors what every device holds."""
    llm = parallama.load(folder, mesh=mesh, plan=plan, dtype=dtype)
    if fault is not None:
        FAULTS[fault](llm)
    inspector = Inspector(llm, batch=batch, max_model_len=max_model_len)
    found = inspector.inspect()
    read = {
        name: inspector.read(name) for pattern in contents for name in inspector.select(pattern)
    }
    return {
        "document": found.to_dict(),
        "findings": found.findings,
        "contents": {name: [part.to_dict() for part in parts] for name, (parts, _) in read.items()},
        "faults": [fault for _, faults in read.values() for fault in faults],
        "shards": {name: llm.mesh.shards(inspector.tensors[name]) for name in read},
        "planned": llm.plan.parameter_bytes(llm.steps.dtype.itemsize),
        "planned_kv": llm.plan.cache_bytes(batch, inspector.positions, llm.steps.dtype.itemsize),
    }


def saved(folder: str, to: str) -> None:
    """Save the HLO of a step where nobody asked XLA to write any, or nothing can be written."""
    llm = parallama.load(folder)
    Inspector(llm, batch=1, max_model_len=256).save_hlo(Path(to), "decode")


def command(arguments: list[str], fault: str | None = None, at: str = ".") -> tuple[int, str, str]:
    """Exit code and both outputs of a command in a folder; `fault` misplaces the model."""
    load = parallama.api.load

    def load_wrongly(*args: Any, **kwargs: Any) -> LLM:
        llm = load(*args, **kwargs)
        FAULTS[fault or ""](llm)
        return llm

    out, err = io.StringIO(), io.StringIO()
    if fault is not None:
        parallama.api.load = load_wrongly
    try:
        with contextlib.chdir(at), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(arguments)
    finally:
        parallama.api.load = load
    return code, out.getvalue(), err.getvalue()


QUERY, NORM, KEY = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.norm.weight",
    "model.layers.0.self_attn.k_proj.weight",
)


def _other_axis(llm: LLM) -> None:
    weights = llm.weights.tensors
    weights[QUERY] = llm.mesh.put(llm.mesh.fetch(weights[QUERY], ("model", None)), (None, None))


def _other_shape(llm: LLM) -> None:
    llm.weights.tensors[QUERY] = llm.mesh.put(torch.zeros(16, 36), ("model", None))


def _other_dtype(llm: LLM) -> None:
    weights = llm.weights.tensors
    weights[NORM] = llm.mesh.put(llm.mesh.fetch(weights[NORM], (None,)).bfloat16(), (None,))


def _altered(name: str, alter: Callable[[Shards], None]) -> Callable[[LLM], None]:
    def plant(llm: LLM) -> None:
        mesh, weights = llm.mesh, llm.weights.tensors
        shards = [shard.clone() for shard in mesh.shards(weights[name])]
        alter(shards)
        sharding = mesh._mesh.get_op_sharding(llm.plan[name].axes)
        weights[name] = mesh._xla._XLAC._global_tensor_from_cpu_shards(shards, sharding)

    return plant


def _add_to_copy(shards: Shards) -> None:
    shards[5][3] += 1.0


def _add_to_padding(shards: Shards) -> None:
    shards[-1][-1, :7] = 1.0


def _add_to_repeated_head(shards: Shards) -> None:
    shards[1][0, 0] += 1.0


def _not_a_number(shards: Shards) -> None:
    for shard in shards:
        shard[0], shard[1] = float("nan"), float("inf")


FAULTS: dict[str, Callable[[LLM], None]] = {
    "axis": _other_axis,
    "shape": _other_shape,
    "dtype": _other_dtype,
    "copy": _altered(NORM, _add_to_copy),
    "padding": _altered(QUERY, _add_to_padding),
    "repeat": _altered(KEY, _add_to_repeated_head),
    "nan": _altered(NORM, _not_a_number),
}
