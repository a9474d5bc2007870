"""XLA's own flags, by backend, all in one place, with what each was measured to do. Pure.

A flag that the user has set, in `XLA_FLAGS` or `LIBTPU_INIT_ARGS`, stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

NOT_MEASURED = "not measured here"


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One XLA flag.

    Attributes:
        name: without dashes.
        effect: what it was measured to do, or `NOT_MEASURED` and who recommends it.
    """

    name: str
    value: str
    effect: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


def _tpu(name: str, what: str) -> Flag:
    return Flag(name=name, value="true", effect=f"{what}; {NOT_MEASURED}: MaxText sets it")


VARIABLES: Mapping[str, str] = MappingProxyType({"cpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"})
"""Backend -> the environment variable that its flags go into."""

_CPU = (
    Flag(
        name="xla_disable_hlo_passes",
        value="tree_reduction_rewriter",
        effect="sums and maxima stay one loop: compiling takes 20 to 40 % less time, prefill and "
        "decode are not slower; a softmax's float32 sum over SmolLM2's 49,152 ids comes out 3e-6 "
        "too small instead of 6e-9 (`loss` sums otherwise)",
    ),
)
_TPU = (
    _tpu(
        "xla_tpu_enable_latency_hiding_scheduler",
        "orders programs so that collectives overlap with products",
    ),
    _tpu(
        "xla_tpu_enable_async_collective_fusion",
        "runs collectives asynchronously, fused with what surrounds them",
    ),
    _tpu(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "lets such a fusion span several steps of a loop",
    ),
    _tpu(
        "xla_tpu_overlap_compute_collective_tc",
        "overlaps a collective with the compute fused into it",
    ),
    _tpu("xla_enable_async_all_gather", "splits all-gathers into start and done"),
)
FLAGS: Mapping[str, tuple[Flag, ...]] = MappingProxyType({"cpu": _CPU, "tpu": _TPU})


def with_defaults(backend: str, given: str) -> str:
    """The value of the backend's variable: what is `given` there, then our flags.

    A flag that `given` names is left out.
    """
    named = {word.lstrip("-").partition("=")[0] for word in given.split()}
    ours = [str(flag) for flag in FLAGS[backend] if flag.name not in named]
    return " ".join([*([given] if given else []), *ours])


def cpu_threads(devices: int, cores: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The variable by which XLA:CPU's thread pool gets more threads than there are devices.

    Empty where the pool has so many, or needs none.

    Args:
        cores: that the process may use. XLA makes as many threads if no variable says otherwise,
            and at least one for each device.
        environment: variables as they are. `PJRT_NPROC`, or else `NPROC`, is the user's number of
            threads; one that is too small is raised.
    """
    # A loop that XLA splits over cores leaves a task in the queue of the thread that started it.
    # Where every thread of the pool runs a device's program, nobody takes them out. A full queue
    # runs what comes next at once, in the midst of Eigen's products, and large ones come out wrong.
    # On one core XLA splits no loop.
    given = [
        environment[name]
        for name in ("PJRT_NPROC", "NPROC")
        if environment.get(name, "").isdecimal()
    ]
    threads = int(given[0]) if given else cores
    return {} if cores == 1 or threads > devices else {"PJRT_NPROC": str(devices + 1)}
