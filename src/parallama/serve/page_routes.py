"""The page at `/`, the documentation at `/docs`, and the mesh that the page draws."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..plan.picture import draw, planned
from ..plan.picture_files import svg
from .answers import Mesh
from .calls import door_of, in_thread
from .errors import ApiError
from .openapi import document
from .served_model import ServedModel

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        " img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_DRAWN = (
    *("embed_tokens", "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"),
    *("layers.0.self_attn.o_proj", "layers.0.mlp.gate_proj", "layers.0.mlp.down_proj", "lm_head"),
)
"""Weights that stand for those of every layer."""
FILES = ("index.html", "page.css", "page.js", "docs.html", "docs.js")


def file_response(name: str) -> Response:
    """One of the page's files."""
    content = files(__package__).joinpath("page", name).read_bytes()
    kind = _KINDS[name.rpartition(".")[2]]
    return Response(content, media_type=kind, headers=_HEADERS)


async def page(_request: Request) -> Response:
    """The chat page."""
    return file_response("index.html")


async def docs(_request: Request) -> Response:
    """Documentation of the routes; it needs no other server."""
    return file_response("docs.html")


async def asset(request: Request) -> Response:
    """What the pages are made of."""
    name = request.path_params["name"]
    if name not in FILES:
        raise ApiError("no such file", status=404)
    return file_response(name)


async def openapi(request: Request) -> Response:
    """The document of the routes."""
    return JSONResponse(document(door_of(request).version))


async def mesh(request: Request) -> Response:
    """Which device holds what."""
    served = door_of(request).ready()
    return JSONResponse(await in_thread(_mesh, served))


def _mesh(served: ServedModel) -> Mesh:
    llm = served.serving.llm
    shape = llm.mesh.shape
    shown = [
        (name, placement)
        for name in _DRAWN
        for placement in llm.plan.placements
        if placement.name.endswith(f"{name}.weight")
    ]
    title = f"{served.name} on {shape}, {llm.mesh.backend.name}"
    panels = [planned(placement, shape, title=name) for name, placement in shown]
    return {
        "mesh": dict(shape),
        "backend": llm.mesh.backend.name,
        "title": title,
        "svg": svg(draw(title, shape, panels)),
        "tensors": [
            {
                "name": placement.name,
                "shape": [str(size) for size in placement.shape],
                "axes": list(placement.axes),
                "style": placement.style,
            }
            for _, placement in shown
        ],
    }
