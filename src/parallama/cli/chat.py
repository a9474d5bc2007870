"""`parallama chat`: talk to a model; its cache is kept between turns."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import UsageError
from . import options


def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    mesh: options.Mesh = None,
    tensor_parallel_size: options.TensorParallel = None,
    devices: options.Devices = None,
    backend: options.BackendName = "cpu",
    backend_option: options.BackendOptions = None,
    plan: options.PlanFile = None,
    dtype: options.Dtype = "auto",
    allow_nonfinite: options.AllowNonfinite = False,
    max_model_len: options.MaxModelLen = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
) -> None:
    """Talk to a model, one line a turn. /new starts over, /exit or the end of input leaves."""
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
            max_model_len=max_model_len,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
        from ..inference.chat import Chat

        talk = Chat(
            llm,
            system=system,
            max_model_len=max_model_len,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            break
        if line.strip() == "/new":
            talk.reset()
            continue
        if not line.strip():
            continue
        try:
            for chunk in talk.send(line.strip(), max_new_tokens=max_new_tokens):
                typer.echo(chunk.text, nl=False)
                sys.stdout.flush()
            typer.echo()
        except UsageError as error:
            options.say(f"parallama: {error}")
    if not quiet:
        stats = talk.stats
        options.say(
            f"[{llm.mesh.shape}; {stats.prefill_tokens} tokens prefilled, {stats.decode_steps} decoded, "
            f"{stats.programs_compiled} programs, {stats.programs_after_warmup} after warm-up]"
        )
