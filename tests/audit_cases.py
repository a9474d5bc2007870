"""What `test_audit` runs in a worker whose programs are dumped: audits, with faults or without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from device_cases import from_folder

from parallama.engine.row_sampling import RowSampling
from parallama.engine.steps import StepKey, cache_names
from parallama.engine.torch_xla import cache
from parallama.engine.torch_xla.mesh import DeviceMesh
from parallama.engine.torch_xla.program import Program
from parallama.engine.torch_xla.scopes import name_scopes
from parallama.engine.torch_xla.steps import Steps
from parallama.files.checkpoint import SafetensorsFolder
from parallama.inference.programs import ProgramSet, make_programs
from parallama.inference.session import Session
from parallama.model.spec import ModelSpec
from parallama.plan.collectives import expected_collectives
from parallama.plan.make_plan import make_plan
from parallama.plan.mesh_shape import DATA, MODEL
from parallama.plan.program_shapes import CHUNK, cache_buckets, chunk_size
from parallama.prove import hlo
from parallama.prove.audit import audit, collectives_of, differences
from parallama.sharded.loading import to_devices


def model_of(
    folder: str, mesh: str, plan: Any, dtype: str, one_core_each: bool | None = None
) -> Any:
    checkpoint = SafetensorsFolder(Path(folder))
    device_mesh = DeviceMesh(mesh)
    if one_core_each is not None:
        device_mesh.backend = replace(device_mesh.backend, one_core_each=one_core_each)
    made = make_plan(ModelSpec.from_config(checkpoint.config), device_mesh.shape, plan)
    return to_devices(checkpoint, made, device_mesh, getattr(torch, dtype))


def session_key(phase: Any, batch: int, positions: int) -> StepKey:
    """The program that a session would use for a phase; those on slots are `step_key`'s."""
    if phase == "decode":
        length = cache_buckets(positions + 1, rows=batch)[-1]
        return StepKey(kind="decode", batch=batch, length=length)
    new = chunk_size(positions)
    return StepKey(
        kind="prefill",
        batch=batch,
        length=cache_buckets(max(positions, new), rows=batch)[-1],
        new=new,
        fresh=positions <= CHUNK,
    )


def judged(
    folder: str,
    mesh: str,
    phase: Any,
    *,
    plan: Mapping[str, Any] | None = None,
    fault: str | None = None,
    batch: int = 4,
    positions: int = 16,
    accept_plan: bool = False,
    dtype: str = "float32",
    one_core_each: bool | None = None,
) -> dict[str, Any]:
    """The audit's document, as on a machine with a core for every device or without, if given."""
    model = model_of(folder, mesh, plan, dtype, one_core_each)
    if fault in MODEL_FAULTS:
        MODEL_FAULTS[fault](model)
    steps = model.steps()
    programs = PROGRAM_FAULTS[fault](steps) if fault in PROGRAM_FAULTS else make_programs(steps)
    return audit(
        steps,
        programs,
        phase,
        session_key(phase, batch, positions),
        accept_plan=accept_plan,
    ).to_dict()


def audited_run(folder: str, mesh: str, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """Both phases' audits, and how a session on the audited programs continues the prompts."""
    model = model_of(folder, mesh, None, "float32")
    made = model.steps()
    programs = make_programs(made)
    longest = max(len(prompt) for prompt in prompts)
    phases: tuple[Any, ...] = ("prefill", "decode")
    audits = {
        phase: audit(made, programs, phase, session_key(phase, len(prompts), longest)).to_dict()
        for phase in phases
    }
    session = Session(
        made,
        programs,
        [RowSampling()] * len(prompts),
        capacity=longest + steps,
        longest_prompt=longest,
    )
    assert session.stats.programs_compiled == 0
    taken = [session.prefill(prompts), *session.decode(steps - 1)]
    return {
        "audits": audits,
        "tokens": [[choices[row].token for choices in taken] for row in range(len(prompts))],
        "logprobs": [[choices[row].logprob for choices in taken] for row in range(len(prompts))],
        "after_warmup": session.stats.programs_after_warmup,
    }


# -- faults of what lies on the devices


def _place(name: str, axes: tuple[str | None, ...]) -> Callable[[Any], None]:
    """Parameters (`*` for the layer) lie by other axes than planned."""

    def plant(model: Any) -> None:
        weights = model.weights
        names = (
            [name.replace("*", str(layer)) for layer in range(weights.plan.model.layers)]
            if "*" in name
            else [name]
        )
        for each in names:
            whole = weights.mesh.fetch(weights.tensors[each], weights.plan[each].axes)
            weights.tensors[each] = weights.mesh.put(whole, axes)

    return plant


class _WholeTable(torch.nn.Module):
    """A lookup in a table that every device must have whole."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = torch.nn.Parameter(torch.empty(0, device="meta"))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, self.mesh.mark(self.weight * 1, (None, None)))


def _gather_table(model: Any) -> None:
    model.skeleton.model.embed_tokens = _WholeTable(model.weights.mesh)


class _Part(torch.nn.Module):
    """One of three projections that share a weight: the whole product, then its own columns."""

    def __init__(self, fused: torch.Tensor, first: int, count: int) -> None:
        super().__init__()
        self.fused, self.first, self.count = [fused], first, count
        self.weight = torch.nn.Parameter(torch.empty(0, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bse,oe->bso", x, self.fused[0])[
            ..., self.first : self.first + self.count
        ]


def _concatenate(model: Any) -> None:
    """q, k and v as one weight, split in equal parts over the devices as it stands."""
    weights = model.weights
    for layer in range(weights.plan.model.layers):
        names = [
            f"model.layers.{layer}.self_attn.{part}.weight"
            for part in ("q_proj", "k_proj", "v_proj")
        ]
        parts = [
            weights.mesh.fetch(weights.tensors[name], weights.plan[name].axes) for name in names
        ]
        fused = weights.mesh.put(torch.cat(parts), (MODEL, None))
        first = 0
        for name, part in zip(names, parts, strict=True):
            setattr(
                model.skeleton.model.layers[layer].self_attn,
                name.split(".")[-2],
                _Part(fused, first, part.shape[0]),
            )
            first += part.shape[0]


MODEL_FAULTS: dict[str | None, Callable[[Any], None]] = {
    "o_proj split on its outputs": _place("model.layers.*.self_attn.o_proj.weight", (MODEL, None)),
    "up_proj split on its inputs": _place("model.layers.*.mlp.up_proj.weight", (None, MODEL)),
    "o_proj replicated": _place("model.layers.*.self_attn.o_proj.weight", (None, None)),
    "lm_head replicated": _place("lm_head.weight", (None, None)),
    "table gathered": _gather_table,
    "one layer replicated": _place("model.layers.1.mlp.down_proj.weight", (None, None)),
    "q, k and v concatenated": _concatenate,
}


# -- faults of a program


def _given(
    steps: Steps,
    change: Callable[[Steps, StepKey, dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    donate: bool = True,
) -> ProgramSet:
    """Programs that are traced with other arguments than the session's."""
    plain = make_programs(steps)

    def build(key: StepKey) -> Program:
        seen: dict[str, Any] = {}
        original = steps.compile

        def catch(key: StepKey, arguments: Mapping[str, torch.Tensor]) -> Program:
            seen.update(change(steps, key, dict(arguments)))
            if donate:
                return original(key, seen)
            step = steps._prefill if key.kind == "prefill" else steps._decode
            return Program("undonated", steps.mesh, lambda given: step(given, key), seen)

        steps.compile = catch  # type: ignore[method-assign]
        try:
            return plain._build(key)
        finally:
            steps.compile = original  # type: ignore[method-assign]

    return ProgramSet(build)


def _cache_over_head_dim(steps: Steps) -> ProgramSet:
    """The cache lies split over the numbers of each head, in the arguments and for the step."""
    axes = (DATA, None, None, MODEL)

    def build(key: StepKey) -> Program:
        shape, plan = steps.mesh.shape, steps.plan
        local = (
            key.batch // shape.data,
            plan.head_layout.slots,
            key.length,
            plan.model.head_dim // shape.model,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache, "CACHE_AXES", axes)

            def change(
                _steps: Steps, _key: StepKey, arguments: dict[str, torch.Tensor]
            ) -> dict[str, torch.Tensor]:
                made = {
                    name: steps.mesh.put_shards(lambda _device: torch.zeros(local), axes)
                    for name in cache_names(plan.model.layers)
                }
                return arguments | made

            return _given(steps, change)._build(key)

    return ProgramSet(build)


def _ids_by_position(
    steps: Steps, key: StepKey, arguments: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return arguments | {
        "ids": steps.mesh.put(torch.zeros(key.batch, key.new, dtype=torch.long), (None, MODEL))
    }


PROGRAM_FAULTS: dict[str | None, Callable[[Steps], ProgramSet]] = {
    "cache split over head_dim": _cache_over_head_dim,
    "ids split over positions": lambda steps: _given(steps, _ids_by_position),
    "cache not donated": lambda steps: _given(
        steps, lambda _steps, _key, arguments: arguments, donate=False
    ),
}


def recipe(folder: str, mesh: str, batch: int = 2, positions: int = 16) -> list[dict[str, Any]]:
    """What the plain recipe compiles to, against the plan.

    Transformers' own forward and heads; q, k, v, gate and up are split on their outputs, o and down
    on their inputs.
    """
    model, device_mesh = from_folder(folder), DeviceMesh(mesh)
    plan = make_plan(ModelSpec.from_config(model.config), device_mesh.shape)
    name_scopes(model.model, "model")
    name_scopes(model.lm_head, "lm_head")
    for name, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                full = f"{name}.{leaf}"
                moved = device_mesh.put(
                    parameter.data,
                    plan[full].axes if full in plan else plan["model.embed_tokens.weight"].axes,
                )
                module._parameters[leaf] = torch.nn.Parameter(moved, requires_grad=False)
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[leaf] = device_mesh.put(buffer, (None,) * buffer.dim())

    def step(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = model(
            input_ids=given["ids"],
            attention_mask=given["mask"],
            position_ids=given["places"],
            use_cache=False,
        )
        return {"logits": device_mesh.mark(out.logits, (DATA, None, MODEL))}

    host = {
        "ids": torch.zeros(batch, positions, dtype=torch.long),
        "mask": torch.full((1, 1, positions, positions), -1e30).triu(1),
        "places": torch.arange(positions)[None],
    }
    axes = {"ids": (DATA, None), "mask": (None,) * 4, "places": (None, None)}
    given = {name: device_mesh.put(tensor, axes[name]) for name, tensor in host.items()}
    (text,) = Program("recipe", device_mesh, step, given).hlo()
    wanted = expected_collectives(
        plan,
        "prefill",
        batch=batch,
        positions=positions,
        itemsize=4,
        everywhere=True,
        slots=False,
    )
    return [
        asdict(finding) for finding in differences(wanted, collectives_of([hlo.parse(text)], plan))
    ]


def trained(folder: str, mesh: str, options: dict[str, Any]) -> dict[str, Any]:
    """The audit of a training step."""
    from train_cases import trainer

    from parallama.prove.train_audit import audit_training

    return audit_training(trainer(folder, mesh, options)).to_dict()
