"""Starting devices in a process that has done things before."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = """
import os
import torch, torch_xla
{before}
from parallama import backends
from parallama.errors import FitError
try:
    print(backends.start("cpu", 2).devices, os.environ["XLA_FLAGS"])
except FitError as error:
    print(error)
"""


def started(before: str) -> str:
    done = subprocess.run([sys.executable, "-c", START.format(before=before)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_devices_start_after_another_package_has_imported_torch_xla_and_with_our_flags() -> None:
    devices, *flags = started("os.environ['XLA_FLAGS'] = '--xla_cpu_use_xnnpack=true'").split()
    assert devices == "2"
    assert flags == ["--xla_cpu_use_xnnpack=true", "--xla_disable_hlo_passes=tree_reduction_rewriter"]


@pytest.mark.slow
def test_devices_do_not_start_once_torch_xla_runs_with_others() -> None:
    assert started("torch.ones(1).to('xla')").splitlines() == [
        "torch_xla's runtime was started before parallama could ask for 2 CPU device(s)",
        "import parallama and load the model first, or set PJRT_DEVICE=CPU and CPU_NUM_DEVICES yourself",
    ]
