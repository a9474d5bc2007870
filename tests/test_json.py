"""docs/json.md is what the result classes say."""

from __future__ import annotations

import re

import pytest
from json_documents import PAGE, documents, page
from json_reference import Document, Key, differences, fits

DOCUMENTS = documents()


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/json_documents.py"


@pytest.mark.parametrize("title", DOCUMENTS)
def test_every_key_has_a_meaning_and_a_name_with_its_unit(title: str) -> None:
    for key in DOCUMENTS[title].keys:
        assert key.meaning and key.type, key.path
        for name in key.path.split("."):
            assert re.fullmatch(r"[a-z0-9_]+(\[\])*", name), key.path


def test_a_document_that_differs_is_told_by_its_key() -> None:
    keys = (
        Key(path="a", type="list of objects", meaning="x"),
        Key(path="a[].b", type="integer or null", meaning="x"),
        Key(path="c", type="object of integers", meaning="x"),
        Key(path="d", type="string", meaning="x", optional=True),
    )
    document = Document(title="x", about="", keys=keys)
    assert differences(document, {"a": [{"b": 1}, {"b": None}], "c": {"any": 1}}) == []
    assert differences(document, {"a": [{"b": "1"}, {"e": 1}], "c": {}}) == [
        "a[].b is missing",
        "a[].b is no integer or null: '1'",
        "a[].e is not described",
    ]
    assert differences(document, {"a": []}) == ["c is missing"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, "integer"),
        (1, "number"),
        (1.5, "number or null"),
        (None, "object or null"),
        (True, "boolean"),
        ("decode", "string (`prefill`, `decode`)"),
        ([1], "list of integers"),
        ({}, "object of strings"),
    ],
)
def test_a_value_fits_its_type_and_no_other(value: object, kind: str) -> None:
    assert fits(value, kind)
    others = {"integer", "number", "string", "boolean", "null", "list", "object"}
    of_its_own = {"integer", "number"} if type(value) is int else {kind.split()[0]}
    of_its_own |= {"null"} if value is None else set()
    for other in others - of_its_own:
        assert not fits(value, other)
