"""Run, prove and train Hugging Face Llama models, split over XLA devices by tensor parallelism.

    import parallama

    llm = parallama.load("smollm2", mesh="1x8")
    print(llm.generate("The largest planet in the solar system is", max_new_tokens=32)[0].text)

Names are imported on first use, so that `import parallama` and `--help` don't pay for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import load as load
    from .engine.torch_xla.mesh import DeviceMesh as DeviceMesh
    from .errors import ParallamaError as ParallamaError
    from .files.export import export_weights as export_weights
    from .inference.chat import Chat as Chat
    from .inference.completion import Chunk as Chunk
    from .inference.completion import Completion as Completion
    from .inference.llm import LLM as LLM
    from .inference.sampling_params import SamplingParams as SamplingParams
    from .model.spec import ModelSpec as ModelSpec
    from .plan.heads import HeadLayout as HeadLayout
    from .plan.make_plan import make_plan as make_plan
    from .plan.mesh_shape import MeshShape as MeshShape
    from .plan.placement import Plan as Plan
    from .prove.validation import Validation as Validation
    from .prove.validation import validate as validate
    from .sharded.reshard import Resharding as Resharding
    from .sharded.reshard_model import reshard_model as reshard_model
    from .sharded.shard_model import shard_model as shard_model

__version__ = "0.1.0"

_HOMES = {
    "LLM": "inference.llm",
    "Chat": "inference.chat",
    "Chunk": "inference.completion",
    "Completion": "inference.completion",
    "load": "api",
    "ParallamaError": "errors",
    "HeadLayout": "plan.heads",
    "DeviceMesh": "engine.torch_xla.mesh",
    "Plan": "plan.placement",
    "make_plan": "plan.make_plan",
    "Resharding": "sharded.reshard",
    "reshard_model": "sharded.reshard_model",
    "export_weights": "files.export",
    "SamplingParams": "inference.sampling_params",
    "shard_model": "sharded.shard_model",
    "ModelSpec": "model.spec",
    "MeshShape": "plan.mesh_shape",
    "Validation": "prove.validation",
    "validate": "prove.validation",
}
__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
