"""An inspection for people: tables, and who holds what in letters and colours, for a terminal of 100 columns; or as panels for a picture."""

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
from .inspection import Inspection, alike
from .source_slices import Content, Stretch, shown_slices


def render(
    found: Inspection,
    console: Console,
    *,
    heads: str,
    contents: Sequence[Content] | None = None,
    findings: Sequence[str] = (),
) -> None:
    """Print an inspection.

    Args:
        heads: how heads lie, in words.
        contents: show these instead of the tables.
        findings: what is not as planned.
    """
    mesh = MeshShape(found.mesh)
    head = Table.grid(padding=(0, 2))
    cache = f"{found.batch} row{'s' if found.batch > 1 else ''} of {found.positions} positions, made to be looked at (--batch, --max-model-len)"
    for name, value in (
        ("model", found.model),
        (
            "mesh",
            f"{mesh} ({' x '.join(mesh)}), {mesh.devices} {found.backend} device{'s' if mesh.devices > 1 else ''}",
        ),
        ("dtype", found.dtype),
        ("heads", heads),
        ("KV cache", cache),
    ):
        head.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    console.print(head)
    if contents is None:
        _tables(found, mesh, console)
        _picture(list(panels(found)), mesh, console)
    else:
        _contents(contents, found, console)
    console.print()
    if not findings:
        console.print(Text("Everything lies as planned."))
    for finding in findings:
        console.print(Text(f"otherwise than planned: {finding}", style="bold", overflow="fold"))


def _tables(found: Inspection, mesh: MeshShape, console: Console) -> None:
    rows = []
    for group in alike(found.tensors):
        held = group.first
        local = "differs" if held.local_shape is None else _sizes(held.local_shape)
        most = max(held.bytes_per_device) * group.count
        each = (
            shown_bytes(most)
            if len(set(held.bytes_per_device)) == 1
            else f"up to {shown_bytes(most)}"
        )
        rows.append(
            (group.title, _sizes(held.shape), local, each, "yes" if held.wrong is None else "NO")
        )
    title = "Tensors, one line a kind (measured)"
    _table(
        console, title, ("tensor", "shape", "local shape", "bytes each", "as planned"), rows, left=3
    )
    sums = []
    for device, name in enumerate(found.device_names):
        params, cached = (found.bytes_on(device, cached=which) for which in (False, True))
        sums.append(
            (
                str(device),
                name,
                *(str(each) for each in mesh.coordinates(device).values()),
                f"{params:,}",
                f"{cached:,}",
                f"{params + cached:,}",
            )
        )
    _table(
        console,
        "Bytes on each device (measured)",
        ("device", "name", *mesh, "parameters", "KV cache", "together"),
        sums,
        left=2,
    )


def _table(
    console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int
) -> None:
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
    """One for every kind of tensor, of the parts that were measured."""
    for group in alike(found.tensors):
        held = group.first
        holders: dict[tuple[tuple[Fraction, Fraction], ...], list[int]] = {}
        for device, slices in enumerate(held.parts):
            spans = tuple(
                (Fraction(first, size), Fraction(last, size))
                for (first, last), size in zip(slices, held.shape, strict=True)
            )
            holders.setdefault(spans, []).append(device)
        parts = tuple(
            Part(devices=tuple(devices), spans=spans) for spans, devices in sorted(holders.items())
        )
        note = f"{_sizes(held.shape)}, on a device {'parts that differ' if held.local_shape is None else _sizes(held.local_shape)}"
        yield Panel(title=group.title, note=note, shape=held.shape, parts=parts)


def _picture(panels: Sequence[Panel], mesh: MeshShape, console: Console) -> None:
    """The mesh, and under every tensor's name its parts with the devices that hold them, in colours of their places."""
    console.print(
        Text(
            "\nWho holds what (measured): device numbers, in the order of the slices", style="bold"
        )
    )
    console.print(Text(f"mesh {mesh}: {directions(mesh)}"))
    for row in device_rows(mesh):
        _cells([(str(device), colour([device], mesh)) for device in row], console)
    for panel in panels:
        split = [
            dim
            for dim in range(len(panel.shape))
            if len({part.spans[dim] for part in panel.parts}) > 1
        ]
        how = ", ".join(
            f"dim {dim} {way}"
            for dim, way in zip(
                split, ("down", "across") if len(split) == 2 else ("across",), strict=False
            )
        )
        console.print(
            Text.assemble((panel.title, "bold"), f"  {_sizes(panel.shape)}, {how or 'whole'}")
        )
        lines_of: dict[object, list[Part]] = {}
        for part in panel.parts:
            lines_of.setdefault(part.spans[split[0]] if len(split) == 2 else None, []).append(part)
        for line in lines_of.values():
            _cells(
                [(devices_text(part.devices), colour(part.devices, mesh)) for part in line], console
            )


def _cells(cells: Sequence[tuple[str, str]], console: Console) -> None:
    """A line of coloured cells of one width, folded where the terminal ends."""
    width = max(len(text) for text, _ in cells) + 2
    a_line = max(1, (console.width - 3) // (width + 1))
    for start in range(0, len(cells), a_line):
        line = Text("  |")
        for text, fill in cells[start : start + a_line]:
            line.append(text.center(width), style=f"black on {fill}")
            line.append("|")
        console.print(line)


# -- one tensor


def _contents(contents: Sequence[Content], found: Inspection, console: Console) -> None:
    shapes = {held.name: held for held in found.tensors}
    for name in dict.fromkeys(content.name for content in contents):
        held = shapes[name]
        console.print(Text(f"\n{name}", style="bold"))
        console.print(
            Text(
                f"{_sizes(held.shape)} over [{', '.join(axis or '-' for axis in held.axes)}], checkpoint {_sizes(held.source_shape)}"
            )
        )
        for content in contents:
            if content.name != name:
                continue
            table = Table.grid(padding=(0, 2))
            place = f"{shown_slices(content.slices)}, {content.bytes:,} bytes"
            table.add_row(
                Text(f"device {content.device}"),
                Text(f"{found.device_names[content.device]}: {place}", overflow="fold"),
            )
            for what, text in _lines(content):
                table.add_row(Text(f"  {what}"), Text(text, overflow="fold"))
            console.print(table)


def _lines(content: Content) -> Iterator[tuple[str, str]]:
    if content.heads is not None:
        heads = content.heads
        numbers = ", ".join("zeros" if head is None else str(head) for head in heads.held)
        repeated = (
            f"; also elsewhere: {', '.join(map(str, heads.repeated))}" if heads.repeated else ""
        )
        yield (
            f"{heads.kind} heads",
            numbers + repeated + ("" if heads.whole else "; the part cuts through a head"),
        )
    if content.checkpoint is not None:
        yield (
            "checkpoint",
            "; ".join(
                f"dim {dim}: {_stretches(stretches)}"
                for dim, stretches in enumerate(content.checkpoint)
            ),
        )
    if content.minimum is None or content.maximum is None or content.mean is None:
        figures = "no finite number"
    else:
        figures = f"min {content.minimum:.6g}, max {content.maximum:.6g}, mean {content.mean:.6g}, {content.zero_share:.2%} zeros"
    yield (
        "measured",
        figures + (f", {content.non_finite} infinite or NaN" if content.non_finite else ""),
    )
    yield "SHA-256", content.sha256


def _stretches(stretches: Sequence[Stretch]) -> str:
    return " + ".join(
        f"{stretch.at[1] - stretch.at[0]} zeros"
        if stretch.source is None
        else f"{stretch.source[0]}:{stretch.source[1]}"
        for stretch in stretches
    )
