"""When requests of a benchmark arrive. Pure."""

from __future__ import annotations

import math

import numpy as np

from .serve_options import Workload


def rates(workload: Workload, count: int) -> list[float]:
    """The rate at which each of so many requests comes, in requests a second."""
    if workload.ramp_up_strategy is None:
        return [workload.request_rate] * count
    start, end = workload.ramp_up_start_rps, workload.ramp_up_end_rps
    assert start is not None and end is not None  # `Workload` has checked
    way = [number / max(count - 1, 1) for number in range(count)]
    if workload.ramp_up_strategy == "linear":
        return [start + (end - start) * part for part in way]
    return [start * (end / start) ** part for part in way]


def arrivals(workload: Workload, count: int) -> list[float]:
    """Seconds after the beginning at which each of so many requests is due.

    Gaps are gamma-distributed, with the mean that the rate says and `burstiness` as their shape. At
    one rate they are stretched together, so that the last request comes exactly at count / rate.
    """
    means = np.array([0.0 if math.isinf(rate) else 1.0 / rate for rate in rates(workload, count)])
    if not means.any():
        return [0.0] * count
    shape = workload.burstiness
    if math.isinf(shape):
        gaps = means
    else:
        gaps = np.random.default_rng(workload.seed).gamma(shape, means / shape)
    times = np.cumsum(gaps)
    if workload.ramp_up_strategy is None and times[-1] > 0:
        times *= count / workload.request_rate / times[-1]
    return [float(time) for time in times]
