"""Fixtures: processes with devices for each file's tests, and tiny random models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from workers import Auditors, Workers
from workers import CaseError as CaseError

if TYPE_CHECKING:
    from reference import TinyModels


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With pytest-xdist, files whose tests start processes come first.

    They take longest. The others fill up the time at the end.
    """
    if hasattr(config, "workerinput"):
        heavy = Counter(item.path for item in items if starts_processes(item))
        items.sort(key=lambda item: -heavy[item.path])


def starts_processes(item: pytest.Item) -> bool:
    """Whether a test asks for workers, or its file for forked processes."""
    fixtures = set(getattr(item, "fixturenames", ()))
    names = set(vars(getattr(item, "module", None) or object))
    return bool(
        fixtures & {"workers", "auditors"}
        or names & {"subprocess", "command", "script", "forked", "Server"}
    )


@pytest.fixture(scope="module")
def workers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workers]:
    """`workers[8].call("device_cases:forward", mesh="1x8", ...)`.

    In a file with `OPTIMIZE = True` they compile as users' processes do. Elsewhere they leave
    LLVM's optimizations out: the HLO is the same, and tiny models compile in half the time.
    """
    optimize = getattr(request.module, "OPTIMIZE", False)
    made = Workers(tmp_path_factory.mktemp("workers"), optimize=optimize)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def auditors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Auditors]:
    """`auditors("judged", folder, "1x8", ...)` runs a function of `audit_cases`."""
    made = Auditors(tmp_path_factory.mktemp("audits"))
    yield made
    made.stop()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """`models(heads=9, kv_heads=3)`: a random model in memory and in a folder."""
    from reference import TinyModels

    return TinyModels(tmp_path_factory.mktemp("models"))
