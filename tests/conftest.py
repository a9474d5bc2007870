"""Fixtures: processes with devices for each file's tests, and tiny random models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from workers import Auditors, Workers
from workers import CaseError as CaseError

if TYPE_CHECKING:
    from reference import TinyModels


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """`workers[8].call("device_cases:forward", mesh="1x8", ...)`."""
    made = Workers(tmp_path_factory.mktemp("workers"))
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
