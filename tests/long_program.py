"""A program of many loops that XLA:CPU splits over cores, and then one large product.

    python long_program.py LAYERS

It keeps itself to two cores and has as many devices: with more cores nothing can go wrong. On
standard output, as JSON: how many numbers of the product are wrong.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping

import torch

ROWS, HIDDEN, OUT = 224, 576, 16384


def main() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    from parallama.engine.torch_xla import backends

    backends.start("cpu", 2)
    from parallama.engine.torch_xla.mesh import DeviceMesh
    from parallama.engine.torch_xla.ops import optimization_barrier
    from parallama.engine.torch_xla.program import Program

    mesh = DeviceMesh("1x2")
    torch.manual_seed(0)
    host = {
        "x": torch.randn(ROWS, HIDDEN),
        "layer": torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5,
        "head": torch.randn(OUT, HIDDEN),
    }
    axes = {"x": (None, None), "layer": (None, "model"), "head": (None, None)}
    arguments = {name: mesh.put(tensor, axes[name]) for name, tensor in host.items()}

    def step(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        hidden = given["x"]
        for _ in range(
            int(sys.argv[1])
        ):  # each an all-reduce, for which the devices wait, and a loop
            hidden = mesh.mark(torch.sin(hidden @ given["layer"].t()), (None, None))
        hidden = optimization_barrier(hidden)
        return {
            "hidden": hidden,
            "out": optimization_barrier(torch.einsum("oe,ne->on", given["head"], hidden)),
        }

    out = Program("long", mesh, step, arguments)(arguments)
    hidden, got = (mesh.fetch(out[name], (None, None)).double() for name in ("hidden", "out"))
    print(
        json.dumps(
            {
                "wrong": int(((got - host["head"].double() @ hidden.t()).abs() > 1e-3).sum()),
                "largest": float(got.abs().max()),
            }
        )
    )
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
