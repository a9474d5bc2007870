"""A few seconds of real work on a backend's devices, compared with the host's arithmetic.

`python -m parallama.engine.torch_xla.selftest REQUEST` does it in a process of its own, since a
plugin may crash or hang, and prints one line of JSON. `doctor` starts it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...errors import ParallamaError, cause
from ...plan.mesh_shape import MODEL
from . import backends
from .mesh import DeviceMesh
from .program import Program

CPU_DEVICES = 2
REPLAYS = 3
# Sums of 64 to 512 float32 products of numbers between -1 and 1. A device that multiplies in
# bfloat16 or TF32 keeps 8 to 11 bits of each.
ALLOWED = {"cpu": 1e-4}
ALLOWED_ELSEWHERE = 5e-2


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check.

    Attributes:
        max_error: largest absolute difference from the host's result; None where nothing was
            compared.
        allowed_error: how large it may be.
        said: what went wrong, if it wasn't the numbers.
    """

    name: str
    max_error: float | None
    allowed_error: float
    said: str | None = None

    @property
    def passed(self) -> bool:
        if self.said is not None or self.max_error is None:
            return False
        return self.max_error <= self.allowed_error


def run(backend: str, options: dict[str, Any]) -> dict[str, Any]:
    """Start the backend (two virtual devices on `cpu`, all that there are elsewhere) and check it.

    Raises:
        ParallamaError: it doesn't start.
    """
    started = backends.start(backend, CPU_DEVICES if backend == "cpu" else None, options)
    mesh = DeviceMesh(f"1x{started.devices}", backend=backend, backend_options=options)
    allowed = ALLOWED.get(started.name, ALLOWED_ELSEWHERE)
    checks = [*product(mesh, allowed), *donation(mesh)]
    return {
        "mesh": str(mesh.shape),
        "devices": backends.device_names(),
        "library": None if started.library is None else str(started.library),
        "pjrt_api": None if started.api is None else str(started.api),
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
    }


def product(mesh: DeviceMesh, allowed: float) -> Iterator[Check]:
    """`relu(x @ A.T) @ B.T`, split as a layer is.

    A is split by its outputs, B by its inputs; all devices add up B's partial sums.
    """
    devices = mesh.shape.devices
    draw = torch.Generator().manual_seed(1)
    sizes = ((4, 64), (32 * devices, 64), (48, 32 * devices))
    x, first, second = (torch.rand(size, generator=draw) * 2 - 1 for size in sizes)
    given = {
        "x": mesh.put(x, (None, None)),
        "first": mesh.put(first, (MODEL, None)),
        "second": mesh.put(second, (None, MODEL)),
    }

    def step(tensors: Any) -> dict[str, torch.Tensor]:
        hidden = mesh.mark(tensors["x"] @ tensors["first"].T, (None, MODEL))
        total = mesh.mark(torch.relu(hidden) @ tensors["second"].T, (None, None))
        return {"hidden": hidden, "sum": total}

    outputs = Program("selftest-product", mesh, step, given)(given)
    hidden = x.double() @ first.double().T
    yield compare("sharded product", mesh.fetch(outputs["hidden"], (None, MODEL)), hidden, allowed)
    wanted = torch.relu(hidden) @ second.double().T
    # Every device's own copy: an all-reduce that some device missed shows only there.
    copies = torch.stack(mesh.shards(outputs["sum"]))
    yield compare("all-reduce", copies, wanted.expand_as(copies), allowed)


def donation(mesh: DeviceMesh) -> Iterator[Check]:
    """A buffer that each run takes over and writes again, as the KV cache is.

    The results count up, and the tensor that was passed in is dead.
    """
    start = torch.arange(16 * mesh.shape.devices, dtype=torch.float32).reshape(-1, 4)
    axes = (MODEL, None)
    given = {"state": mesh.put(start, axes), "by": mesh.put(torch.ones(4), (None,))}

    def step(tensors: Any) -> dict[str, torch.Tensor]:
        return {"state": mesh.mark(tensors["state"] + tensors["by"], axes)}

    program = Program("selftest-donation", mesh, step, given, ["state"])
    passed_in = given["state"]
    for _ in range(REPLAYS):
        given["state"] = program(given)["state"]
    check = compare("donated buffer", mesh.fetch(given["state"], axes), start + REPLAYS, 0.0)
    if check.passed and _readable(mesh, passed_in):
        check = replace(check, said="the buffer was copied, not taken over")
    yield check


def _readable(mesh: DeviceMesh, tensor: torch.Tensor) -> bool:
    try:
        mesh.shards(tensor)
    except RuntimeError:
        return False
    return True


def compare(name: str, got: torch.Tensor, wanted: torch.Tensor, allowed: float) -> Check:
    """A device's result beside the host's."""
    blank = Check(name=name, max_error=None, allowed_error=allowed)
    if got.shape != wanted.shape:
        shapes = f"the result is {list(got.shape)}, expected {list(wanted.shape)}"
        return replace(blank, said=shapes)
    error = (got.double() - wanted.double()).abs().max().item()
    if not math.isfinite(error):
        return replace(blank, said="the result is not finite")
    return replace(blank, max_error=error)


def main() -> None:
    """In the child: what `run` found, or the error, as the last line of standard output."""
    request = json.loads(sys.argv[1])
    try:
        with contextlib.redirect_stdout(sys.stderr):
            reply = run(request["backend"], request["options"])
    except ParallamaError as error:
        reply = {"error": str(error), "exit_code": error.exit_code}
    except Exception as error:  # whatever the plugin makes torch-xla raise
        reply = {"error": f"{type(error).__name__}: {cause(error)}", "exit_code": 1}
    sys.stdout.write("\n" + json.dumps(reply) + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # XLA's threads need not be joined one by one


if __name__ == "__main__":
    main()
