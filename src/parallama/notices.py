"""What users are told besides results: a line on standard error, once in a process. Pure."""

from __future__ import annotations

import functools
import logging

LOGGER = logging.getLogger("parallama")
"""Python's own way of standard error: `logging.getLogger("parallama").disabled = True` hides it."""


@functools.cache
def say_once(notice: str) -> None:
    """Say something that was ignored, or done otherwise than the input seems to ask for."""
    LOGGER.warning(notice)
