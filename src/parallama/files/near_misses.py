"""What someone meant by a name that no model has: a folder nearby, a hub id, a known name. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from ..errors import shown
from ..model import known_configs

_MOST_ENTRIES = 1000
"""So many of a folder are looked at."""
_ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:models/)?(?P<id>[\w.-]+/[\w.-]+).*"
    r"|(?:hf|hub|huggingface)://(?:models/)?(?P<scheme>[\w.-]+/[\w.-]+).*"
)
_WITH_MORE = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(?:[:@].*|/|/(?:tree|blob|resolve)/.*|/.*\.(?:gguf|safetensors|json))"
)


def near_name(model: str, names: Iterable[str]) -> str:
    """A line that names what someone may have meant by a model that is not there, or nothing.

    Args:
        names: that are known beside folders and hub ids.
    """
    address = _ADDRESS.fullmatch(model)
    if address is not None:
        return f"did you mean the hub id {address['id'] or address['scheme']}?"
    with_more = _WITH_MORE.fullmatch(model)
    if with_more is not None and not _exists(Path(with_more["id"]).parent):
        return f"did you mean the hub id {with_more['id']}? nothing may stand behind one"
    known, plain = list(names), _plain(model)
    found = [name for name in known if _plain(name) == plain]
    for name, weights in known_configs.WEIGHTS.items():
        if _plain(name) == plain and name not in known:
            return f"'parallama plan' knows its config; its weights are {weights} on the hub"
    found += [name for name in known_names(model) if name in known]
    found += difflib.get_close_matches(plain, known, 1, cutoff=0.75)
    return f"did you mean {found[0]}?" if found else _near_path(model)


def known_names(model: str) -> list[str]:
    """Names of shipped configs that a hub id, or a name like one, is the model of."""
    name = model.rpartition("/")[2].lower().removeprefix("meta-").replace("_", "-")
    return [
        known
        for known in known_configs.CONFIGS
        if name.startswith(known)
        and set(name.removeprefix(known).split("-")) <= known_configs.SAME_SHAPES | {""}
    ]


def near_folder(folder: Path) -> str:
    """A line that names where the model is whose folder was meant, or nothing.

    Args:
        folder: one without a config.json.
    """
    if _is_model(folder.parent):
        return f"the folder above has one: {shown(str(folder.parent))}"
    below = [inner for inner in _entries(folder) if inner.is_dir()]
    deeper = [inner for each in below for inner in _entries(each) if inner.is_dir()]
    found = [inner for inner in (*below, *deeper) if _is_model(inner)]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return f"a folder in it has one: {shown(str(found[-1]))}{more}"
    files = [inner for inner in _entries(folder) if inner.suffix == ".gguf"]
    if files:
        return f"it holds a .gguf file: {shown(str(files[0]))}"
    if _exists(folder / "params.json"):
        return "it holds params.json, of Meta's or Mistral's own format: take transformers' files"
    return ""


def near_file(file: Path) -> str:
    """A line that names the folder of a file that is one of a model's, or nothing."""
    return f"give its folder: {shown(str(file.parent))}" if _is_model(file.parent) else ""


def _near_path(model: str) -> str:
    """What a path leads to as far as it does, and what is called alike there."""
    path = Path(model)
    if len(path.parts) < 2 or not _exists(path.parent):
        return ""
    near = difflib.get_close_matches(path.name, [each.name for each in _entries(path.parent)], 1)
    return f"there is {shown(str(path.parent / near[0]))}" if near else ""


def _is_model(folder: Path) -> bool:
    return _exists(folder / "config.json")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _entries(folder: Path) -> Iterator[Path]:
    """Of a folder, by name."""
    try:
        yield from sorted(islice(folder.iterdir(), _MOST_ENTRIES))
    except OSError:
        return


def _plain(name: str) -> str:
    return re.sub(r"[\s_.-]", "", name.lower())
