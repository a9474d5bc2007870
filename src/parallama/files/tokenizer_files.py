"""The tokenizer of a model folder.

transformers sees nothing but its files, checked, and a config without the keys that name code or
other files.
"""

from __future__ import annotations

import codecs
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import text_files
from ..errors import CheckpointError, cause, lines, shown
from ..notices import say_once
from . import model_files, tokenizer_load_trial, tokenizer_values
from .bounded_tokenizer import bound
from .tokenizer_agreement import by_its_files
from .tokenizer_pipeline import is_bounded_file

_FAST = "tokenizer.json"
_ANY_OF = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_PLAIN = (
    *("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json", "tiktoken.model"),
)
_CONFIG, _TEMPLATES = "tokenizer_config.json", model_files.TEMPLATES
NAMES = (*_PLAIN, _CONFIG)
"""Every file that a tokenizer is read from, and the default chat template."""
_SENTENCES = "tokenizer.model"
_VOCABULARIES = [name for name in _PLAIN if name.endswith(".model") or name.startswith("vocab.")]
_LIMIT_BYTES = 256 << 20
_TEXTS = (".json", ".txt", ".jinja")
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CODE_KEYS = {
    *("auto_map", "trust_remote_code", "name_or_path", "init_inputs", "processor_class"),
    "fast_tokenizer_files",
}


def read(folder: Path, model_type: str) -> Any | None:
    """transformers' tokenizer of a model folder, or None if there is none.

    Nothing outside of the folder is read. Every call of the tokenizer ends: with tokens or text, or
    a `CheckpointError`.

    Args:
        model_type: the model's, which says the tokenizer's class where its config names none.

    Raises:
        CheckpointError: one of its files is not a regular file of the folder, or cannot be read.
    """
    found = files(folder)
    if not any(name in found for name in _ANY_OF):
        return None
    with tempfile.TemporaryDirectory(prefix="parallama-tokenizer-") as staged:
        stage = Path(staged)
        (stage / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        if _CONFIG in found:
            config = _read_config(found.pop(_CONFIG))
            (stage / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
        for name, path in found.items():
            (stage / name).parent.mkdir(exist_ok=True)
            _stage(name, path, stage / name)
        if _FAST not in found or not is_bounded_file(_content(stage / _FAST)):
            tokenizer_load_trial.check(stage, folder)
        tokenizer = load(stage, folder)
    for note in tokenizer.notes:
        say_once(f"{folder.name}: {note}")
    tokenizer.name_or_path = str(folder)
    return bound(tokenizer, repr(str(folder)))


def files(folder: Path) -> dict[str, Path]:
    """A folder's files of its tokenizer and chat templates, by their paths within it.

    Raises:
        CheckpointError: one of them is not a regular file of the folder, or too large.
    """
    found = {name: path for name in NAMES if (path := model_files.find(folder, name)) is not None}
    found |= _templates(folder)
    for name, path in found.items():
        if name in _VOCABULARIES and path.stat().st_size == 0:
            raise CheckpointError(lines(f"{name} is empty", "expected a vocabulary"))
        if path.stat().st_size > _LIMIT_BYTES:
            raise CheckpointError(
                lines(
                    f"{name} has {path.stat().st_size} bytes",
                    f"expected at most {_LIMIT_BYTES}, of a tokenizer's file",
                )
            )
    return found


def load(stage: Path, folder: Path) -> Any:
    """transformers' tokenizer of files that were checked; its `notes` say what they disagree on.

    Args:
        stage: where they are.
        folder: what they are of, for messages.

    Raises:
        CheckpointError: transformers refuses them.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(stage), local_files_only=True, trust_remote_code=False
        )
        tokenizer.notes = []
        if (stage / _FAST).exists():
            tokenizer, tokenizer.notes = by_its_files(tokenizer, stage)
        return tokenizer
    except (KeyboardInterrupt, SystemExit, CheckpointError):
        raise
    except BaseException as error:  # tokenizers raise bare Exception, and panics that are none
        text = cause(error).replace(str(stage), str(folder))
        raise CheckpointError(
            lines(
                f"the tokenizer in {str(folder)!r} cannot be read: {text}",
                _fault(stage),
            )
        ) from None


def _fault(stage: Path) -> str:
    """What is wrong with the files, where that can be told."""
    from tokenizers import Tokenizer

    path = stage / _FAST
    if not path.exists():
        if (stage / _SENTENCES).exists() and find_spec("sentencepiece") is None:
            return f"{_SENTENCES} takes a package more: pip install sentencepiece"
        if not any((stage / name).exists() for name in _VOCABULARIES):
            return f"there is no {path.name}: copy it from the model that this one was made of"
        return ""
    try:
        Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # as above
        return f"it is {path.name} that is broken: {cause(error)}"
    return ""


def _stage(name: str, path: Path, place: Path) -> None:
    """Link a file to its place, or write it there without its byte order mark."""
    if name in (tokenizer_values.SPECIAL, tokenizer_values.ADDED):
        document = model_files.read_json(path)
        tokenizer_values.check(name, document)
    if path.suffix in _TEXTS and (start := _content(path, 3)).startswith(_MARKS):
        try:
            place.write_text(text_files.decode(_content(path)), encoding="utf-8")
        except UnicodeDecodeError:
            which = "UTF-8" if start.startswith(codecs.BOM_UTF8) else "UTF-16"
            raise CheckpointError(
                lines(f"{name} cannot be read: it is no {which} text", "expected UTF-8")
            ) from None
    else:
        place.symlink_to(path.resolve())


def _content(path: Path, count: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise CheckpointError(
            lines(f"{path.name} cannot be read: {error.strerror or cause(error)}")
        ) from None


def _read_config(path: Path) -> dict[str, Any]:
    document: Any = model_files.read_json(path)
    tokenizer_values.check(_CONFIG, document)
    code = document.get("auto_map")
    if code is not None and not (isinstance(code, dict) and code.get("AutoTokenizer") is None):
        raise CheckpointError(
            lines(
                f"the tokenizer in {str(path.parent)!r} cannot be read: "
                f"{_CONFIG} names code of its own: {shown(code)}",
                "expected a tokenizer of transformers: code of a checkpoint is never run",
            )
        )
    return {
        key: value
        for key, value in document.items()
        if key not in _CODE_KEYS and not key.endswith("_file") and not key.startswith("__")
    }


def _templates(folder: Path) -> dict[str, Path]:
    """The chat templates beside the default one."""
    inner = folder / _TEMPLATES
    if not inner.is_dir():
        return {}
    if inner.is_symlink():
        raise CheckpointError(
            lines(f"{_TEMPLATES} is a link", "expected a folder of chat templates")
        )
    names = sorted(path.name for path in inner.iterdir() if path.name.endswith(".jinja"))
    return {
        f"{_TEMPLATES}/{name}": path
        for name in names
        if (path := model_files.find(folder, name, inside=_TEMPLATES)) is not None
    }
