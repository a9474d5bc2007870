"""What is installed, whether it fits together, which backends can be had, and whether one works: the report of `parallama doctor`.

Nothing of torch is imported here: plugins are asked, and the self-test runs, in processes of their own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import host, isolated_process
from ..engine.devices import discovery, plugins, versions
from ..engine.devices.faults import Fault, known
from ..engine.devices.plugins import OptionValue
from ..engine.devices.versions import Installed
from ..errors import BackendError, ParallamaError

LIMIT_S = 120.0
_TPU_WAITS = "libtpu waits for minutes for a TPU that isn't there"


@dataclass(frozen=True, kw_only=True)
class BackendState:
    """Whether a backend can be had.

    Attributes:
        available: None if only starting it would tell.
        reason: why not, or what is known.
    """

    name: str
    available: bool | None
    reason: str
    library: str | None = None
    pjrt_api: str | None = None


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """What the self-test found.

    Attributes:
        error: why it did not end, in one to three lines.
        exit_code: 0 if it passed, 5 if the backend doesn't start, 1 if a check failed or the process died.
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


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that `parallama doctor` tells."""

    backend: str
    versions: tuple[Installed, ...]
    partitioner: str
    cpu: str
    cpu_features: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    memory_available_bytes: int | None
    backends: tuple[BackendState, ...]
    faults: tuple[Fault, ...]
    self_test: SelfTest

    def to_dict(self) -> dict[str, Any]:
        """The report for `--json`; its keys are described in docs/backends.md."""
        document = asdict(self)
        document["versions"] = [asdict(item) | {"fits": item.fits} for item in self.versions]
        document["self_test"] |= {"passed": self.self_test.passed}
        return {"passed": self.self_test.passed, **document}


def examine(
    backend: str = "cpu", options: Mapping[str, OptionValue] | None = None, limit_s: float = LIMIT_S
) -> Report:
    """Make the report.

    Args:
        backend, options: as for `interface.start`; what the self-test runs on.
        limit_s: seconds that the self-test may take.
    """
    installed = versions.survey()
    by_name = {item.name: item.version for item in installed}
    partitioner = versions.partitioner()
    cpu, features = host.processor()
    memory = host.memory_bytes()
    called = plugins.name_of(Path(backend)) if plugins.is_path(backend) else backend
    return Report(
        backend=backend,
        versions=installed,
        partitioner=partitioner,
        cpu=cpu,
        cpu_features=tuple(features),
        cores=host.usable_cores(),
        memory_bytes=memory[0] if memory else None,
        memory_available_bytes=memory[1] if memory else None,
        backends=tuple(states()),
        faults=known(
            backend=called,
            torch=by_name["torch"],
            torch_xla=by_name["torch_xla"],
            transformers=by_name["transformers"],
            partitioner=partitioner,
            features=features,
        ),
        self_test=self_test(backend, options, limit_s),
    )


def states() -> list[BackendState]:
    """Every backend that parallama knows or a package announces, and whether it can be had."""
    try:
        versions.check_torch_xla()
        found = [
            BackendState(
                name="cpu", available=True, reason="virtual devices; torch_xla brings it along"
            )
        ]
    except BackendError as error:
        found = [BackendState(name="cpu", available=False, reason=_first_line(error))]
    found += [_plugin_state(name) for name in dict.fromkeys(("tpu", "tt", *plugins.installed()))]
    announced = sorted(
        {point.name for point in discovery.announced()} - {state.name for state in found}
    )
    return found + [
        BackendState(
            name=name,
            available=None,
            reason=f"announced to torch_xla; `parallama doctor --backend {name}` tries it",
        )
        for name in announced
    ]


def _plugin_state(name: str) -> BackendState:
    library = None
    try:
        library = discovery.library_of(name)
        if library is None:
            raise discovery.missing(name)
        api = plugins.check(library, takes_older_callers=name in plugins.TAKES_OLDER_CALLERS)
    except BackendError as error:
        return BackendState(
            name=name,
            available=False,
            reason=_first_line(error),
            library=str(library) if library else None,
        )
    return BackendState(
        name=name,
        available=None,
        reason=f"the plugin fits; `parallama doctor --backend {name}` tries the devices",
        library=str(library),
        pjrt_api=str(api),
    )


def _first_line(error: ParallamaError) -> str:
    first = str(error).splitlines()[0]
    return first.partition(" is not available: ")[2] or first


def self_test(backend: str, options: Mapping[str, OptionValue] | None, limit_s: float) -> SelfTest:
    """Run `selftest` in a process of its own; a crash or a hang is a result."""
    began = time.perf_counter()
    ended = isolated_process.run_module(
        "parallama.engine.torch_xla.selftest",
        json.dumps({"backend": backend, "options": dict(options or {})}),
        limit_s=limit_s,
    )
    took = time.perf_counter() - began
    reply: dict[str, Any] = {}
    if ended.code == 0:
        reply = json.loads(ended.out.strip().splitlines()[-1])
    elif ended.code is None:
        waits = f"; {_TPU_WAITS}" if backend == "tpu" else ""
        reply = {
            "error": f"the self-test's process did not end within {limit_s:g} s{waits}",
            "exit_code": 1,
        }
    else:
        said = f"; it said: {ended.last_words[:200]}" if ended.last_words else ""
        reply = {"error": f"the self-test's process {ended.how}{said}", "exit_code": 1}
    checks = reply.get("checks", [])
    failed = [check["name"] for check in checks if not check["passed"]]
    error = reply.get("error") or (f"wrong: {', '.join(failed)}" if failed else None)
    return SelfTest(
        exit_code=reply.get("exit_code", 1 if failed or not checks else 0),
        error=error,
        mesh=reply.get("mesh"),
        devices=tuple(reply.get("devices", ())),
        checks=tuple(checks),
        took_s=took,
    )
