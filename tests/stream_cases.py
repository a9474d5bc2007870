"""What the tests of loading, re-sharding and export run in a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import parallama
from parallama.checkpoint import SafetensorsFolder
from parallama.loading import to_devices
from parallama.mesh import DeviceMesh
from parallama.plan import make_plan
from parallama.program import compiled_programs


def loaded(folder: str, mesh: str, dtype: str) -> dict[str, Any]:
    """A folder on the devices: what was read, the tensors as they come back, and progress as it was reported."""
    checkpoint, device_mesh = SafetensorsFolder(Path(folder)), DeviceMesh(mesh)
    reported: list[tuple[int, int]] = []
    plan = make_plan(checkpoint.spec, device_mesh.shape)
    compiled = compiled_programs()
    made = to_devices(checkpoint, plan, device_mesh, getattr(torch, dtype), lambda done, total: reported.append((done, total)))
    compiled = compiled_programs() - compiled
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
