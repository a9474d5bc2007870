"""Runs the self-test of a backend in a process of its own. Pure.

A crash, a hang or silence is a result like others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import isolated_process
from ..engine.devices.plugins import OptionValue
from ..engine.interface import SELF_TEST
from ..errors import RunError, lines, shown

_TPU_WAITS = "libtpu waits for minutes for a TPU that isn't there"


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """What the self-test found.

    Attributes:
        error: why it did not end, in one to three lines.
        exit_code: 0 if it passed, 5 if the backend doesn't start, 1 if a check failed or the
            process died.
        checks: each with name, passed, max_error, allowed_error, said.
        took_s: from starting its process to its end, imports included.
    """

    exit_code: int
    error: str | None
    mesh: str | None
    devices: tuple[str, ...]
    checks: tuple[Mapping[str, Any], ...]
    took_s: float

    @property
    def passed(self) -> bool:
        return self.exit_code == 0


class _Check(BaseModel):
    """One check, as the process reports it."""

    model_config = ConfigDict(strict=True)

    name: str
    passed: bool
    max_error: float | None
    allowed_error: float
    said: str | None


class _Reply(BaseModel):
    """The last line of the process: why the self-test did not end, or what it found."""

    model_config = ConfigDict(strict=True)

    error: str | None = None
    exit_code: int = Field(default=1, ge=1)
    mesh: str | None = None
    devices: list[str] = []
    checks: list[_Check] = []


def self_test(backend: str, options: Mapping[str, OptionValue] | None, limit_s: float) -> SelfTest:
    """Run the self-test on a backend's devices.

    Args:
        backend, options: as for `interface.start`.
        limit_s: seconds that it may take.
    """
    request = json.dumps({"backend": backend, "options": dict(options or {})})
    began = time.perf_counter()
    ended = isolated_process.run_module(SELF_TEST, request, limit_s=limit_s)
    took_s = time.perf_counter() - began
    try:
        reply = _read(ended.reply("the self-test's process"))
    except RunError as error:
        waits = f"; {_TPU_WAITS}" if ended.code is None and backend == "tpu" else ""
        reply = _Reply(error=f"{error}{waits}")
    failed = [check.name for check in reply.checks if not check.passed]
    wrong = f"wrong: {', '.join(failed)}" if failed else None
    return SelfTest(
        exit_code=0 if reply.error is None and wrong is None else reply.exit_code,
        error=reply.error or wrong,
        mesh=reply.mesh,
        devices=tuple(reply.devices),
        checks=tuple(check.model_dump() for check in reply.checks),
        took_s=took_s,
    )


def _read(document: Mapping[str, Any]) -> _Reply:
    """The reply in a document.

    Raises:
        RunError: it is none.
    """
    try:
        reply = _Reply.model_validate(document)
    except ValidationError as problems:
        problem = problems.errors()[0]
        what = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    else:
        if reply.error is not None or reply.checks:
            return reply
        what = "neither an error nor checks"
    raise RunError(
        lines(
            f"the self-test's process answered {shown(dict(document), 160)}",
            f"expected what its checks found; this has {what}",
        )
    )
