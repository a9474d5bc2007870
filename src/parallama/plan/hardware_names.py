"""What a user calls hardware: a name of the table, another of the same, a size, a file. Pure."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import text_files
from ..errors import UsageError, cause, lines, shown
from .hardware import GB, HARDWARE, Hardware

_UNITS = {
    unit + ending: factor**power
    for power, unit in enumerate("kmgt", 1)
    for ending, factor in (("", 1000), ("b", 1000), ("ib", 1024))
}
_SAME = {
    "a10g": "a10",
    "a100": "a100-40gb a100-80gb",
    "blackhole": "p100a p150 p300",
    "ironwood": "tpu-v7x",
    "h100": "h100-80gb",
    "inferentia2": "inf2",
    "n150d": "n150",
    "n150s": "n150",
    "n300d": "n300",
    "n300s": "n300",
    "p100": "p100a",
    "p150a": "p150",
    "p150b": "p150",
    "t3k": "n300",
    "tpu-7x": "tpu-v7x",
    "tpu-v5-lite": "tpu-v5e",
    "tpu-v5-litepod": "tpu-v5e",
    "tpu-v5litepod": "tpu-v5e",
    "tpu-v7": "tpu-v7x",
    "trainium": "trn1",
    "trainium1": "trn1",
    "trainium2": "trn2",
    "trainium3": "trn3",
    "trillium": "tpu-v6e",
    "wormhole": "n150 n300 galaxy",
}
"""Other names -> names of the table."""
_NOISE = re.compile(
    r"^(nvidia|tesla|geforce|amd|instinct|intel|google|cloud|aws|tenstorrent|habana|hl|gpu|card"
    r"|sxm\d?|pcie|hbm\d?e?|hgx|dgx)$"
)
"""Words of a device's full name that tell no two devices of the table apart."""
_COUNTED = (
    r"(?P<count>\d+)\s*[x*]?\s+(?P<kind>.+)",
    r"(?P<count>\d+)[x*](?P<kind>.+)",
    r"(?P<kind>.+?)\s*[x*]\s*(?P<count>\d+)",
    r"(?P<kind>.*v\d.*)-(?P<count>\d+)",
)
"""A number of devices beside one's name: `8xh100`, `8 x h100`, `h100x8`, a slice as `v5e-8`."""
_CORES = ("tpu-v4", "tpu-v5p")
"""Their slices are named by cores, of which two make a device."""
_KEYS = {"name", "memory", "memory_bytes", "what"}
_SPEEDS = ("flops", "memory_bytes_per_s", "link_bytes_per_s")


def find_hardware(given: str) -> Hardware:
    """The hardware that a user means.

    Args:
        given: a name of the table in any case or part of it (`h100`), what a driver calls it
            (`NVIDIA A100-SXM4-80GB`), the memory of one device (`24GB`), or a YAML or JSON file.

    Raises:
        UsageError: it is none of these, or several.
    """
    if given.lower().endswith((".yaml", ".yml", ".json")):
        return _read(Path(given).expanduser())
    size = parse_bytes(given)
    if size is not None:
        _check_size(shown(given), size)
        return Hardware(name=given.strip(), memory_bytes=size, what="a device of this size")
    names = _named(given)
    if len(names) == 1:
        return HARDWARE[names[0]]
    if names:
        raise UsageError(
            lines(f"hardware {shown(given)} is several", f"expected one of {', '.join(names)}")
        )
    _refuse_number(given)
    near = difflib.get_close_matches(_plain(given), [*HARDWARE, *_SAME], 1, cutoff=0.75)
    meant = ", ".join(_SAME.get(name, name).split()[0] for name in near)
    raise UsageError(
        lines(
            f"hardware {shown(given)} is unknown" + (f"; did you mean {meant}?" if meant else ""),
            "expected the memory of one device (24GB), a YAML file, or one of:",
            ", ".join(HARDWARE),
        )
    )


def parse_bytes(text: str) -> int | None:
    """`24GB`, `24 GiB`, `1.5tb`, `24G` in bytes; None if it is no size."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([kmgt](?:i?b)?)", text.strip().lower())
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def _named(given: str) -> list[str]:
    """The names of the table that this stands for."""
    plain = _plain(given)
    for name in (plain, f"tpu-{plain}"):
        if name in HARDWARE:
            return [name]
        if name in _SAME:
            return _SAME[name].split()
    words = set(plain.split("-"))
    return [name for name in HARDWARE if words and words <= set(name.split("-"))]


def _refuse_number(given: str) -> None:
    """Say where a number of devices belongs."""
    for pattern in _COUNTED:
        found = re.fullmatch(pattern, given.strip().lower())
        if found is None:
            continue
        size = parse_bytes(found["kind"])
        names = _named(found["kind"]) if size is None else [found["kind"].strip()]
        if not names:
            continue
        count = int(found["count"])
        if pattern == _COUNTED[-1] and names[0] in _CORES:
            count = max(count // 2, 1)
        raise UsageError(
            lines(
                f"hardware {shown(given)} names a number of devices",
                f"expected one device: --hardware {names[0]} --mesh 1x{count}",
            )
        )


def _plain(given: str) -> str:
    """Lower case, with `-` between the words that matter."""
    spaced = re.sub(r"\b(rtx|tpu)(?=[v\d])", r"\1-", given.strip().lower())
    words = re.split(r"[\s_/()-]+", spaced)
    return "-".join(word for word in words if word and not _NOISE.match(word))


def _read(path: Path) -> Hardware:
    """A user's own hardware."""
    import yaml

    try:
        document = yaml.safe_load(text_files.read(path))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(
            lines(
                f"hardware file {str(path)!r} cannot be read: {cause(error, 120)}",
                "expected YAML or JSON with a line such as 'memory: 24GB'",
            )
        ) from None
    known = (*sorted(_KEYS), *_SPEEDS)
    if not isinstance(document, dict) or not {"memory", "memory_bytes"} & document.keys():
        raise UsageError(
            lines(
                f"hardware file {str(path)!r} says no memory",
                "expected a line such as 'memory: 24GB', of one device",
            )
        )
    unknown = [key for key in document if key not in known]
    if unknown:
        raise UsageError(
            lines(
                f"hardware file {str(path)!r} has the key {shown(unknown[0])}",
                f"expected {', '.join(known)}",
            )
        )
    if {"memory", "memory_bytes"} <= document.keys():
        raise UsageError(
            lines(f"hardware file {str(path)!r} has memory and memory_bytes", "expected one")
        )
    given = [key for key in _SPEEDS if key in document]
    made = Hardware(
        name=str(document.get("name", path.stem)),
        memory_bytes=_memory(document, path),
        what=str(document.get("what", f"a device, by {path.name}")),
    )
    speeds: dict[str, Any] = {key: _speed(document[key], key, path) for key in given}
    return replace(made, **speeds)


def _memory(document: dict[str, Any], path: Path) -> int:
    (key,) = {"memory", "memory_bytes"} & document.keys()
    value = document[key]
    size = parse_bytes(value) if isinstance(value, str) else value
    if type(size) is not int:
        expected = "a whole number of bytes" if key == "memory_bytes" else "a size, as 24GB"
        raise UsageError(
            lines(f"hardware file {str(path)!r}: {key} is {shown(value)}", f"expected {expected}")
        )
    _check_size(f"file {str(path)!r}: {key} {shown(value)}", size)
    return size


def _check_size(what: str, size: int) -> None:
    """Refuse what is no device's memory: 24 bytes, or 24 for GB."""
    if not GB // 1000 <= size <= 10**16:
        raise UsageError(
            lines(
                f"hardware {what} is {size:,} bytes",
                "expected the memory of one device, as 24GB",
            )
        )


def _speed(value: Any, key: str, path: Path) -> float:
    """YAML takes `600e9` for text, and so it is read as well."""
    try:
        number = float(value) if type(value) in (int, float, str) else math.nan
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UsageError(
            lines(
                f"hardware file {str(path)!r}: {key} is {shown(value)}",
                "expected a number above 0, as 600e9",
            )
        )
    return number
