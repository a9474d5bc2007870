"""torch-xla's own counters: programs compiled, operations run on the host."""

from __future__ import annotations


def compilations() -> int:
    """How many programs torch-xla has compiled in this process, lazily run ones included."""
    from torch_xla.debug import metrics

    data = metrics.metric_data("CompileTime")
    return int(data[0]) if data else 0


def fallbacks() -> dict[str, int]:
    """Operations that torch-xla has run on the host, by how often."""
    from torch_xla.debug import metrics

    names = (name for name in metrics.counter_names() if name.startswith("aten::"))
    return {name: metrics.counter_value(name) for name in names}
