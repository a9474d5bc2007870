"""A model of the hub, downloaded: the files that loading reads, and nothing else.

Repositories hold the same weights several times: as `consolidated.safetensors`, as pickles, for
other programs in folders of their own. Of weights, what the index names is fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError, lines, listed
from . import model_files, tokenizer_files, weight_files
from .adapter_config import WEIGHTS as ADAPTER_WEIGHTS
from .manifest import NAME as MANIFEST

_DESCRIBING = (
    *("config.json", "generation_config.json", model_files.ADAPTER, weight_files.INDEX, MANIFEST),
    *tokenizer_files.NAMES,
    f"{model_files.TEMPLATES}/*.jinja",
)
_WEIGHTS = tuple(f"*{ending}" for ending in (".safetensors", ".gguf", *weight_files.PICKLES))


def download(hub_id: str) -> Path:
    """The folder of a model in the hub's cache, with every file that loading it reads.

    Offline, what the cache holds.

    Raises:
        CheckpointError: the repository has no weights that can be read.
        Exception: the hub's client raises many kinds.
    """
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(hub_id, allow_patterns=[*_DESCRIBING]))
    weights = _weights(hub_id, folder)
    if weights:
        # Of the same commit, should the repository change meanwhile.
        snapshot_download(hub_id, revision=folder.name, allow_patterns=weights)
    return folder


def _weights(hub_id: str, folder: Path) -> list[str]:
    """The names of the weight files to fetch; none where nobody can say."""
    if (folder / model_files.ADAPTER).exists():
        return [ADAPTER_WEIGHTS]
    index = model_files.find(folder, weight_files.INDEX)
    if index is not None:
        return sorted(set(weight_files.read_index(index).values()))
    names = _stored_weights(hub_id, folder.name)
    if names is None:
        return []
    stored = [name for name in names if name.endswith(".safetensors")]
    if stored:
        return [weight_files.SINGLE] if weight_files.SINGLE in stored else stored
    others = [name for name in names if name.endswith(".gguf")]
    raise CheckpointError(
        lines(
            f"model {hub_id!r} has no *.safetensors file"
            + (f", only {listed(names, 2)}" if names else ""),
            f"expected {weight_files.SINGLE}, or several with an index",
            "download one of its .gguf files and give that" if others else "",
        )
    )


def _stored_weights(hub_id: str, revision: str) -> list[str] | None:
    """The weight files in the repository's own folder; None where the hub cannot be asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    patterns = [*_WEIGHTS]
    try:
        found: Any = snapshot_download(
            hub_id, revision=revision, allow_patterns=patterns, dry_run=True
        )
    except DryRunError:
        return None
    return sorted(info.filename for info in found if "/" not in info.filename)
