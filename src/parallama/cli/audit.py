"""`parallama audit`: hold the compiled steps against the plan."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError, lines
from ..plan.collectives import INFERENCE, Phase
from ..plan.program_shapes import run_slots
from ..progress_bars import progress_bars
from ..train.options import StepOptions
from . import options, output
from .train_options import AuditedStep

if TYPE_CHECKING:
    from ..inference.sharded_model import Progress
    from ..prove.findings import Audit

_ON_SLOTS: tuple[Phase, ...] = (*INFERENCE, "copy")
_PHASES: tuple[Phase, ...] = (*_ON_SLOTS, "train")


def audit(
    *,
    context: typer.Context,
    phase: Annotated[
        str,
        typer.Option("--phase", help="prefill, decode, copy (of a slot), train, or all but train."),
    ] = "decode",
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", help="Requests, or training rows, at a time.", show_default="one on each"
        ),
    ] = None,
    seq: Annotated[
        int,
        typer.Option(
            "--seq",
            help="Tokens of each prompt or training row; for decode, tokens already cached.",
            callback=options.within(1),
        ),
    ] = 64,
    step: AuditedStep,
    accept_plan: Annotated[
        bool,
        typer.Option(
            "--accept-plan",
            help="Judge the program against the plan only, not the plan against the least.",
        ),
    ] = False,
    chosen: options.ModelOptions,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Compile a step as generate and serve run it, and hold its collectives, its weights and its
    cache against the plan, to the byte.
    """
    if phase not in (*_PHASES, "all"):
        raise UsageError(
            lines(f"--phase {phase!r} is unknown", f"expected one of {', '.join(_PHASES)}, all")
        )
    if phase != "train":
        AuditedStep.refuse(context, "expected --phase train beside it")
    shape = chosen.shape
    batch = options.rows(batch, shape)
    _check_seq(seq, phase, chosen.positions())
    if phase == "train":
        dtype = StepOptions.dtype if chosen.dtype == "auto" else chosen.dtype
        how = step.options(batch_size=batch, seq_len=seq, dtype=dtype)
        with output.only_json(as_json), progress_bars(quiet) as progress:
            audits = [_train(chosen, how, progress, accept_plan=accept_plan)]
    else:
        phases = _ON_SLOTS if phase == "all" else [each for each in _ON_SLOTS if each == phase]
        with output.only_json(as_json), progress_bars(quiet) as progress:
            audits = _inference(chosen, phases, batch, seq, progress, accept_plan=accept_plan)
    passed = all(each.passed for each in audits)
    if as_json:
        documents = [each.to_dict() for each in audits]
        all_phases = {"phases": documents, "passed": passed}
        output.print_json(all_phases if phase == "all" else documents[0])
    else:
        for each in audits:
            _show(each, f"{chosen.model} on {shape}, batch {batch}, {seq} tokens")
    if not passed:
        raise typer.Exit(1)


def _check_seq(seq: int, phase: str, positions: int | None) -> None:
    """Refuse rows that are longer than the model's positions; a step of inference adds a token."""
    training = phase == "train"
    if positions is not None and seq + (not training) > positions:
        most = "at most" if training else "less than"
        raise UsageError(
            lines(f"--seq is {seq}", f"expected {most} {positions}, the model's positions")
        )


def _inference(
    chosen: options.ModelOptions,
    phases: Sequence[Phase],
    batch: int,
    seq: int,
    progress: Progress | None,
    *,
    accept_plan: bool,
) -> list[Audit]:
    """Audit the steps of inference."""
    from ..prove.audit import audit as judge
    from ..prove.audit import step_key

    llm = chosen.load(progress=progress, keep_hlo=True)
    _check_seq(seq, phases[0], llm.max_model_len)
    found = []
    for each in phases:
        key = step_key(each, run_slots(batch), seq, chosen.shape.data)
        found.append(judge(llm.steps, llm.programs, each, key, accept_plan=accept_plan))
    return found


def _train(
    chosen: options.ModelOptions,
    how: StepOptions,
    progress: Progress | None,
    *,
    accept_plan: bool,
) -> Audit:
    """Audit a training step."""
    from ..engine.interface import start
    from ..files.find import find
    from ..model.spec import ModelSpec
    from ..plan.make_plan import make_plan
    from ..plan.overrides import read_overrides
    from ..prove.train_audit import audit_training
    from ..train.trainer import make_trainer

    shape = chosen.shape
    # First, as in `load`: the devices start before transformers, which may import torch_xla.
    mesh = start(
        shape,
        backend=chosen.backend,
        backend_options=chosen.backend_options,
        devices=chosen.devices,
        keep_hlo=True,
    )
    checkpoint = find(chosen.model, chosen.adapter)
    overrides = None if chosen.plan is None else read_overrides(chosen.plan)
    made = make_plan(ModelSpec.from_config(checkpoint.config), shape, overrides)
    report = None if progress is None else partial(progress, "loading")
    trainer = make_trainer(
        checkpoint,
        mesh,
        how,
        plan=made,
        progress=report,
        allow_nonfinite=chosen.allow_nonfinite,
    )
    return audit_training(trainer, accept_plan=accept_plan)


def _show(audit: Audit, title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    verdict = "passed" if audit.passed else "FAILED"
    console.print(Text(f"{audit.phase}: {verdict} ({title})", style="bold"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for head in ("collective", "axis", "module"):
        table.add_column(head, overflow="fold")
    for head in ("bytes", "planned", "found"):
        table.add_column(head, justify="right", overflow="fold")
    planned, found = (
        {(each.kind, each.axis, each.module, each.bytes): each.count for each in collectives}
        for collectives in (audit.expected, audit.found)
    )
    for key in dict.fromkeys([*planned, *found]):
        kind, axis, module, size = key
        counts = (str(planned.get(key, 0)), str(found.get(key, 0)))
        table.add_row(kind, axis, module, f"{size:,}", *counts)
    console.print(table if table.row_count else Text("no collectives, planned or found"))
    tensors = "tensors of the state" if audit.phase == "train" else "cache tensors"
    remarks = [
        f"{audit.programs} program; {audit.aliased} of {audit.cache_tensors} {tensors}"
        " updated in place",
        f"parameters on each device, measured: {_bytes(audit.param_bytes_per_device)}",
    ]
    if audit.working_bytes is not None:
        predicted = audit.predicted_working_bytes
        remarks.append(
            "activations, gradients and all else of a step on each device, measured:"
            f" {audit.working_bytes:,} bytes"
            + ("" if predicted is None else f"; predicted: {predicted:,}")
        )
    remarks += [f"- {each.module}: {each.what} ({each.bytes:+,} bytes)" for each in audit.findings]
    for remark in remarks:
        console.print(Text(remark))
    console.print()


def _bytes(sizes: tuple[int, ...]) -> str:
    least, most = min(sizes), max(sizes)
    return f"{least:,} bytes" if least == most else f"{least:,} to {most:,} bytes"
