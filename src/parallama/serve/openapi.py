"""`/openapi.json`: the routes, and the schemas of their bodies."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from . import answers, protocol

_REF = "#/components/schemas/{model}"
_ERRORS = {
    400: "the request is wrong",
    401: "no key, or a wrong one",
    404: "no such model or path",
    408: "the body came too slowly",
    413: "the body is too long",
    429: "the queue is full",
    500: "the server failed",
    503: "the server is starting or stopping, or its engine has failed",
}
_POSTS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("/v1/completions", "CompletionRequest", "Continue texts.", ("Completion", "Completion")),
    ("/v1/chat/completions", "ChatRequest", "Answer a conversation.", ("Chat", "ChatChunk")),
    ("/tokenize", "TokenizeRequest", "Token ids of a text or a conversation.", ("Tokens",)),
    ("/detokenize", "DetokenizeRequest", "The text of token ids.", ("Text",)),
)
_GETS = (
    ("/v1/models", "Models", "The models that are served."),
    ("/v1/models/{name}", "Model", "One of the models."),
    ("/health", "Status", "Whether requests are taken."),
    ("/live", "Status", "Whether the process answers."),
    ("/version", "Version", "Our version."),
    ("/mesh", "Mesh", "Which device holds what."),
)
_ANSWERS = ("Completion", "Chat", "ChatChunk", "Models", "Model", "Tokens", "Text", "Version")


@cache
def document(version: str) -> dict[str, Any]:
    """The document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "parallama", "version": version},
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _schemas() -> dict[str, Any]:
    bodies = [getattr(protocol, body) for _, body, _, _ in _POSTS]
    _, found = models_json_schema([(each, "validation") for each in bodies], ref_template=_REF)
    schemas: dict[str, Any] = dict(found["$defs"])
    for name in (*_ANSWERS, "Status", "Mesh", "Error"):
        adapter = TypeAdapter(getattr(answers, name))
        schema = adapter.json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[name] = schema
    return schemas


def _paths() -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for path, body, says, found in _POSTS:
        content = {"application/json": {"schema": _ref(found[0])}}
        if len(found) > 1:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        paths[path] = {
            "post": {
                "summary": says,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": _ref(body)}},
                },
                "responses": _responses(content),
            }
        }
    for path, answer, says in _GETS:
        found_body = {"application/json": {"schema": _ref(answer)}}
        paths[path] = {"get": {"summary": says, "responses": _responses(found_body)}}
    paths["/v1/models/{name}"]["parameters"] = [
        {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    text = {"text/plain": {"schema": {"type": "string"}}}
    paths["/metrics"] = {"get": {"summary": "For Prometheus.", "responses": _responses(text)}}
    return paths


def _responses(content: dict[str, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": _ref("Error")}}
    return {"200": {"description": "the answer", "content": content}} | {
        str(status): {"description": says, "content": error} for status, says in _ERRORS.items()
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}
