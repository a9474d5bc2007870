"""`parallama plan`: where tensors would be placed and what that takes, without any device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import FitError, lines
from . import options, output
from .train_options import PlannedStep


def plan(
    *,
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
    step: PlannedStep,
    overrides: options.PlanFile = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            help="Say whether it fits: tpu-v5e, n300, h100, the memory of a device (24GB), or a"
            " YAML file of its own; exit code 4 if it does not.",
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Say in sentences why every kind of tensor is placed as it is."
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw who holds what into this SVG or PNG file.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show where every tensor would be placed on a mesh, and what that takes. Needs no device and
    no weights; all figures are predicted.
    """
    from ..files import config_json
    from ..model import known_configs
    from ..plan import picture, picture_files
    from ..plan.forecast import forecast
    from ..plan.hardware_names import find_hardware
    from ..plan.overrides import read_overrides
    from ..plan.request import DEFAULT_PROMPT, Request
    from .planned_run import PlannedRun

    shape = options.mesh_shape(mesh, tensor_parallel_size)
    if not train:
        PlannedStep.refuse(context, "expected --train beside it")
    device = find_hardware(hardware) if hardware is not None else None
    if plot is not None:
        picture_files.check_target(plot)
    document = config_json.read_config(model)
    spec = known_configs.spec_of(document, f"the config of {model}")
    length = spec.max_positions if max_model_len is None else max_model_len
    tokens = min(DEFAULT_PROMPT, length) if seq is None else seq
    # Of sizes that are too small `forecast` speaks.
    how = step.options(batch_size=max(batch, 1), seq_len=max(tokens, 2))
    if how.sequence_parallel and tokens % shape.model:
        raise FitError(
            lines(
                f"--seq is {tokens}",
                f"expected a multiple of {shape.model}, the devices along 'model',"
                " for sequence parallelism",
            )
        )
    run = PlannedRun(
        spec=spec,
        mesh=shape,
        overrides=None if overrides is None else read_overrides(overrides),
        base=Request(
            batch=batch,
            seq=tokens,
            max_model_len=length,
            dtype=known_configs.loaded_dtype(dtype, document),
            stored_dtype=known_configs.stored_dtype(document),
            hardware=device,
        ),
        step=how if train else None,
    )
    made = run.plan
    found = forecast(model, made, run.request, run.training_plan, run.alternatives)
    if plot is not None:
        panels = [
            picture.planned(each.placement, shape, title=each.title) for each in found.patterns
        ]
        panels += [
            picture.planned(made[name], shape, title=name)
            for name in ("cache.key", "output.logits")
        ]
        picture_files.write(picture.draw(f"{model} on mesh {shape}", shape, panels), plot)
    if as_json:
        output.print_json(found.to_dict())
    else:
        from ..plan import forecast_view

        forecast_view.render(found, output.wide_console(), explain=explain)
    found.check()
