"""A model's config, where no weights are needed: from a name, a folder, a file or the hub.

Only a `.gguf` file takes torch and transformers to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import environment
from ..errors import CheckpointError, lines, shown
from ..model import known_configs
from .adapter_config import base_of, is_adapter
from .hub_answers import config_of
from .locate import locate
from .model_files import read_config as read_folder
from .model_files import read_json
from .near_misses import near_file, near_name


def read_config(model: str) -> Mapping[str, Any]:
    """The contents of a model's config.json.

    Args:
        model: a name of `known_configs`, a folder (an adapter's: of its base), a config.json, a
            `.gguf` file or a hub id, of which config.json alone is downloaded.

    Raises:
        CheckpointError: there is no such model, or its config cannot be read.
    """
    known = known_configs.named(model)
    if known is not None:
        return known
    names = [*known_configs.ALIASES, *known_configs.CONFIGS]
    try:
        located = locate(model)
    except CheckpointError:
        raise CheckpointError(
            lines(
                f"model {shown(model)} is not there",
                "expected a folder, a config.json, a .gguf file, a hub id (org/name), or one of: "
                + ", ".join(names),
                near_name(model, names),
            )
        ) from None
    if located.kind == "hub":
        return read_json(config_of(located.hub_id))
    if located.kind == "folder":
        if is_adapter(located.path):
            return read_config(base_of(located.path))
        return read_folder(located.path)
    if located.path.suffix == ".gguf":
        return _config_of_gguf(located.path)
    if located.path.suffix == ".json":
        return read_json(located.path)
    raise CheckpointError(
        lines(
            f"{model!r} is a file of a kind that is not supported",
            "expected a config.json, a .gguf file, or a folder with config.json",
            near_file(located.path),
        )
    )


def _config_of_gguf(path: Path) -> Mapping[str, Any]:
    environment.expect_no_devices()
    from .gguf_file import GgufFile  # with torch and transformers

    document: Mapping[str, Any] = GgufFile(path).config.to_dict()
    return document
