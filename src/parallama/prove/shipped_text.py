"""The text that comes with the package. Pure."""

from __future__ import annotations

from importlib.resources import files


def shipped() -> str:
    """Preamble and first article of the Constitution of the United States (1787), in the public
    domain: some 2,300 words of English.
    """
    return files("parallama").joinpath("data/constitution.txt").read_text(encoding="utf-8")
