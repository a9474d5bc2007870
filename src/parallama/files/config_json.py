"""A model's config, where no weights are needed: from a name, a folder, a file or the hub.

Only a `.gguf` file takes torch and transformers to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import environment
from ..errors import CheckpointError, cause, lines, shown
from ..model import known_configs
from .adapter_config import base_of, is_adapter
from .locate import locate
from .model_files import read_config as read_folder
from .model_files import read_json


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
    try:
        located = locate(model)
    except CheckpointError:
        known_names = ", ".join([*known_configs.ALIASES, *known_configs.CONFIGS])
        raise CheckpointError(
            lines(
                f"model {shown(model)} is not there",
                "expected a folder, a config.json, a .gguf file, a hub id (org/name), "
                "or a name that parallama knows:",
                known_names,
            )
        ) from None
    if located.kind == "hub":
        return read_json(_config_from_hub(located.hub_id))
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
        )
    )


def _config_of_gguf(path: Path) -> Mapping[str, Any]:
    environment.expect_no_devices()
    from .gguf_file import GgufFile  # with torch and transformers

    document: Mapping[str, Any] = GgufFile(path).config.to_dict()
    return document


def _config_from_hub(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    except HFValidationError as error:
        raise CheckpointError(
            lines(f"model {hub_id!r} is no valid hub id: {cause(error)}")
        ) from None
    except Exception as error:  # the hub's client raises many kinds, network ones among them
        raise CheckpointError(
            lines(
                f"the config.json of {hub_id!r} cannot be had from the hub: {type(error).__name__}",
                "check the name and the network, or give a folder or a config.json",
            )
        ) from None
