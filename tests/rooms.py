"""The rooms of the package, and the tables of them in docs/design.md.

`python tests/rooms.py` writes the tables anew.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "parallama"
DESIGN = Path(__file__).parents[1] / "docs" / "design.md"


@dataclass(frozen=True)
class Room:
    """A folder of the package.

    Attributes:
        says: its responsibility.
        may: the rooms that its files may import, besides itself.
        pure: its files import no torch, torch_xla or transformers, and need no device.
    """

    says: str
    may: str
    pure: bool = False


# From the bottom up. docs/design.md has the same table; a test holds the two together.
ROOMS: dict[str, Room] = {
    "root": Room(
        "what everyone needs: errors, notices, texts, the machine, the environment", "", pure=True
    ),
    "model": Room("what a config means", "root", pure=True),
    "plan": Room("where tensors are placed, and what that costs", "root model", pure=True),
    "files": Room("untrusted files in and out", "root model plan"),
    "engine/devices": Room("plugins, versions, known faults", "root", pure=True),
    "engine": Room("the door: what every engine offers", "root plan engine/devices", pure=True),
    "engine/torch_xla": Room("torch-xla's engine", "root model plan engine engine/devices"),
    "sharded": Room("a plan put on a model", "root model plan files engine"),
    "inference": Room("continuing texts", "root model plan files engine sharded"),
    "evaluate": Room("tasks and scores", "root model plan files engine inference"),
    "train": Room(
        "runs, logs, checkpoints", "root model plan files engine engine/devices sharded inference"
    ),
    "train/torch_xla": Room(
        "the optimizer step on torch-xla",
        "root model plan files engine/torch_xla sharded train",
    ),
    "prove": Room(
        "held against plan or transformers",
        "root model plan files engine engine/devices sharded inference train",
    ),
    "bench": Room(
        "measuring, beside peers",
        "root model plan files engine engine/devices sharded inference train face",
    ),
    "serve": Room(
        "an OpenAI-compatible server",
        "root model plan files engine engine/devices sharded inference train prove",
    ),
    "cli": Room(
        "one file a command",
        "root model plan files engine engine/devices inference evaluate train prove bench serve"
        " face",
    ),
    "face": Room(
        "what users call first", "root model plan files engine sharded inference prove cli"
    ),
}
FACE = {"__init__", "__main__", "api"}
FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    """`plan/heads` for `plan/heads.py`."""
    return path.relative_to(SOURCE).with_suffix("").as_posix()


def room_of(name: str) -> str:
    """The room of a file by its name: the folder that it is in."""
    if name in FACE:
        return "face"
    return name.rpartition("/")[0] or "root"


def with_tables(text: str) -> str:
    """The design's text, with its tables of rooms and of files as they are now."""
    for name, lines in (("rooms", _rooms()), ("files", _files())):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{begin}\n.*?{end}", re.DOTALL)
        made = "\n".join((begin, *lines, end))
        text, count = pattern.subn(lambda _match, made=made: made, text)
        assert count == 1, f"docs/design.md has {count} tables of {name}"
    return text


def _rooms() -> Iterator[str]:
    yield "| room | responsibility | pure | may import |"
    yield "|---|---|---|---|"
    for name, room in ROOMS.items():
        folder = name if name in ("root", "face") else f"`{name}/`"
        yield f"| {folder} | {room.says} | {'yes' if room.pure else ''} | {room.may} |"


def _files() -> Iterator[str]:
    for name in ROOMS:
        yield f"\n**{name}**\n"
        for path in FILES:
            file = name_of(path)
            if room_of(file) == name and (name == "face" or path.stem != "__init__"):
                yield f"- `{path.stem}`: {_first_sentence(path)}"


def _first_sentence(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0].replace("|", "\\|")


if __name__ == "__main__":
    DESIGN.write_text(with_tables(DESIGN.read_text(encoding="utf-8")), encoding="utf-8")
