"""An inspection for people: tables, and who holds what in letters and colours.

It is made for a terminal of 100 columns. `panels` gives the same for a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..plan.cost import shown_bytes
from ..plan.mesh_shape import MeshShape
from ..plan.picture import Panel, Part, colour, device_rows, devices_text, directions
from .inspection import Inspection, grouped, shown_slices
from .shard_contents import Segment, ShardContent


def render(
    found: Inspection,
    console: Console,
    *,
    heads: str,
    contents: Sequence[ShardContent] | None = None,
    findings: Sequence[str] = (),
) -> None:
    """Print an inspection.

    Args:
        heads: how heads are placed, in words.
        contents: show these instead of the tables.
        findings: what is not as planned.
    """
    mesh = MeshShape(found.mesh)
    console.print(_head(found, mesh, heads))
    if contents is None:
        _print_tensors(found, console)
        _print_devices(found, mesh, console)
        _print_picture(list(panels(found)), mesh, console)
    else:
        _print_contents(contents, found, console)
    console.print()
    if not findings:
        console.print(Text("Everything is placed as planned."))
    for finding in findings:
        console.print(Text(f"otherwise than planned: {finding}", style="bold", overflow="fold"))


def _head(found: Inspection, mesh: MeshShape, heads: str) -> Table:
    devices = f"{mesh.devices} {found.backend} device{'s' if mesh.devices > 1 else ''}"
    cache = f"{found.batch} row{'s' if found.batch > 1 else ''} of {found.positions} positions"
    head = Table.grid(padding=(0, 2))
    for name, value in (
        ("model", found.model),
        ("mesh", f"{mesh} ({' x '.join(mesh)}), {devices}"),
        ("dtype", found.dtype),
        ("heads", heads),
        ("KV cache", f"{cache}, made to be looked at (--batch, --max-model-len)"),
    ):
        head.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    return head


def _print_tensors(found: Inspection, console: Console) -> None:
    rows = []
    for group in grouped(found.tensors):
        tensor = group.first
        local = "differs" if tensor.local_shape is None else _sizes(tensor.local_shape)
        size = shown_bytes(max(tensor.bytes_per_device) * group.count)
        if len(set(tensor.bytes_per_device)) > 1:
            size = f"up to {size}"
        planned = "yes" if tensor.wrong is None else "NO"
        rows.append((group.title, _sizes(tensor.shape), local, size, planned))
    heads = ("tensor", "shape", "local shape", "bytes each", "as planned")
    _print_table(console, "Tensors, one line a kind (measured)", heads, rows, left=3)


def _print_devices(found: Inspection, mesh: MeshShape, console: Console) -> None:
    rows = []
    for device, name in enumerate(found.device_names):
        params = found.bytes_on(device, cached=False)
        cache = found.bytes_on(device, cached=True)
        numbers = (str(device), name, *map(str, mesh.coordinates(device).values()))
        rows.append((*numbers, f"{params:,}", f"{cache:,}", f"{params + cache:,}"))
    heads = ("device", "name", *mesh, "parameters", "KV cache", "together")
    _print_table(console, "Bytes on each device (measured)", heads, rows, left=2)


def _print_table(
    console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int
) -> None:
    """Print a table.

    Args:
        left: so many columns are aligned on the left, the others on the right.
    """
    console.print(Text(f"\n{title}", style="bold"))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for index, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _sizes(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


# -- pictures


def panels(found: Inspection) -> Iterator[Panel]:
    """A panel for every group of tensors, of the parts that were measured."""
    for group in grouped(found.tensors):
        tensor = group.first
        holders: dict[tuple[tuple[Fraction, Fraction], ...], list[int]] = {}
        for device, slices in enumerate(tensor.parts):
            spans = tuple(
                (Fraction(first, size), Fraction(last, size))
                for (first, last), size in zip(slices, tensor.shape, strict=True)
            )
            holders.setdefault(spans, []).append(device)
        parts = tuple(
            Part(devices=tuple(devices), spans=spans) for spans, devices in sorted(holders.items())
        )
        local = "parts that differ" if tensor.local_shape is None else _sizes(tensor.local_shape)
        note = f"{_sizes(tensor.shape)}, on a device {local}"
        yield Panel(title=group.title, note=note, shape=tensor.shape, parts=parts)


def _print_picture(panels: Sequence[Panel], mesh: MeshShape, console: Console) -> None:
    """Print the mesh, and under every tensor's name its parts.

    A part shows the devices that hold it, in the colour of their place on the mesh.
    """
    title = "Who holds what (measured): device numbers, in the order of the slices"
    console.print(Text(f"\n{title}", style="bold"))
    console.print(Text(f"mesh {mesh}: {directions(mesh)}"))
    for row in device_rows(mesh):
        _print_cells([(str(device), colour([device], mesh)) for device in row], console)
    for panel in panels:
        split = [
            dim
            for dim in range(len(panel.shape))
            if len({part.spans[dim] for part in panel.parts}) > 1
        ]
        ways = ("down", "across") if len(split) == 2 else ("across",)
        how = ", ".join(f"dim {dim} {way}" for dim, way in zip(split, ways, strict=False))
        shape = f"  {_sizes(panel.shape)}, {how or 'whole'}"
        console.print(Text.assemble((panel.title, "bold"), shape))
        rows: dict[object, list[Part]] = {}
        for part in panel.parts:
            rows.setdefault(part.spans[split[0]] if len(split) == 2 else None, []).append(part)
        for parts in rows.values():
            cells = [(devices_text(part.devices), colour(part.devices, mesh)) for part in parts]
            _print_cells(cells, console)


def _print_cells(cells: Sequence[tuple[str, str]], console: Console) -> None:
    """Print coloured cells of one width in a line, which is folded where the terminal ends."""
    width = max(len(text) for text, _ in cells) + 2
    per_line = max(1, (console.width - 3) // (width + 1))
    for start in range(0, len(cells), per_line):
        line = Text("  |")
        for text, fill in cells[start : start + per_line]:
            line.append(text.center(width), style=f"black on {fill}")
            line.append("|")
        console.print(line)


# -- single tensors


def _print_contents(contents: Sequence[ShardContent], found: Inspection, console: Console) -> None:
    tensors = {tensor.name: tensor for tensor in found.tensors}
    for name in dict.fromkeys(content.name for content in contents):
        tensor = tensors[name]
        axes = ", ".join(axis or "-" for axis in tensor.axes)
        source = _sizes(tensor.source_shape)
        console.print(Text(f"\n{name}", style="bold"))
        console.print(Text(f"{_sizes(tensor.shape)} over [{axes}], checkpoint {source}"))
        for content in contents:
            if content.name == name:
                console.print(_shard(content, found.device_names[content.device]))


def _shard(content: ShardContent, device_name: str) -> Table:
    table = Table.grid(padding=(0, 2))
    place = f"{device_name}: {shown_slices(content.slices)}, {content.bytes:,} bytes"
    table.add_row(Text(f"device {content.device}"), Text(place, overflow="fold"))
    for what, text in _lines(content):
        table.add_row(Text(f"  {what}"), Text(text, overflow="fold"))
    return table


def _lines(content: ShardContent) -> Iterator[tuple[str, str]]:
    heads = content.heads
    if heads is not None:
        text = ", ".join("zeros" if head is None else str(head) for head in heads.held)
        if heads.repeated:
            text += f"; also elsewhere: {', '.join(map(str, heads.repeated))}"
        if not heads.whole:
            text += "; the part cuts through a head"
        yield f"{heads.kind} heads", text
    if content.checkpoint is not None:
        dims = enumerate(content.checkpoint)
        yield "checkpoint", "; ".join(f"dim {dim}: {_sources(found)}" for dim, found in dims)
    figures = "no finite number"
    if content.minimum is not None:
        figures = (
            f"min {content.minimum:.6g}, max {content.maximum:.6g}, mean {content.mean:.6g}, "
            f"{content.zero_share:.2%} zeros"
        )
    if content.non_finite:
        figures += f", {content.non_finite} infinite or NaN"
    yield "measured", figures
    yield "SHA-256", content.sha256


def _sources(segments: Sequence[Segment]) -> str:
    return " + ".join(
        f"{segment.at[1] - segment.at[0]} zeros"
        if segment.source is None
        else f"{segment.source[0]}:{segment.source[1]}"
        for segment in segments
    )
