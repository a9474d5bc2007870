"""Keeps what lm-evaluation-harness prints and logs away from standard output."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quieted(quiet: bool) -> Iterator[None]:
    """Within: the harness prints nothing to standard output.

    Its warnings go to standard error. Its progress bars are drawn on terminals only.

    Args:
        quiet: no warnings and no bars at all; errors are still logged.
    """
    errors = sys.stderr
    handler = logging.StreamHandler(errors)
    handler.setFormatter(logging.Formatter("[lm_eval: %(message)s]"))
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("lm_eval")
    before = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.ERROR if quiet else logging.WARNING)
    logger.addHandler(handler)
    bars = errors.isatty() and not quiet
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(errors if bars else io.StringIO()))
        if not bars:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate, logger.level = before
