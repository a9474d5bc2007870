"""`parallama plan`: where everything would lie and what it would take, without devices or weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import FitError, lines
from ..train.options import LoraOptions, StepOptions, slots
from . import options, train_options
from .stated import refuse, stated


def plan(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a config.json, a .gguf file, a hub id, or a name such as llama-3.1-8b."
        ),
    ],
    mesh: options.Mesh = None,
    tensor_parallel_size: options.TensorParallel = None,
    batch: Annotated[int, typer.Option("--batch", help="Rows over all devices.")] = 1,
    seq: Annotated[
        int | None,
        typer.Option(
            "--seq", help="Tokens of a prompt, or of a row in training; 512, or less, if not given."
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len", help="Positions of the KV cache; the model's maximum if not given."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="auto (what loading makes of it on an accelerator), float32 or bfloat16.",
        ),
    ] = "auto",
    train: Annotated[
        bool,
        typer.Option("--train", help="An optimizer step, too; --hardware then asks about that."),
    ] = False,
    fsdp: train_options.Fsdp = StepOptions.fsdp,
    sequence_parallel: train_options.SequenceParallel = StepOptions.sequence_parallel,
    grad_accum: train_options.GradAccum = StepOptions.grad_accum,
    remat: train_options.RematText = train_options.REMAT,
    optimizer: train_options.Optimizer = StepOptions.optimizer,
    lora_rank: train_options.LoraRank = LoraOptions.rank,
    lora_targets: train_options.LoraTargets = train_options.TARGETS,
    overrides: options.PlanFile = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            help="Say whether it fits, as tpu-v5e, n300 or h100-80gb; exit code 4 if it does not.",
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Say in sentences why every kind of tensor lies as it does."
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw who holds what into this SVG or PNG file.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
) -> None:
    """Show where every tensor would lie on a mesh, and what that takes. Needs no device and no weights; all figures are predicted."""
    from ..files import config_json
    from ..model import known_configs
    from ..plan import hardware as machines
    from ..plan import picture
    from ..plan.forecast import DEFAULT_PROMPT, Request, forecast
    from ..plan.placement import make_plan, read_overrides
    from ..train.layout import train_step, training_plan

    shape = options.mesh_shape(mesh, tensor_parallel_size)
    training = {*train_options.NAMES, *train_options.LORA_NAMES}
    if not train:
        refuse(context, training, "is about training", "expected --train beside it")
    adapted = not train_options.LORA_NAMES.isdisjoint(stated(context))
    device = machines.named(hardware) if hardware is not None else None
    if plot is not None:
        picture.check_target(plot)
    document = config_json.read_config(model)
    spec = known_configs.spec_of(document, f"the config of {model}")
    length = spec.max_positions if max_model_len is None else max_model_len
    tokens = min(DEFAULT_PROMPT, length) if seq is None else seq
    how = StepOptions(
        batch_size=max(batch, 1),  # of these `forecast` speaks
        seq_len=max(tokens, 2),
        grad_accum=grad_accum,
        remat=train_options.read_remat(remat),
        fsdp=fsdp,
        sequence_parallel=sequence_parallel,
        optimizer=optimizer,  # type: ignore[arg-type]
        lora=LoraOptions(rank=lora_rank, targets=tuple(lora_targets.split(",")))
        if adapted
        else None,
    )
    if sequence_parallel and tokens % shape.model:
        raise FitError(
            lines(
                f"--seq is {tokens}",
                f"expected a multiple of {shape.model}, the devices along 'model', for sequence parallelism",
            )
        )
    request = Request(
        batch=batch,
        seq=tokens,
        max_model_len=length,
        dtype=known_configs.loaded_dtype(dtype, document),
        stored_dtype=known_configs.stored_dtype(document),
        train=train_step(how, spec.layers) if train else None,
        slots=len(slots(how)),
        hardware=device,
    )
    made = make_plan(spec, shape, None if overrides is None else read_overrides(overrides))
    found = forecast(
        model,
        made,
        request,
        training_plan(made, fsdp=fsdp, lora=how.lora) if fsdp or how.lora is not None else None,
    )
    if plot is not None:
        panels = [picture.planned(kind.placement, shape, title=kind.title) for kind in found.kinds]
        panels += [
            picture.planned(made[name], shape, title=name)
            for name in ("cache.key", "output.logits")
        ]
        picture.write(picture.draw(f"{model} on mesh {shape}", shape, panels), plot)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        from rich.console import Console

        from ..plan import forecast_view

        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, 100)
        forecast_view.render(found, console, explain=explain)
    found.check()
