"""The keys of a JSON document, from the classes that it is made of; read with griffe, not imported.

`json_documents` has the documents; `python tests/json_documents.py` writes docs/json.md.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[1]
EXTENSION = ROOT / "docs" / "site" / "docstrings.py"
BASIC = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "Path": "string",
    "Any": "anything",
    "None": "null",
}
LISTS = ("tuple", "list", "Sequence")
MAPS = ("dict", "Mapping")


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of a document.

    Attributes:
        path: names with dots between them; `[]` behind a list.
        type: of its value, in JSON's words.
        meaning: one line.
        optional: not every document has it.
    """

    path: str
    type: str
    meaning: str
    optional: bool = False

    @property
    def is_map(self) -> bool:
        """Its own keys are data, and not described."""
        return self.type.startswith("object of ")


@dataclass(frozen=True, kw_only=True)
class Document:
    """What a command prints with `--json`.

    Attributes:
        title: the command.
        about: a sentence or two, in Markdown.
        keys: all of them.
        others: it may have more keys than these, which someone else describes.
    """

    title: str
    about: str
    keys: tuple[Key, ...]
    others: bool = False


@dataclass(frozen=True, kw_only=True)
class Type:
    """A type in JSON's words.

    Attributes:
        text: as the page has it.
        of: the class whose fields are the keys of its objects.
        brackets: `[]` for every list around these.
    """

    text: str
    of: griffe.Class | None = None
    brackets: str = ""


class Classes:
    """The package's classes.

    Args:
        words: what keys mean whose class does not say it: by their names, or by room, class
            and name, as `prove.Report.faults`.
    """

    def __init__(self, words: Mapping[str, str]) -> None:
        extensions = griffe.load_extensions(f"{EXTENSION}:OneNameEach")
        package = griffe.load("parallama", search_paths=[ROOT / "src"], extensions=extensions)
        assert isinstance(package, griffe.Module)
        self.package, self._words = package, words

    def find(self, name: str) -> griffe.Class:
        """A class by its room and name: `prove.Validation`."""
        room, _, cls = name.rpartition(".")
        start = self.package[room]
        found = [module.members.get(cls) for module in [start, *_below(start)]]
        made = [each for each in found if isinstance(each, griffe.Class)]
        assert len(made) == 1, f"{name} is {[each.path for each in made]}"
        return made[0]

    def all_of(self, cls: griffe.Class, prefix: str = "") -> Iterator[Key]:
        """The fields of a dataclass, each followed by those of its own class."""
        owners = [*reversed(cls.mro()), cls]
        fields = {each.name: each for owner in owners for each in owner.attributes.values()}
        for name, field in fields.items():
            if _is_field(field):
                yield from self.one(cls, name, prefix + name)

    def one(self, cls: griffe.Class, name: str, path: str) -> Iterator[Key]:
        """A field or property under this path, followed by the fields of its class."""
        found = cls.all_members[name]
        annotation = str(found.annotation)  # of a property: what it returns
        last = path.rpartition(".")[2]
        if last == "mesh" and annotation.startswith("dict"):
            yield from mesh(path)
            return
        kind = self.type_of(ast.parse(annotation, mode="eval").body, found)
        meaning = _attributes(cls).get(name, "")
        if not meaning and found.docstring is not None:
            meaning = _small(found.docstring.value.split("\n\n")[0])
        if not meaning:
            room = cls.path.split(".")[1]
            own = self._words.get(f"{room}.{cls.name}.{name}")
            meaning = own or self._words.get(last, "")
        yield Key(path=path, type=kind.text, meaning=_one_line(meaning))
        if kind.of is not None:
            yield from self.all_of(kind.of, f"{path}{kind.brackets}.")

    def type_of(self, node: ast.expr, scope: Any) -> Type:
        """What an annotation is in JSON.

        Args:
            scope: the griffe object that it belongs to.
        """
        match node:
            case ast.BinOp(left=left, right=right):
                first, second = self.type_of(left, scope), self.type_of(right, scope)
                keyed = second if first.of is None else first
                return Type(
                    text=f"{first.text} or {second.text}", of=keyed.of, brackets=keyed.brackets
                )
            case ast.Constant(value=None):
                return Type(text="null")
            case ast.Subscript(value=ast.Name(id="Literal"), slice=chosen):
                values = chosen.elts if isinstance(chosen, ast.Tuple) else [chosen]
                shown = ", ".join(f"`{ast.literal_eval(value)}`" for value in values)
                return Type(text=f"string ({shown})")
            case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in LISTS:
                items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
                item = self.type_of(items[0], scope)
                fixed = len(items) > 1 and not isinstance(items[1], ast.Constant)
                count = f"{len(items)} " if fixed else ""
                many = f"list of {count}{_plural(item.text)}"
                return Type(text=many, of=item.of, brackets="[]" + item.brackets)
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Tuple(elts=[_, value])) if (
                name in MAPS
            ):
                return Type(text=f"object of {_plural(self.type_of(value, scope).text)}")
            case ast.Name(id=name) if name in BASIC:
                return Type(text=BASIC[name])
            case ast.Name(id=name):
                return self._named(name, scope)
        raise ValueError(f"{scope.path}: {ast.unparse(node)} has no form in JSON")

    def _named(self, name: str, scope: Any) -> Type:
        meant: Any = self.package.modules_collection[scope.resolve(name)]
        meant = meant.final_target if meant.is_alias else meant
        if isinstance(meant, griffe.Class):
            return Type(text="object", of=meant)
        return self.type_of(ast.parse(str(meant.value), mode="eval").body, meant)


def _below(module: Any) -> Iterator[Any]:
    for inner in module.modules.values():
        if not inner.is_alias:
            yield inner
            yield from _below(inner)


def _is_field(attribute: griffe.Attribute) -> bool:
    return (
        attribute.annotation is not None
        and "property" not in attribute.labels
        and not attribute.name.startswith("_")
        and not str(attribute.annotation).startswith("ClassVar")
    )


def _attributes(cls: griffe.Class) -> dict[str, str]:
    """Name -> meaning, of a class and what it inherits from."""
    said: dict[str, str] = {}
    for owner in [*reversed(cls.mro()), cls]:
        parts = [] if owner.docstring is None else owner.docstring.parse("google", warnings=False)
        for section in parts:
            if section.kind is griffe.DocstringSectionKind.attributes:
                said |= {each.name: each.description for each in section.value}
    return said


def _small(text: str) -> str:
    """A sentence that begins as if it stood behind a colon."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _one_line(text: str) -> str:
    """Without a full stop at the end, and in JSON's words."""
    return re.sub(r"\bNone\b", "null", " ".join(text.split()).removesuffix("."))


def _plural(kind: str) -> str:
    first, space, rest = kind.partition(" ")
    return first + ("" if first in ("anything", "null") else "s") + space + rest


def mesh(path: str = "mesh", meaning: str = "the mesh") -> Iterator[Key]:
    """A mesh, or a place in it, by its axes."""
    yield Key(path=path, type="object", meaning=meaning)
    for axis in ("data", "model"):
        yield Key(path=f"{path}.{axis}", type="integer", meaning=f"along the axis `{axis}`")


def key(path: str, kind: str, meaning: str, *, optional: bool = False) -> Iterator[Key]:
    """One key that no class has."""
    yield Key(path=path, type=kind, meaning=meaning, optional=optional)


def flat(*parts: Iterable[Key]) -> tuple[Key, ...]:
    """All keys of these parts."""
    return tuple(each for part in parts for each in part)


def table(document: Document) -> str:
    """A document's keys in Markdown; keys that stand there already under another are named."""
    rows, seen, skipped = "", dict[tuple[tuple[str, ...], ...], str](), "/"
    for each in document.keys:
        if each.path.startswith(skipped):
            continue
        below = [
            one for one in document.keys if one.path.startswith((f"{each.path}.", f"{each.path}["))
        ]
        same = tuple((one.path.removeprefix(each.path), one.type, one.meaning) for one in below)
        meaning = each.meaning
        if len(same) > 2 and (first := seen.setdefault(same, each.path)) != each.path:
            meaning, skipped = f"{meaning}; keys as in `{first}`", each.path
        rows += f"| `{each.path}` | {each.type} | {meaning.replace('|', chr(92) + '|')} |\n"
    return f"| key | type | meaning |\n|---|---|---|\n{rows}"


def differences(document: Document, value: Any) -> list[str]:
    """What a printed document has that is not described, and what it lacks."""
    known = {each.path: each for each in document.keys}
    found: list[str] = []

    def look(node: Any, path: str) -> None:
        if isinstance(node, list):
            for inner in node:
                look(inner, path + "[]")
        elif isinstance(node, dict):
            expected = {
                one
                for one, key in known.items()
                if one.rpartition(".")[0] == path and not key.optional
            }
            present = {f"{path}.{name}".removeprefix("."): inner for name, inner in node.items()}
            if path or not document.others:
                found.extend(f"{each} is not described" for each in present.keys() - known)
            found.extend(f"{each} is missing" for each in expected - present.keys())
            for each in present.keys() & known:
                if not fits(present[each], known[each].type):
                    found.append(f"{each} is no {known[each].type}: {present[each]!r:.80}")
                elif not known[each].is_map:
                    look(present[each], each)

    look(value, "")
    return sorted(found)


def fits(value: Any, kind: str) -> bool:
    """Whether a value is of a type in JSON's words. Of lists, only that they are ones."""
    names = {
        str: "string",
        bool: "boolean",
        type(None): "null",
        list: "list",
        dict: "object",
        int: "integer",
        float: "number",
    }
    allowed = {each.split()[0] for each in kind.split(" or ")}
    name = names[type(value)]
    return bool(allowed & {name, "anything"}) or (name == "integer" and "number" in allowed)
