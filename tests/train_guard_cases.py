"""What the tests of training's guards run in a worker."""

from __future__ import annotations

import copy
from typing import Any

import torch

from parallama.engine.torch_xla.mesh import DeviceMesh
from parallama.files.find import find
from parallama.files.skeleton import make_skeleton
from parallama.model.spec import ModelSpec
from parallama.plan.make_plan import make_plan
from parallama.sharded.device_weights import put_parameter
from parallama.train.options import StepOptions
from parallama.train.torch_xla.step import Trainer


def one_checkpoint(model: str, mesh: str) -> dict[str, Any]:
    """Two trainers and the steps of inference of one checkpoint: their attention, and
    its config.
    """
    checkpoint, device_mesh = find(model), DeviceMesh(mesh)
    before = copy.deepcopy(vars(checkpoint.config))
    spec = ModelSpec.from_config(checkpoint.config)
    options = StepOptions(batch_size=1, seq_len=8)
    trainers = [Trainer(checkpoint, device_mesh, options) for _ in range(2)]
    plan = make_plan(spec, device_mesh.shape)
    weights = {
        name: put_parameter(tensor, plan, device_mesh, name, torch.float32)
        for name, tensor in checkpoint.tensors(spec)
    }
    skeleton = make_skeleton(checkpoint.config)
    device_mesh.steps(skeleton, plan, weights, torch.float32)
    own = make_skeleton(checkpoint.config).model
    return {
        "same": vars(checkpoint.config) == before,
        "attention": checkpoint.config._attn_implementation,
        "served": skeleton.config._attn_implementation,
        "trained": [each.traced._base.config._attn_implementation for each in trainers],
        "shared": [own.config is checkpoint.config, own.rotary_emb.config is checkpoint.config],
    }
