"""Run, prove, train and serve Hugging Face Llama models split over XLA devices by tensor parallelism.

    import parallama

    llm = parallama.load("smollm2", mesh="1x8")
    print(llm.generate("The largest planet in the solar system is", max_new_tokens=32)[0].text)

Names are imported on first use, so that `import parallama` and `parallama --help` don't pay for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import load as load
    from .chat import Chat as Chat
    from .errors import ParallamaError as ParallamaError
    from .export import export_weights as export_weights
    from .heads import HeadLayout as HeadLayout
    from .llm import LLM as LLM
    from .llm import Chunk as Chunk
    from .llm import Completion as Completion
    from .mesh import DeviceMesh as DeviceMesh
    from .plan import Plan as Plan
    from .plan import make_plan as make_plan
    from .reshard import Resharding as Resharding
    from .reshard import reshard_model as reshard_model
    from .sampling import SamplingParams as SamplingParams
    from .shard import shard_model as shard_model
    from .spec import ModelSpec as ModelSpec
    from .topology import MeshShape as MeshShape
    from .validation import Validation as Validation
    from .validation import validate as validate

__version__ = "0.1.0"

_HOMES = {
    "LLM": "llm",
    "Chat": "chat",
    "Chunk": "llm",
    "Completion": "llm",
    "load": "api",
    "ParallamaError": "errors",
    "HeadLayout": "heads",
    "DeviceMesh": "mesh",
    "Plan": "plan",
    "make_plan": "plan",
    "Resharding": "reshard",
    "reshard_model": "reshard",
    "export_weights": "export",
    "SamplingParams": "sampling",
    "shard_model": "shard",
    "ModelSpec": "spec",
    "MeshShape": "topology",
    "Validation": "validation",
    "validate": "validation",
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
