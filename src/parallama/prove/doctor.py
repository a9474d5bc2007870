"""The report of `parallama doctor`: what is installed, whether it fits together, which backends
there are, and whether one works.

Nothing of torch is imported here: plugins are asked, and the self-test runs, in processes of their
own. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import host
from ..engine.devices import discovery, plugins, versions
from ..engine.devices.faults import Fault, known
from ..engine.devices.plugins import OptionValue
from ..engine.devices.versions import Installed
from ..errors import BackendError, ParallamaError
from .self_test import SelfTest, self_test

LIMIT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class BackendState:
    """Whether a backend is available.

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
        """The report for `--json`; its keys are described in docs/json.md."""
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
    """Every backend that parallama knows or a package announces, and whether it is available."""
    found = [_cpu_state()]
    found += [_plugin_state(name) for name in dict.fromkeys(("tpu", "tt", *plugins.installed()))]
    announced = {point.name for point in discovery.announced()}
    for name in sorted(announced - {state.name for state in found}):
        tried = f"announced to torch_xla; `parallama doctor --backend {name}` tries it"
        found.append(BackendState(name=name, available=None, reason=tried))
    return found


def _cpu_state() -> BackendState:
    try:
        versions.check_torch_xla()
    except BackendError as error:
        return BackendState(name="cpu", available=False, reason=_first_line(error))
    reason = "virtual devices; torch_xla brings it along"
    return BackendState(name="cpu", available=True, reason=reason)


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
    """Why a backend is not available."""
    first = str(error).splitlines()[0]
    return first.partition(" is not available: ")[2] or first
