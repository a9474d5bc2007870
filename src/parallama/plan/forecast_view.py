"""A forecast for people: tables for a terminal of 100 columns, and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from .collectives import Collective
from .cost import parameter_count, shown_bytes
from .forecast import DeviceCount, Forecast
from .layer_patterns import LayerPattern, local_elements

if TYPE_CHECKING:
    from rich.console import Console


def render(forecast: Forecast, console: Console, *, explain: bool = False) -> None:
    """Print a forecast."""
    head = Table.grid(padding=(0, 2))
    for name, value in _header(forecast):
        head.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    console.print(head)
    _table(
        console,
        "Bytes on each device (predicted)",
        ("what", "bytes", ""),
        list(_totals(forecast)),
        left=1,
    )
    heads = ("tensor", "shape", "partition", "style", "on each device")
    _table(
        console,
        "Tensors, one line a kind",
        heads,
        [_tensor(forecast, pattern) for pattern in forecast.patterns],
        left=4,
    )
    if explain:
        _title(console, "Why")
        for sentence in explanation(forecast):
            console.print(Text(sentence, overflow="fold"))
    _title(
        console,
        f"Collectives of one step (predicted); a prefill step has {forecast.prefill_positions} positions",
    )
    _collectives(console, forecast)
    counts = (
        "devices",
        "heads",
        "query",
        "KV",
        "intermediate",
        "vocab",
        "extra weights",
        "extra cache",
        "weights each",
    )
    _table(
        console,
        'Device counts along "model"',
        counts,
        [_count(count) for count in forecast.device_counts],
        left=0,
    )


def explanation(forecast: Forecast) -> Iterator[str]:
    """A sentence for every kind of tensor, and one for the heads."""
    mesh = forecast.plan.mesh
    yield f"Heads: {forecast.plan.head_layout.reason}."
    for pattern in forecast.patterns:
        placement = pattern.placement
        split = [
            f"dim {dim} over {axis!r}"
            for dim, axis in enumerate(placement.axes)
            if mesh.size(axis) > 1
        ]
        where = (
            f"is split, {' and '.join(split)}: each device holds {list(placement.local_shape(mesh))}"
            if split
            else "is whole on every device"
        )
        yield f"{pattern.title} {list(placement.shape)} {where}. Rule {placement.style!r}: {placement.reason}."
    cache = forecast.plan["cache.key"]
    yield f"The KV cache lies with its heads. Rule: {cache.reason}."
    yield f"The logits: {forecast.plan['output.logits'].reason}."


def _header(forecast: Forecast) -> Iterator[tuple[str, str]]:
    plan, request = forecast.plan, forecast.request
    model = plan.model
    yield (
        "model",
        f"{forecast.name}: {model.model_type}, {parameter_count(model):,} parameters, {model.layers} layers",
    )
    yield (
        "mesh",
        f"{plan.mesh} (data x model), {plan.mesh.devices} device{'s' if plan.mesh.devices > 1 else ''}",
    )
    yield (
        "dtype",
        request.dtype
        + (
            f" (stored as {request.stored_dtype})"
            if request.stored_dtype not in (None, request.dtype)
            else ""
        ),
    )
    yield "heads", plan.head_layout.reason
    rows = f"batch {request.batch}, prompts of {request.seq} tokens, up to {request.max_model_len} positions"
    yield (
        "run",
        rows + (f"; training rows of {request.seq} tokens" if request.train is not None else ""),
    )
    if forecast.fit is not None and request.hardware is not None:
        hardware, fit = request.hardware, forecast.fit
        yield (
            "hardware",
            f"{hardware.name} ({hardware.what}): {shown_bytes(hardware.memory_bytes)} on each device, runtime included",
        )
        verdict = "fits" if fit.fits else "does not fit"
        what = "a training step" if request.train is not None else "this run"
        yield (
            "fits?",
            f"{what} {verdict}: it needs {fit.needed_bytes / hardware.memory_bytes:.1%} of the memory (predicted)",
        )
        yield (
            "largest",
            f"batch {fit.largest_batch} at this context; context {fit.largest_context} at this batch",
        )


def _totals(forecast: Forecast) -> Iterator[tuple[str, str, str]]:
    memory, train = forecast.memory, forecast.train

    def row(what: str, count: int, note: str = "") -> tuple[str, str, str]:
        return what, f"{count:,}", f"{shown_bytes(count)}{'; ' if note else ''}{note}"

    yield row("parameters", memory.params)
    yield row("KV cache", memory.kv)
    if memory.growth:
        yield row("KV cache, growing", memory.growth, "beside the full one for a moment")
    yield row("activations", memory.activations, "at their peak")
    yield row("logits", memory.logits)
    yield row("total", memory.total, "at the peak")
    if train is None:
        return
    yield "", "", ""
    assert forecast.request.train is not None
    again, layers = len(forecast.request.train.rematerialized), forecast.plan.model.layers
    yield row("parameters", train.params, "training, in float32")
    yield row("optimizer state", train.optimizer)
    yield row("gradients", train.gradients)
    if train.copies:
        yield row(
            "copies of weights", train.copies, "in the products' dtype, or put together over data"
        )
    yield row("logits", train.logits, "and their gradient")
    yield row(
        "activations",
        train.activations,
        "all kept" if not again else f"{again} of {layers} layers computed twice",
    )
    yield row("activations, remat", train.activations_remat, "each layer computed twice")
    yield row("total", train.total, "at the peak")
    yield row("total, remat", train.total_remat)


def _tensor(forecast: Forecast, pattern: LayerPattern) -> tuple[str, ...]:
    placement = pattern.placement
    each = pattern.count * local_elements(forecast.plan, placement) * forecast.request.itemsize
    shape = ", ".join(str(size) for size in placement.shape)
    axes = ", ".join(axis or "-" for axis in placement.axes)
    return pattern.title, f"[{shape}]", f"[{axes}]", placement.style, shown_bytes(each)


def _collectives(console: Console, forecast: Forecast) -> None:
    rows: list[tuple[str, ...]] = []
    for phase, found in forecast.collectives.items():
        if phase == "train" and forecast.train is None:
            continue
        rows += [(phase, *_collective(item)) for item in found]
    if not rows:
        console.print(Text("none"))
        return
    _table(
        console,
        "",
        ("step", "kind", "axis", "count", "bytes each", "caused by"),
        rows,
        left=3,
        last_left=True,
    )


def _collective(item: Collective) -> tuple[str, ...]:
    return (
        item.kind,
        item.axis,
        str(item.count),
        shown_bytes(item.bytes),
        item.module.removeprefix("model."),
    )


def _count(count: DeviceCount) -> tuple[str, ...]:
    extra = (f"+{count.extra_weight_percent:.1f}%", f"+{count.extra_cache_percent:.1f}%")
    sizes = (count.query_heads, count.kv_heads, count.intermediate, count.vocab)
    return (
        str(count.devices),
        count.kind,
        *(str(size) for size in sizes),
        *extra,
        shown_bytes(count.param_bytes_per_device),
    )


def _title(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold"))


def _table(
    console: Console,
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int,
    last_left: bool = False,
) -> None:
    """A table whose first `left` columns (and the last, if it has no heading or `last_left`) are aligned to the left."""
    if title:
        _title(console, title)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for index, head in enumerate(heads):
        text = index < left or (index == len(heads) - 1 and (last_left or not head))
        table.add_column(Text(head), justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
