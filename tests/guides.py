"""README and guides as data: the blocks that they show, and the commands within them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
LANGUAGES = {"console", "python", "sh", "yaml", "json", "text"}
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block.

    Attributes:
        language: `console` and `python` are run, `sh` is not.
        title: name of the file that it is, if it is one.
        where: file and line.
    """

    language: str
    title: str
    body: str
    where: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A command of a console block.

    Attributes:
        words: the command, without what is around it.
        stdin: what is piped into it.
        file: where its output goes.
        output: what stands below it.
        code: the exit code that `$ echo $?` shows.
        line: all of it.
    """

    words: tuple[str, ...]
    stdin: str
    file: str
    output: str
    code: int
    line: str

    @property
    def as_json(self) -> bool:
        return "--json" in self.words

    @property
    def title(self) -> str:
        """What `json_documents` calls its document."""
        kinds = {"--train", "--load"} if self.words[1] == "bench" else set()
        return " ".join(["parallama", self.words[1], *kinds.intersection(self.words)])


def blocks(file: Path) -> list[Block]:
    """All blocks of a Markdown file."""
    text = file.read_text(encoding="utf-8")
    return [
        Block(
            language=found[1],
            title=found[2] or "",
            body=found[3],
            where=f"{file.name}:{text[: found.start()].count(chr(10)) + 1}",
        )
        for found in _BLOCK.finditer(text)
    ]


def commands(block: Block) -> list[Shown]:
    """The commands of a console block, each with what stands below it."""
    parts = re.split(r"^\$ ", block.body, flags=re.MULTILINE)[1:]
    shown: list[Shown] = []
    for part in parts:
        line, _, output = part.partition("\n")
        if line == "echo $?":
            last = shown.pop()
            shown.append(Shown(**{**vars(last), "code": int(output)}))
            continue
        words, stdin, file = shlex.split(line), "", ""
        if words[0] == "echo":
            bar = words.index("|")
            stdin, words = " ".join(words[1:bar]) + "\n", words[bar + 1 :]
        if ">" in words:
            file = words[words.index(">") + 1]
            words = words[: words.index(">")]
        shown.append(
            Shown(words=tuple(words), stdin=stdin, file=file, output=output, code=0, line=line)
        )
    return shown


def prints(output: str, shown: str) -> bool:
    """Whether an output has what is shown, where `...` stands for anything."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in shown.splitlines()]
    pattern = ".*".join(
        ".*".join(re.escape(piece) for piece in line.split("...")) for line in lines
    )
    return re.search(pattern, re.sub(r"\s+", " ", output), re.DOTALL) is not None


GUIDES = sorted(
    file.relative_to(DOCS).as_posix()
    for file in DOCS.rglob("*.md")
    if any(block.language in ("console", "python") for block in blocks(file))
)
"""The pages of docs/ that show something to run."""
