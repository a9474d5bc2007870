"""What stands beside the weights of an exported model: config, generation config, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import text_files
from . import model_files, tokenizer_files, tokenizer_values
from .adapter import AdaptedCheckpoint
from .checkpoint import Checkpoint, SafetensorsFolder
from .config_spellings import dtype_in_both, rope_in_both, tokenizer_in_both
from .disk import Disk

_CODE_KEYS = ("auto_map",)
"""Keys of a config.json that name code, which is not copied."""


def write_config(source: Checkpoint, folder: Path, dtype: str | None, disk: Disk) -> list[str]:
    """config.json as it came, but with the dtype written, and without keys that name code.

    What releases of transformers spell differently is in it in both ways.
    """
    source = _base(source)
    if isinstance(source, SafetensorsFolder):
        document: dict[str, Any] = dict(model_files.read_config(source.location))
    else:
        document = described(source.config)
    for key in _CODE_KEYS:
        document.pop(key, None)
    if dtype is not None:
        document |= {"dtype": dtype}
    document |= dtype_in_both(document) | rope_in_both(source.config.rope_parameters)
    disk.write(folder / "config.json", _json(document))
    return ["config.json"]


def described(config: Any) -> dict[str, Any]:
    """The config.json of a checkpoint that has none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    document = config.to_diff_dict()
    return {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]} | document


def write_others(source: Checkpoint, folder: Path, disk: Disk) -> list[str]:
    """Generation config, tokenizer and chat templates.

    They are a folder's own files as they are, or what another checkpoint says.
    """
    base = _base(source)
    if isinstance(base, SafetensorsFolder):
        return _copy_others(base.location, _tokenizer_folder(source), folder, disk)
    there = set(folder.rglob("*"))
    if source.generation:
        disk.write(folder / "generation_config.json", _json(source.generation))
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    _spell_tokenizer(folder, disk)
    new = sorted(path for path in folder.rglob("*") if path.is_file() and path not in there)
    for path in new:
        disk.sync_file(path)
    names = [str(path.relative_to(folder)) for path in new]
    _sync_inner(folder, names, disk)
    return names


def _base(source: Checkpoint) -> Checkpoint:
    """The model itself, where a checkpoint is one with adapters."""
    while isinstance(source, AdaptedCheckpoint):
        source = source.base
    return source


def _tokenizer_folder(source: Checkpoint) -> Path:
    """Where a checkpoint's tokenizer is."""
    while isinstance(source, AdaptedCheckpoint) and source.tokenizer_folder is None:
        source = source.base
    own = source.tokenizer_folder if isinstance(source, AdaptedCheckpoint) else None
    return own or source.location


def _copy_others(origin: Path, tokenizer: Path, folder: Path, disk: Disk) -> list[str]:
    own = tokenizer_files.files(tokenizer)
    generation = model_files.find(origin, "generation_config.json")
    if generation is not None:
        own[generation.name] = generation
    for name, path in own.items():
        copy = folder / name
        if not copy.parent.exists():
            disk.make_folder(copy.parent)
        disk.copy(path, copy)
    _spell_tokenizer(folder, disk)
    _sync_inner(folder, own, disk)
    return list(own)


def _spell_tokenizer(folder: Path, disk: Disk) -> None:
    """See `config_spellings.tokenizer_in_both`."""
    config = folder / tokenizer_values.CONFIG
    template = folder / "chat_template.jinja"
    if config.exists():
        text = text_files.read(template) if template.exists() else None
        changed = tokenizer_in_both(model_files.read_json(config), text)
        if changed is not None:
            disk.replace(config, _json(changed))


def _sync_inner(folder: Path, names: Iterable[str], disk: Disk) -> None:
    """Sync the folders within a folder that some files of it are in."""
    for inner in dict.fromkeys((folder / name).parent for name in names):
        if inner != folder:
            disk.sync_folder(inner)


def _json(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, indent=2, ensure_ascii=False)
    # UTF-8 has no half of a surrogate pair; JSON has it as an escape.
    return text.encode(errors="backslashreplace") + b"\n"
