"""What the tests of re-sharding run in a worker."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from device_cases import from_folder

import parallama
from parallama.engine.row_sampling import RowSampling
from parallama.engine.torch_xla.mesh import DeviceMesh
from parallama.model.spec import ModelSpec
from parallama.plan.make_plan import make_plan
from parallama.sharded.device_weights import put_parameter
from parallama.sharded.layout import Layout, undo
from parallama.sharded.reshard import Mover
from parallama.sharded.reshard_model import reshard_model
from parallama.sharded.shard_model import shard_model


def _cache(session: Any) -> dict[str, torch.Tensor]:
    """A session's cache, in the checkpoint's heads, without idle rows."""
    plan, axes = session.steps.plan, ("data", "model", None, None)
    found = {}
    for name, tensor in session._state.items():
        if name.startswith("cache."):
            found[name] = undo(session.mesh.fetch(tensor, axes), plan.cache_blocks())[
                : session._count
            ].clone()
    return found


def journey(
    folder: str, meshes: list[str], prompts: list[list[int]], rows: list[dict[str, Any]], steps: int
) -> dict[str, Any]:
    """Decode some steps on each of some meshes, in one session; with one mesh it stays there."""
    llm = parallama.load(folder, mesh=meshes[0])
    before = _weights(llm)
    session = llm.session(
        [RowSampling(**row) for row in rows], capacity=64, longest_prompt=max(map(len, prompts))
    )
    taken = [session.prefill(prompts)]
    reports, equal, cache_equal = [], [], []
    for index, mesh in enumerate(meshes):
        if index:
            cache = _cache(session)
            reports.append(asdict(llm.reshard(mesh)))
            now = _weights(llm)
            equal.append(
                now.keys() == before.keys()
                and all(torch.equal(now[name], before[name]) for name in before)
            )
            after = _cache(session)
            cache_equal.append(
                after.keys() == cache.keys()
                and all(torch.equal(after[name], cache[name]) for name in cache)
            )
        taken += list(session.decode(steps))
    return {
        "tokens": [[choices[row].token for choices in taken] for row in range(len(rows))],
        "cached": session.cached,
        "reports": reports,
        "equal": equal,
        "cache_equal": cache_equal,
        "after_warmup": session.stats.programs_after_warmup,
        "measured": llm.param_bytes_per_device(),
        "planned": llm.plan.parameter_bytes(4),
        "cache_measured": session.cache_bytes_per_device(),
        "cache_planned": llm.plan.cache_bytes(len(rows), session._length, 4),
        "slots": [llm.plan.head_layout.slots, llm.plan.head_layout.group],
    }


def _weights(llm: Any) -> dict[str, torch.Tensor]:
    weights = llm.weights
    return {name: weights.fetch(name).clone() for name in weights.tensors}


def half_read(
    folder: str, prompt: list[int], mesh: str, to: str | None, plan: dict[str, Any] | None, new: int
) -> dict[str, Any]:
    """A stream that is resharded after its third token, and what a new call says afterwards."""
    llm = parallama.load(folder, mesh=mesh)
    stream = llm.stream(prompt, max_new_tokens=new, ignore_eos=True)
    tokens = [next(stream).token for _ in range(3)]
    report = asdict(llm.reshard(to, plan=plan)) if to or plan else None
    tokens += [chunk.token for chunk in stream]
    placement = llm.plan["model.layers.0.mlp.up_proj.weight"]
    after = (
        llm.generate(prompt, max_new_tokens=new, ignore_eos=True)[0].token_ids if report else tokens
    )
    return {
        "tokens": tokens,
        "after": after,
        "report": report,
        "style": placement.style,
        "mesh": str(llm.mesh.shape),
    }


def refused(
    folder: str, mesh: str, to: str | None = None, plan: dict[str, Any] | None = None
) -> list[int]:
    """Tokens of a model whose re-sharding was refused; the refusal is raised after that."""
    llm = parallama.load(folder, mesh=mesh)
    first = llm.generate([1, 2, 3], max_new_tokens=4)[0].token_ids
    try:
        llm.reshard(to, plan=plan)
    except parallama.ParallamaError as error:
        assert llm.generate([1, 2, 3], max_new_tokens=4)[0].token_ids == first
        raise error
    raise AssertionError("nothing was refused")


def train(folder: str, meshes: list[str], ids: torch.Tensor, steps: int) -> dict[str, Any]:
    """AdamW on a model that the user sharded, some steps on each mesh."""
    import torch_xla

    model = shard_model(from_folder(folder), meshes[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, equal, kept = [], [], []
    objects = [id(parameter) for parameter in model.parameters()]
    for index, mesh in enumerate(meshes):
        if index:
            before = _optimizer_state(model, optimizer)
            reshard_model(model, mesh, optimizer=optimizer)
            after = _optimizer_state(model, optimizer)
            equal.append(
                before.keys() == after.keys()
                and all(torch.equal(before[name], after[name]) for name in before)
            )
            kept.append([id(parameter) for parameter in model.parameters()] == objects)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            torch_xla.sync()
            losses.append(float(loss.detach().cpu()))
            del loss
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.cpu()
    return {
        "losses": losses,
        "equal": equal,
        "kept": kept,
        "logits": logits,
        "mesh": str(model.parallama_mesh.shape),
        "tensors": len(before) if equal else 0,
    }


def _optimizer_state(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Parameters, gradients and optimizer state in the checkpoint's layout."""
    plan, mesh = model.parallama_plan, model.parallama_mesh
    found = {}
    for name, parameter in model.named_parameters():
        state = {key: value for key, value in optimizer.state[parameter].items() if value.dim()}
        for key, tensor in ({"data": parameter.data, "grad": parameter.grad} | state).items():
            layout = Layout.of(plan, name)
            found[f"{key} {name}"] = undo(mesh.fetch(tensor, layout.axes), layout.blocks).clone()
    return found


def forward_after(folder: str, meshes: list[str], ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits of a model that the user sharded, on one mesh after another."""
    model, logits = shard_model(from_folder(folder), meshes[0]), []
    for mesh in meshes:
        reshard_model(model, mesh)
        with torch.no_grad():
            logits.append(model(input_ids=ids, use_cache=False).logits.float().cpu())
    return logits


def named(folder: str, mesh: str, to: str) -> dict[str, Any]:
    """Any named tensors: two states of one parameter, and one that a user split otherwise."""
    old_mesh, new_mesh = DeviceMesh(mesh), DeviceMesh(to)
    spec = ModelSpec.from_config(from_folder(folder).config)
    old, new = make_plan(spec, old_mesh.shape), make_plan(spec, new_mesh.shape)
    name = "model.layers.0.self_attn.k_proj.weight"
    torch.manual_seed(5)
    hosts = {
        key: torch.randn([int(size) for size in old[name].source_shape])
        for key in ("exp_avg", "exp_avg_sq")
    }
    tensors = {
        key: put_parameter(host, old, old_mesh, name, torch.float32) for key, host in hosts.items()
    }
    hosts["odd"] = torch.arange(64, dtype=torch.int64).reshape(8, 8)
    tensors["odd"] = old_mesh.put(hosts["odd"], ("model", "data"))
    lies = {key: Layout.of(old, name) for key in tensors} | {
        "odd": Layout(mesh=old.mesh, shape=(8, 8), axes=("model", "data"))
    }
    shall = {key: Layout.of(new, name) for key in tensors} | {
        "odd": Layout(mesh=new.mesh, shape=(8, 8), axes=("data", None))
    }
    mover = Mover(old_mesh, new_mesh, tensors.values())
    moved = mover(tensors, lies.__getitem__, shall.__getitem__)
    back = {
        key: undo(new_mesh.fetch(tensor, shall[key].axes), shall[key].blocks)
        for key, tensor in moved.items()
    }
    return {
        "equal": {
            key: torch.equal(back[key], host) and back[key].dtype == host.dtype
            for key, host in hosts.items()
        },
        "left": len(tensors),
        "shapes": {key: new_mesh.local_shapes(tensor)[0] for key, tensor in moved.items()},
        "planned": {key: layout.local_shape for key, layout in shall.items()},
        "report": asdict(mover.result()),
    }


def chat(to: str) -> dict[str, Any]:
    """A trained model's conversation, moved between two turns, beside one that stays."""
    answers = {}
    for moves in (False, True):
        llm = parallama.load("smollm2", mesh="1x8")
        talk = parallama.Chat(llm, max_model_len=512, temperature=0)
        first = [
            chunk.token for chunk in talk.send("What is the capital of France?", max_new_tokens=16)
        ]
        report = asdict(llm.reshard(to)) if moves else None
        computed = talk.stats.prefill_tokens
        second = [chunk.token for chunk in talk.send("And of Italy?", max_new_tokens=16)]
        answers[moves] = {
            "first": first,
            "second": second,
            "computed": talk.stats.prefill_tokens - computed,
            "report": report,
            "after_warmup": talk.stats.programs_after_warmup,
            "text": talk.messages[-1]["content"],
        }
    return answers


def repeated(meshes: list[str]) -> dict[str, Any]:
    """Large tensors that some of the meshes repeat, moved along all of them.

    Returns: what it took, and whether they are the same bits at the end.
    """
    torch.manual_seed(5)
    numbers = torch.randint(
        -(1 << 15), 1 << 15, (4096, 2048), dtype=torch.int16
    )  # every number that there is in bf16, NaN among them
    hosts = {
        "bf16": numbers.view(torch.bfloat16),
        "fp32": torch.randn(2048, 1024),
        "odd": torch.randn(3, 131, 4099),
    }
    axes = {"bf16": ("model", None), "fp32": (None, None), "odd": (None, None, None)}
    mesh = DeviceMesh(meshes[0])
    tensors, reports = {name: mesh.put(host, axes[name]) for name, host in hosts.items()}, []
    for shape in meshes[1:]:
        new_mesh = DeviceMesh(shape)
        mover = Mover(mesh, new_mesh, tensors.values())
        lies, shall = (
            {
                name: Layout(mesh=m.shape, shape=tuple(hosts[name].shape), axes=axes[name])
                for name in hosts
            }
            for m in (mesh, new_mesh)
        )
        tensors, mesh = mover(tensors, lies.__getitem__, shall.__getitem__), new_mesh
        reports.append(asdict(mover.result()))
    back = {name: mesh.fetch(tensor, axes[name]) for name, tensor in tensors.items()}
    return {
        "reports": reports,
        "equal": {
            name: torch.equal(back[name].view(torch.int16), host.view(torch.int16))
            for name, host in hosts.items()
        },
        "shapes": {name: set(mesh.local_shapes(tensor)) for name, tensor in tensors.items()},
    }
