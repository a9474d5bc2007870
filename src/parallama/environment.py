"""Environment variables that are set apart from starting devices.

`engine/torch_xla/backends` and `engine/devices/discovery` have those of devices. No other module
reads or writes the environment.
"""

from __future__ import annotations

import os


def expect_no_devices() -> None:
    """For a process that starts no backend.

    transformers may import torch_xla, which then doesn't have to guess a backend and say so.
    """
    os.environ.setdefault("PJRT_DEVICE", "CPU")


def keep_one_process() -> None:
    """Have lm-evaluation-harness compute its bootstraps in this process.

    A process with devices must not be forked.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"


def name_kernels() -> None:
    """Have oneDNN write the names of the kernels that it makes into /tmp/perf-PID.map.

    Linux's perf looks for them there.
    """
    os.environ["ONEDNN_JIT_PROFILE"] = "2"


def api_key() -> str | None:
    """The key that a server asks its clients for, if it is given so."""
    return os.environ.get("PARALLAMA_API_KEY")
