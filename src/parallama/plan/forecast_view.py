"""A forecast for people: tables for a terminal of 100 columns, and sentences. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from .alternatives import Alternative
from .collectives import Collective
from .cost import parameter_count, shown_bytes
from .device_counts import DeviceCount
from .forecast import Forecast
from .layer_patterns import LayerPattern, local_elements

if TYPE_CHECKING:
    from rich.console import Console

_TENSOR_HEADS = ("tensor", "shape", "partition", "style", "on each device")
_COLLECTIVE_HEADS = ("step", "kind", "axis", "count", "bytes each", "caused by")
_COUNT_HEADS = (
    *("devices", "heads", "query", "KV", "intermediate", "vocab"),
    *("extra weights", "extra cache", "weights each", "fits"),
)
_CHANGE_HEADS = ("change", "saves", "needs", "fits")


def render(forecast: Forecast, console: Console, *, explain: bool = False) -> None:
    """Print a forecast."""
    head = Table.grid(padding=(0, 2))
    for name, value in _header(forecast):
        head.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    console.print(head)
    _title(console, "Bytes on each device (predicted)")
    _table(console, ("what", "bytes", ""), list(_totals(forecast)), left=1)
    _title(console, "Tensors, one line a kind")
    tensors = [_tensor(forecast, pattern) for pattern in forecast.patterns]
    _table(console, _TENSOR_HEADS, tensors, left=4)
    if explain:
        _title(console, "Why")
        for sentence in explanation(forecast):
            console.print(Text(sentence, overflow="fold"))
    positions = f"a prefill step has {forecast.prefill_positions} positions"
    _title(console, f"Collectives of one step (predicted); {positions}")
    collectives = list(_collectives(forecast))
    if collectives:
        _table(console, _COLLECTIVE_HEADS, collectives, left=3, last_left=True)
    else:
        console.print(Text("none"))
    _title(console, 'Device counts along "model"')
    counts = [_count(count) for count in forecast.device_counts]
    heads = _COUNT_HEADS if forecast.fit is not None else _COUNT_HEADS[:-1]
    _table(console, heads, [count[: len(heads)] for count in counts], left=0)
    instead = forecast.alternatives
    if instead is not None and instead.changes:
        _title(console, f"What would bring bytes on mesh {forecast.plan.mesh} (predicted)")
        changes = [_change(change) for change in instead.changes]
        _table(console, _CHANGE_HEADS, changes, left=1)


def explanation(forecast: Forecast) -> Iterator[str]:
    """A sentence for every pattern of tensors, and one for the heads."""
    mesh = forecast.plan.mesh
    yield f"Heads: {forecast.plan.head_layout.reason}."
    for pattern in forecast.patterns:
        placement = pattern.placement
        split = [
            f"dim {dim} over {axis!r}"
            for dim, axis in enumerate(placement.axes)
            if mesh.size(axis) > 1
        ]
        where = "is whole on every device"
        if split:
            local = list(placement.local_shape(mesh))
            where = f"is split, {' and '.join(split)}: each device holds {local}"
        rule = f"Rule {placement.style!r}: {placement.reason}."
        yield f"{pattern.title} {list(placement.shape)} {where}. {rule}"
    cache = forecast.plan["cache.key"]
    yield f"The KV cache is split with its heads. Rule: {cache.reason}."
    yield f"The logits: {forecast.plan['output.logits'].reason}."


def _header(forecast: Forecast) -> Iterator[tuple[str, str]]:
    plan, request = forecast.plan, forecast.request
    model, mesh = plan.model, plan.mesh
    count = f"{parameter_count(model):,} parameters"
    yield "model", f"{forecast.name}: {model.model_type}, {count}, {model.layers} layers"
    devices = f"{mesh.devices} device{'s' if mesh.devices > 1 else ''}"
    yield "mesh", f"{mesh} ({' x '.join(mesh)}), {devices}"
    stored = request.stored_dtype not in (None, request.dtype)
    yield "dtype", request.dtype + (f" (stored as {request.stored_dtype})" if stored else "")
    yield "heads", plan.head_layout.reason
    run = (
        f"batch {request.batch}, prompts of {request.seq} tokens, "
        f"up to {request.max_model_len} positions"
    )
    rows = f"; training rows of {request.seq} tokens" if request.train is not None else ""
    yield "run", run + rows
    yield from _hardware(forecast)


def _hardware(forecast: Forecast) -> Iterator[tuple[str, str]]:
    hardware, fit = forecast.request.hardware, forecast.fit
    if hardware is None or fit is None:
        return
    memory = f"{shown_bytes(hardware.memory_bytes)} on each device, runtime included"
    sizing = "; for sizing only: no backend runs on it" if hardware.sizing_only else ""
    yield "hardware", f"{hardware.name} ({hardware.what}): {memory}{sizing}"
    what = "a training step" if forecast.request.train is not None else "this run"
    share = f"{fit.needed_bytes / hardware.memory_bytes:.1%} of the memory (predicted)"
    yield "fits?", f"{what} {'fits' if fit.fits else 'does not fit'}: it needs {share}"
    context = f"context {fit.largest_context} at this batch"
    yield "largest", f"batch {fit.largest_batch} at this context; {context}"
    instead = forecast.alternatives
    if instead is not None:
        yield "smallest", instead.smallest()


def _totals(forecast: Forecast) -> Iterator[tuple[str, str, str]]:
    memory = forecast.memory
    yield _bytes("parameters", memory.params)
    yield _bytes("KV cache", memory.kv)
    yield _bytes("slots' state", memory.state, "tokens counted by their ids")
    yield _bytes("activations", memory.activations, "at their peak")
    yield _bytes("logits", memory.logits)
    yield _bytes("total", memory.total, "at the peak")
    yield from _train_totals(forecast)


def _train_totals(forecast: Forecast) -> Iterator[tuple[str, str, str]]:
    train = forecast.train
    if train is None:
        return
    yield "", "", ""
    yield _bytes("parameters", train.params, "training, in float32")
    yield _bytes("optimizer state", train.optimizer)
    yield _bytes("gradients", train.gradients)
    if train.copies:
        note = "in the products' dtype, or put together over data"
        yield _bytes("copies of weights", train.copies, note)
    yield _bytes("logits", train.logits, "and their gradient")
    again, layers = forecast.request.rematerialized_layers, forecast.plan.model.layers
    kept = f"{again} of {layers} layers computed twice" if again else "all kept"
    yield _bytes("activations", train.activations, kept)
    yield _bytes("activations, remat", train.activations_remat, "each layer computed twice")
    yield _bytes("total", train.total, "at the peak")
    yield _bytes("total, remat", train.total_remat)


def _bytes(what: str, count: int, note: str = "") -> tuple[str, str, str]:
    return what, f"{count:,}", shown_bytes(count) + (f"; {note}" if note else "")


def _tensor(forecast: Forecast, pattern: LayerPattern) -> tuple[str, ...]:
    placement = pattern.placement
    elements = pattern.count * local_elements(forecast.plan, placement)
    shape = ", ".join(str(size) for size in placement.shape)
    axes = ", ".join(axis or "-" for axis in placement.axes)
    held = shown_bytes(elements * forecast.request.itemsize)
    return pattern.title, f"[{shape}]", f"[{axes}]", placement.style, held


def _collectives(forecast: Forecast) -> Iterator[tuple[str, ...]]:
    for phase, found in forecast.collectives.items():
        if phase != "train" or forecast.train is not None:
            yield from ((phase, *_collective(each)) for each in found)


def _collective(each: Collective) -> tuple[str, ...]:
    cause = each.module.removeprefix("model.")
    return each.kind, each.axis, str(each.count), shown_bytes(each.bytes), cause


def _count(count: DeviceCount) -> tuple[str, ...]:
    sizes = (count.query_heads, count.kv_heads, count.intermediate, count.vocab)
    extra = (f"+{count.extra_weight_percent:.1f}%", f"+{count.extra_cache_percent:.1f}%")
    held = shown_bytes(count.param_bytes_per_device)
    fits = {True: "yes", False: "no", None: ""}[count.fits]
    return str(count.devices), count.kind, *(str(size) for size in sizes), *extra, held, fits


def _change(change: Alternative) -> tuple[str, ...]:
    saved, needed = shown_bytes(change.saved_bytes), shown_bytes(change.needed_bytes)
    return change.options, saved, needed, "yes" if change.fits else "no"


def _title(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold"))


def _table(
    console: Console,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int,
    last_left: bool = False,
) -> None:
    """Print a table whose first `left` columns are aligned to the left.

    Args:
        last_left: so is the last one; as it is, too, if it has no heading.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for index, head in enumerate(heads):
        text = index < left or (index == len(heads) - 1 and (last_left or not head))
        table.add_column(Text(head), justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
