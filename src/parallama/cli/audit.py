"""`parallama audit`: hold the compiled steps against the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..engine.devices.plugins import parse_options
from ..errors import UsageError, lines
from ..plan.collectives import INFERENCE, Phase
from ..plan.mesh_shape import MeshShape
from ..train.options import StepOptions
from . import options, train_options
from .stated import refuse

if TYPE_CHECKING:
    from ..prove.audit import Audit

_PHASES: tuple[Phase, ...] = ("prefill", "decode", "train")


def audit(
    context: typer.Context,
    model: options.Model,
    phase: Annotated[
        str, typer.Option("--phase", help="prefill, decode, train or all (the first two).")
    ] = "decode",
    batch: Annotated[
        int, typer.Option("--batch", help="Rows over all devices.", show_default="one on each")
    ] = 0,
    seq: Annotated[
        int,
        typer.Option(
            "--seq",
            help="Tokens of each prompt or training row; for decode, tokens already cached.",
        ),
    ] = 64,
    fsdp: train_options.Fsdp = StepOptions.fsdp,
    sequence_parallel: train_options.SequenceParallel = StepOptions.sequence_parallel,
    grad_accum: train_options.GradAccum = StepOptions.grad_accum,
    remat: train_options.RematText = train_options.REMAT,
    accept_plan: Annotated[
        bool,
        typer.Option(
            "--accept-plan",
            help="Judge the program against the plan only, not the plan against the least.",
        ),
    ] = False,
    mesh: options.Mesh = None,
    tensor_parallel_size: options.TensorParallel = None,
    devices: options.Devices = None,
    backend: options.BackendName = "cpu",
    backend_option: options.BackendOptions = None,
    plan: options.PlanFile = None,
    dtype: options.Dtype = "auto",
    allow_nonfinite: options.AllowNonfinite = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Compile a step, and hold its collectives, its weights and its cache against the plan, to the byte."""
    if phase not in (*_PHASES, "all"):
        raise UsageError(
            lines(f"--phase {phase!r} is unknown", f"expected one of {', '.join(_PHASES)}, all")
        )
    if phase != "train":
        refuse(
            context, train_options.NAMES, "is about training", "expected --phase train beside it"
        )
    shape = options.mesh_shape(mesh, tensor_parallel_size)
    batch = batch or shape.data
    if batch < 1 or batch % shape.data:
        raise UsageError(
            lines(
                f"--batch is {batch}",
                f"expected a multiple of {shape.data}, the devices along 'data'",
            )
        )
    if seq < 1:
        raise UsageError(lines(f"--seq is {seq}", "expected at least 1"))
    if phase == "train":
        step = StepOptions(
            batch_size=batch,
            seq_len=seq,
            grad_accum=grad_accum,
            remat=train_options.read_remat(remat),
            fsdp=fsdp,
            sequence_parallel=sequence_parallel,
            dtype=StepOptions.dtype if dtype == "auto" else dtype,  # type: ignore[arg-type]
        )
        chosen = (
            options.mesh_shape(mesh, tensor_parallel_size),
            devices,
            backend,
            backend_option,
            plan,
        )
        found = _train(
            model,
            step,
            *chosen,
            accept_plan=accept_plan,
            allow_nonfinite=allow_nonfinite,
            quiet=quiet,
        )
        typer.echo(json.dumps(found.to_dict())) if as_json else _show(
            found, f"{model} on {shape}, batch {batch}, {seq} tokens"
        )
        if not found.passed:
            raise typer.Exit(1)
        return
    from ..prove.audit import audit as judge
    from ..prove.audit import step_key

    with options.progress(quiet) as progress:
        llm = options.load_model(
            model,
            mesh=mesh,
            tensor_parallel=tensor_parallel_size,
            devices=devices,
            backend=backend,
            backend_options=backend_option,
            plan=plan,
            dtype=dtype,
            max_model_len=None,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            keep_hlo=True,
        )
        if seq + 1 > llm.max_model_len:
            raise UsageError(
                lines(
                    f"--seq is {seq}",
                    f"expected less than {llm.max_model_len}, the model's positions",
                )
            )
        audits = [
            judge(
                llm.steps,
                llm.programs,
                each,
                step_key(each, batch, seq),
                accept_plan=accept_plan,
            )
            for each in INFERENCE
            if phase in (each, "all")
        ]
    if as_json:
        documents = [each.to_dict() for each in audits]
        passed = all(each.passed for each in audits)
        typer.echo(
            json.dumps(documents[0] if phase != "all" else {"phases": documents, "passed": passed})
        )
    else:
        for each in audits:
            _show(each, f"{model} on {shape}, batch {batch}, {seq} tokens")
    if not all(each.passed for each in audits):
        raise typer.Exit(1)


def _train(
    model: str,
    step: StepOptions,
    shape: MeshShape,
    devices: int | None,
    backend: str,
    backend_options: list[str] | None,
    plan: Path | None,
    *,
    accept_plan: bool,
    allow_nonfinite: bool,
    quiet: bool,
) -> Audit:
    """Audit a training step."""
    from ..engine.interface import start
    from ..files.find import find
    from ..model.spec import ModelSpec
    from ..plan.placement import make_plan, read_overrides
    from ..prove.train_audit import audit_training
    from ..train.trainer import make_trainer

    with options.progress(quiet) as progress:
        # First, as in `load`: the devices start before transformers, which may import torch_xla.
        mesh = start(
            shape,
            backend=backend,
            backend_options=parse_options(backend_options or []),
            devices=devices,
            keep_hlo=True,
        )
        checkpoint = find(model)
        made = make_plan(
            ModelSpec.from_config(checkpoint.config),
            shape,
            read_overrides(plan) if plan is not None else None,
        )
        report = None if progress is None else lambda done, of: progress("loading", done, of)
        return audit_training(
            make_trainer(
                checkpoint,
                mesh,
                step,
                plan=made,
                progress=report,
                allow_nonfinite=allow_nonfinite,
            ),
            accept_plan=accept_plan,
        )


def _show(audit: Audit, title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(
        Text(f"{audit.phase}: {'passed' if audit.passed else 'FAILED'} ({title})", style="bold")
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for head, side in (
        ("collective", "left"),
        ("axis", "left"),
        ("module", "left"),
        ("bytes", "right"),
        ("planned", "right"),
        ("found", "right"),
    ):
        table.add_column(head, justify="right" if side == "right" else "left", overflow="fold")
    planned = {
        (each.kind, each.axis, each.module, each.bytes): each.count for each in audit.expected
    }
    found = {(each.kind, each.axis, each.module, each.bytes): each.count for each in audit.found}
    for kind, axis, module, size in dict.fromkeys([*planned, *found]):
        counts = (str(counted.get((kind, axis, module, size), 0)) for counted in (planned, found))
        table.add_row(kind, axis, module, f"{size:,}", *counts)
    if table.row_count:
        console.print(table)
    else:
        console.print(Text("no collectives, planned or found"))
    console.print(
        Text(
            f"{audit.programs} program; {audit.aliased} of {audit.cache_tensors} {'tensors of the state' if audit.phase == 'train' else 'cache tensors'} updated in place"
        )
    )
    console.print(
        Text(f"parameters on each device, measured: {_bytes(audit.param_bytes_per_device)}")
    )
    if audit.working_bytes is not None:
        predicted = (
            f"; predicted: {audit.predicted_working_bytes:,}"
            if audit.predicted_working_bytes is not None
            else ""
        )
        console.print(
            Text(
                f"activations, gradients and all else of a step on each device, measured: {audit.working_bytes:,} bytes{predicted}"
            )
        )
    for finding in audit.findings:
        console.print(Text(f"- {finding.module}: {finding.what} ({finding.bytes:+,} bytes)"))
    console.print()


def _bytes(sizes: tuple[int, ...]) -> str:
    least, most = min(sizes), max(sizes)
    return f"{least:,} bytes" if least == most else f"{least:,} to {most:,} bytes"
