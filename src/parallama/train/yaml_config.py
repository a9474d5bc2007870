"""A run's config as YAML: read by YAML 1.2, written so that any reader agrees. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .. import text_files
from ..errors import UsageError, cause, lines, shown

BROKEN = (yaml.YAMLError, ValueError, RecursionError)
"""What `parse` raises of a text that is no YAML."""
_RULES_OF_1_1 = tuple(f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "timestamp"))


class _Loader(yaml.SafeLoader):
    """As in YAML 1.2, `1e-4` is a number, and `no` a word. A key may stand only once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands there twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in _RULES_OF_1_1]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"true|false|True|False|TRUE|FALSE"), list("tfTF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?"
        r"|\d[\d_]*[eE][-+]?\d+|\.\d+(?:[eE][-+]?\d+)?|\.(?:inf|nan))"
    ),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would take for something else."""


_Dumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
    + _Loader.yaml_implicit_resolvers.get(first, [])
    for first in {**yaml.SafeDumper.yaml_implicit_resolvers, **_Loader.yaml_implicit_resolvers}
}


def parse(text: str) -> Any:
    """The value that a text stands for; one of `BROKEN` is raised if it is no YAML."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_file(path: Path) -> dict[str, Any]:
    """The keys of a file; none of an empty one.

    Raises:
        UsageError: it cannot be read, or holds something other than keys with values.
    """
    try:
        document = parse(text_files.read(path))
    except OSError as error:
        raise UsageError(
            lines(f"config {str(path)!r} cannot be read: {error.strerror}", "expected a YAML file")
        ) from None
    except BROKEN as error:
        raise UsageError(
            lines(
                f"config {str(path)!r} is no YAML: {cause(error)}",
                "expected lines such as lr: 1e-4",
            )
        ) from None
    document = {} if document is None else document
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise UsageError(
            lines(
                f"config {str(path)!r} holds {shown(document)}",
                "expected keys with values, as lr: 1e-4",
            )
        )
    return document


def write(document: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """The keys as YAML, each below its comment."""
    return "".join(
        f"# {comments[key]}\n"
        + yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
        for key, value in document.items()
    )
