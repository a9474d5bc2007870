"""What the tests of loading, re-sharding and export run in a worker."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import parallama
from parallama.engine.torch_xla.counters import compilations
from parallama.engine.torch_xla.mesh import DeviceMesh
from parallama.engine.torch_xla.program import Program
from parallama.errors import UsageError
from parallama.files.checkpoint import SafetensorsFolder
from parallama.host import rss_bytes
from parallama.plan.make_plan import make_plan
from parallama.sharded.loading import to_devices


def loaded(folder: str, mesh: str, dtype: str) -> dict[str, Any]:
    """A folder on the devices: what was read, the tensors as they come back, and the progress."""
    checkpoint, device_mesh = SafetensorsFolder(Path(folder)), DeviceMesh(mesh)
    reported: list[tuple[int, int]] = []
    plan = make_plan(checkpoint.spec, device_mesh.shape)
    compiled = compilations()
    made = to_devices(
        checkpoint,
        plan,
        device_mesh,
        getattr(torch, dtype),
        lambda done, total: reported.append((done, total)),
    )
    compiled = compilations() - compiled
    return {
        "programs": compiled,
        "measured": made.weights.bytes_per_device(),
        "planned": plan.parameter_bytes(getattr(torch, dtype).itemsize),
        "bytes_read": made.stats.bytes_read,
        "order": list(made.weights.tensors),
        "tensors": {name: made.weights.fetch(name) for name in made.weights.tensors},
        "reported": reported,
        "threads": torch.get_num_threads(),
    }


def export(folder: str, mesh: str, out: str) -> dict[str, Any]:
    """A model loaded onto a mesh and handed back."""
    return parallama.load(folder, mesh=mesh).export(out).to_dict()


def _freed(gone: weakref.ref[torch.Tensor]) -> bool:
    """Whether a host tensor is freed soon: a thread of the runtime may still let go of it."""
    until = time.monotonic() + 10
    while gone() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    return gone() is None


def taken_over(dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """A host tensor that one device takes over: its memory, its values, and when it is freed."""
    import torch_xla

    mesh = DeviceMesh("1x1")
    host = torch.randn(shape).to(getattr(torch, dtype))
    copy, place, gone = host.clone(), host.data_ptr(), weakref.ref(host)
    device = mesh.adopt(host)
    same_memory = torch_xla._XLAC._unsafe_buffer_pointer(device) == place
    del host
    gc.collect()
    kept = gone() is not None
    read, computed = mesh.fetch(device, (None,) * copy.dim()), (device + device).cpu()
    del device
    mesh.wait()
    return {
        "same_memory": same_memory,
        "given": copy,
        "read": read,
        "computed": computed,
        "kept": kept,
        "freed": _freed(gone),
    }


def given_away(size: int, times: int) -> dict[str, Any]:
    """A program that its argument is donated to, several times.

    The argument starts as memory that was taken over.

    Returns: the host's tensor, and what comes out.
    """
    import torch_xla

    mesh, host = DeviceMesh("1x1"), torch.arange(float(size))
    gone, places = weakref.ref(host), []

    def step(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"state": given["state"] * 2.0 + 1.0}

    state = mesh.adopt(host)
    program = Program("double", mesh, step, {"state": state}, ["state"])
    for _ in range(times):
        places.append(torch_xla._XLAC._unsafe_buffer_pointer(state))
        state = program({"state": state})["state"]
        mesh.wait()
    places.append(torch_xla._XLAC._unsafe_buffer_pointer(state))
    unchanged = torch.equal(host, torch.arange(float(size)))
    started_there = places[0] == host.data_ptr()
    del host, program
    gc.collect()
    return {
        "unchanged": unchanged,
        "started_there": started_there,
        "places": [places.index(place) for place in places],
        "state": state.cpu(),
        "freed": _freed(gone),
    }


def changed_in_place(size: int) -> dict[str, Any]:
    """An optimizer step, as a user's own loop takes it, on a parameter that was taken over."""
    import torch_xla

    mesh, host = DeviceMesh("1x1"), torch.arange(float(size))
    parameter = torch.nn.Parameter(mesh.adopt(host))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        (parameter * 3.0).sum().backward()
        optimizer.step()
        torch_xla.sync()
    return {"host": host, "parameter": parameter.detach().cpu()}


def dropped_in_flight(size: int, products: int) -> dict[str, Any]:
    """A tensor that was taken over and is dropped while a program reads it.

    Returns: whether its memory is there before the drop, after it, and when the program is done.
    """
    import torch_xla

    mesh, host = DeviceMesh("1x1"), torch.eye(size)
    gone = weakref.ref(host)
    device = mesh.adopt(host)
    del host

    def chain(tensor: torch.Tensor) -> torch.Tensor:
        result = tensor
        for _ in range(products):
            result = result @ tensor
        return result

    warm = chain(device)
    torch_xla.sync()
    mesh.wait()
    del warm
    result = chain(device)
    torch_xla.sync(wait=False)
    del device
    there = gone() is not None
    value = result.cpu()
    mesh.wait()
    return {"there": there, "right": torch.equal(value, torch.eye(size)), "freed": _freed(gone)}


def refused_to_take_over(mesh: str) -> dict[str, Any]:
    """What a mesh says of tensors that it can't take over."""
    device_mesh = DeviceMesh(mesh)
    tensors = {
        "plain": torch.ones(4, 4),
        "turned": torch.ones(4, 6).t(),
        "within another": torch.ones(33)[1:],
    }
    found: dict[str, Any] = {"shares": device_mesh.traits.adopts}
    for name, tensor in tensors.items():
        try:
            device_mesh.adopt(tensor)
            found[name] = "taken over"
        except UsageError:
            found[name] = "refused"
    return found


def rewritten(folder: str, dtype: str, plan: dict[str, Any]) -> dict[str, Any]:
    """A model on one device whose file is written over, then laid out anew."""
    llm = parallama.load(folder, mesh="1x1", dtype=dtype)
    weights = llm.weights
    first = llm.generate([1, 2, 3], max_new_tokens=6, ignore_eos=True)[0].token_ids
    before = {name: weights.fetch(name) for name in weights.tensors}
    file = Path(folder) / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    after = {name: weights.fetch(name) for name in weights.tensors}
    report = asdict(llm.reshard(plan=plan))
    weights = llm.weights
    moved = {name: weights.fetch(name) for name in weights.tensors}
    again = llm.generate([1, 2, 3], max_new_tokens=6, ignore_eos=True)[0].token_ids
    return {
        "before": before,
        "after": after,
        "moved": moved,
        "tokens": (first, again),
        "tensors": report["tensors"],
    }


def dropped(folder: str, dtype: str) -> dict[str, int]:
    """This process's memory before a model is on one device, at most, after, and without it."""
    import torch_xla

    DeviceMesh("1x1").put(torch.zeros(1), (None,))
    parallama.load(folder, mesh="1x1", dtype=dtype)
    gc.collect()
    llm = parallama.load(folder, mesh="1x1", dtype=dtype)
    stats, after = llm.load_stats, rss_bytes()
    found = {"devices": sum(llm.param_bytes_per_device()), "largest": stats.largest_tensor_bytes}
    llm = None
    torch_xla.sync()
    gc.collect()
    return found | {"before": stats.baseline_rss_bytes, "loaded": after, "gone": rss_bytes()}
