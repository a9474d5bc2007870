"""`parallama doctor`: versions, backends, known faults, and a self-test on the devices."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ..engine.devices.plugins import parse_options
from ..errors import BackendError, ParallamaError, RunError, lines
from . import options

if TYPE_CHECKING:
    from rich.console import Console

    from ..prove.doctor import Report

_MARKS = {True: "[green]ok[/]", False: "[red]no[/]", None: "[yellow]?[/]"}


def doctor(
    backend: options.BackendName = "cpu",
    backend_option: options.BackendOptions = None,
    limit: Annotated[
        float, typer.Option("--limit", help="Seconds that the self-test may take.", min=1)
    ] = 120,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
) -> None:
    """Say what is installed and which backends there are, and test one: exit 0 only if its devices compute rightly."""
    given = parse_options(backend_option or [])
    from ..prove.doctor import examine

    report = examine(backend, given, limit)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
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
    from rich.markup import escape
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
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

    packages = table("Versions", "package", "installed", "fits", "wanted")
    for item in report.versions:
        wanted = (
            ", ".join(f"{want.by} {want.spec}{'' if want.fits else ' (!)'}" for want in item.wanted)
            or "-"
        )
        packages.add_row(
            item.name, item.version or "not installed", _MARKS[item.fits], escape(wanted)
        )
    known = table("Backends", "backend", "", "")
    for state in report.backends:
        api = f" (PJRT API {state.pjrt_api})" if state.pjrt_api else ""
        known.add_row(state.name, _MARKS[state.available], escape(state.reason + api))
    faults = table("Known faults of this combination", "fault", "what", "what it means")
    for fault in report.faults:
        faults.add_row(fault.name, escape(fault.what), escape(fault.means))
    memory = f"{report.memory_bytes / 1e9:.1f} GB" if report.memory_bytes else "unknown memory"
    free = (
        f" ({report.memory_available_bytes / 1e9:.1f} GB available)"
        if report.memory_available_bytes
        else ""
    )
    features = " ".join(report.cpu_features) or "none that matters"
    test = report.self_test
    checks = table(
        f"Self-test on {escape(report.backend)}", "check", "", "largest error", "allowed"
    )
    for check in test.checks:
        error = check["said"] or f"{check['max_error']:.2e}"
        checks.add_row(
            check["name"],
            _MARKS[check["passed"]],
            escape(error),
            f"{check['allowed_error']:.0e}" if check["allowed_error"] else "0",
        )
    console.print(packages)
    console.print(
        f"\n[bold]Machine[/]\n{escape(report.cpu)}, {report.cores} cores: {features}; {memory}{free}; partitioner {report.partitioner}\n"
    )
    console.print(known)
    console.print()
    console.print(faults)
    console.print()
    if test.checks:
        console.print(checks)
        console.print(
            f"{len(test.devices)} devices: {escape(' '.join(test.devices))}; mesh {test.mesh}"
        )
    verdict = "[green]passed[/]" if test.passed else "[red]failed[/]"
    console.print(
        f"Self-test on {escape(report.backend)} {verdict} in {test.took_s:.1f} s, starting its process included"
    )
