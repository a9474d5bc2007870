"""`parallama doctor`: versions, backends, known faults, and a self-test on the devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..engine.devices.plugins import parse_options
from ..errors import BackendError, ParallamaError, RunError, lines
from . import options, output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..prove.doctor import Report

_MARKS = {True: "[green]ok[/]", False: "[red]no[/]", None: "[yellow]?[/]"}
_LONGEST_S = 86_400


def doctor(
    *,
    backend: options.BackendName = "cpu",
    backend_option: options.BackendOptions = None,
    limit: Annotated[
        float,
        typer.Option(
            "--limit",
            help="Seconds that the self-test may take.",
            min=1,
            callback=options.within(1, _LONGEST_S),
        ),
    ] = 120,
    as_json: options.AsJson = False,
) -> None:
    """Say what is installed and which backends there are, and test one: exit 0 only if its devices
    compute rightly.
    """
    given = parse_options(backend_option or [])
    from ..prove.doctor import examine

    with output.only_json(as_json):
        report = examine(backend, given, limit)
    if as_json:
        output.print_json(report.to_dict())
    else:
        from rich.console import Console

        render(report, Console(soft_wrap=True))
    test = report.self_test
    if test.passed:
        return
    kind: type[ParallamaError] = {5: BackendError}.get(test.exit_code, RunError)
    head = [] if kind is BackendError else [f"the self-test on backend {backend!r} failed"]
    raised = kind(lines(*[*head, *(test.error or "").splitlines()][:3]))
    raised.exit_code = test.exit_code
    raise raised


def render(report: Report, console: Console) -> None:
    """One page for people."""
    console.print(_packages(report))
    console.print(f"\n[bold]Machine[/]\n{_machine(report)}\n")
    console.print(_backends(report))
    console.print()
    console.print(_faults(report))
    console.print()
    _print_self_test(report, console)


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def _packages(report: Report) -> Table:
    from rich.markup import escape

    table = _table("Versions", "package", "installed", "fits", "wanted")
    for item in report.versions:
        wants = [f"{want.by} {want.spec}{'' if want.fits else ' (!)'}" for want in item.wanted]
        wanted = escape(", ".join(wants) or "-")
        table.add_row(item.name, item.version or "not installed", _MARKS[item.fits], wanted)
    return table


def _machine(report: Report) -> str:
    from rich.markup import escape

    features = " ".join(report.cpu_features) or "none that matters"
    memory = "unknown memory"
    if report.memory_bytes:
        memory = f"{report.memory_bytes / 1e9:.1f} GB"
    if report.memory_available_bytes:
        memory += f" ({report.memory_available_bytes / 1e9:.1f} GB available)"
    return (
        f"{escape(report.cpu)}, {report.cores} cores: {features}; {memory};"
        f" partitioner {report.partitioner}"
    )


def _backends(report: Report) -> Table:
    from rich.markup import escape

    table = _table("Backends", "backend", "", "")
    for state in report.backends:
        api = f" (PJRT API {state.pjrt_api})" if state.pjrt_api else ""
        table.add_row(state.name, _MARKS[state.available], escape(state.reason + api))
    return table


def _faults(report: Report) -> Table:
    from rich.markup import escape

    table = _table("Known faults of this combination", "fault", "what", "what it means")
    for fault in report.faults:
        table.add_row(fault.name, escape(fault.what), escape(fault.means))
    return table


def _print_self_test(report: Report, console: Console) -> None:
    from rich.markup import escape

    test, title = report.self_test, f"Self-test on {escape(report.backend)}"
    if test.checks:
        table = _table(title, "check", "", "largest error", "allowed")
        for check in test.checks:
            error = check["said"] or f"{check['max_error']:.2e}"
            allowed = f"{check['allowed_error']:.0e}" if check["allowed_error"] else "0"
            table.add_row(check["name"], _MARKS[check["passed"]], escape(error), allowed)
        console.print(table)
        names = escape(" ".join(test.devices))
        console.print(f"{len(test.devices)} devices: {names}; mesh {test.mesh}")
    verdict = "[green]passed[/]" if test.passed else "[red]failed[/]"
    console.print(f"{title} {verdict} in {test.took_s:.1f} s, starting its process included")
