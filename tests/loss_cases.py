"""What the tests of the loss run in a worker."""

from __future__ import annotations

from typing import Any

import torch

from parallama.engine.torch_xla.loss import next_token_loss
from parallama.engine.torch_xla.mesh import DeviceMesh
from parallama.plan.mesh_shape import DATA, MODEL


def on_devices(mesh: str, logits: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    """The loss of logits that are split over the mesh, and its gradient."""
    devices = DeviceMesh(mesh)
    axes = (
        (DATA, None, MODEL) if logits.shape[-1] % devices.shape.model == 0 else (DATA, None, None)
    )
    ours = devices.put(logits, axes).requires_grad_()
    loss = next_token_loss(ours, devices.put(ids, (DATA, None)), parts=devices.shape.model)
    loss.backward()
    gradient = devices.mark(ours.grad, axes)
    devices.run()
    return {"loss": float(loss.detach().cpu()), "gradient": devices.fetch(gradient, axes)}
