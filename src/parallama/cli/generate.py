"""`parallama generate`: continue prompts."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, lines
from . import options

if TYPE_CHECKING:
    from ..inference.completion import Completion
    from ..inference.llm import LLM


def generate(
    model: options.Model,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="A prompt; may be given several times."),
    ] = None,
    prompt_ids: Annotated[
        list[str] | None,
        typer.Option("--prompt-ids", help="A prompt as token ids, as 1,2,3; several times."),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="A file that holds one prompt.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", help="System message, with --chat.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="End the text before this string; several times."),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")
    ] = False,
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
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue one or more prompts; a single one streams to the terminal."""
    prompts: list[Any] = _prompts(prompt, prompt_ids, prompt_file)
    if system is not None and not chat:
        raise UsageError(lines("--system was given without --chat", "expected both, or neither"))
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
        if chat:
            prompts = [_in_template(llm, text, system) for text in prompts]
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "stop": stop or [],
            "ignore_eos": ignore_eos,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        if as_json:
            outputs = llm.generate(prompts, **settings)
            typer.echo(json.dumps(_document(llm, outputs), ensure_ascii=False))
        elif len(prompts) == 1:
            for chunk in llm.stream(prompts[0], **settings):
                typer.echo(chunk.text, nl=False)
                sys.stdout.flush()
            typer.echo()
        else:
            for number, output in enumerate(llm.generate(prompts, **settings), 1):
                typer.echo(f"--- {number} of {len(prompts)}\n{output.text}")
    if not quiet:
        _figures(llm)


def _prompts(
    texts: list[str] | None, ids: list[str] | None, file: Path | None
) -> list[str | list[int]]:
    prompts: list[str | list[int]] = [*(texts or [])]
    for given in ids or []:
        try:
            prompts.append([int(part) for part in given.split(",")])
        except ValueError:
            raise UsageError(
                lines(
                    f"--prompt-ids {given!r} cannot be read",
                    "expected whole numbers with commas, as 1,2,3",
                )
            ) from None
    if file is not None:
        try:
            prompts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UsageError(
                lines(
                    f"--prompt-file {str(file)!r} cannot be read: {reason}", "expected a text file"
                )
            ) from None
    if not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError(
                lines(
                    "there is no prompt",
                    "expected --prompt, --prompt-ids, --prompt-file, or text on standard input",
                )
            )
        prompts.append(sys.stdin.read())
    if any(len(prompt) == 0 for prompt in prompts):
        raise UsageError(lines("a prompt is empty", "expected some text, or token ids"))
    return prompts


def _in_template(llm: LLM, prompt: str | list[int], system: str | None) -> list[int]:
    if not isinstance(prompt, str):
        raise UsageError(
            lines(
                "--prompt-ids was given with --chat",
                "expected text, which the chat template can hold",
            )
        )
    messages = [{"role": "system", "content": system}] if system is not None else []
    return llm.render_chat([*messages, {"role": "user", "content": prompt}])


def _document(llm: LLM, outputs: list[Completion]) -> dict[str, Any]:
    from ..host import peak_rss_bytes

    stats = llm.stats
    new_tokens = sum(len(output.token_ids) - 1 for output in outputs)
    return {
        "model": llm.name,
        "backend": llm.mesh.backend.name,
        "mesh": dict(llm.mesh.shape),
        "dtype": str(llm.steps.dtype).removeprefix("torch."),
        "outputs": [
            {
                "prompt": output.prompt if output.prompt is not None else output.prompt_ids,
                "text": output.text,
                "token_ids": output.token_ids,
                "logprobs": output.logprobs,
                "finish_reason": output.finish_reason,
            }
            for output in outputs
        ],
        "ignored": [{"name": name, "reason": reason} for name, reason in llm.ignored.items()],
        "stats": {
            "load_s": llm.load_s,
            "load_bytes_read": llm.load_stats.bytes_read,
            "load_bytes_per_s": llm.load_stats.bytes_per_s,
            "load_baseline_rss_bytes": llm.load_stats.baseline_rss_bytes,
            "load_peak_rss_bytes": llm.load_stats.peak_rss_bytes,
            "largest_tensor_bytes": llm.load_stats.largest_tensor_bytes,
            "compile_s": stats.compile_s,
            "ttft_s": stats.ttft_s,
            "prefill_tokens_per_s": stats.prefill_tokens / stats.prefill_s,
            "decode_tokens_per_s": new_tokens / stats.decode_s if stats.decode_s else None,
            "decode_host_ms_per_step": 1e3 * stats.decode_host_s / stats.decode_steps
            if stats.decode_steps
            else None,
            "programs_compiled": stats.programs_compiled,
            "programs_after_warmup": stats.programs_after_warmup,
            "param_bytes_per_device": llm.param_bytes_per_device(),
            "kv_bytes_per_device": llm.kv_bytes_per_device,
            "peak_rss_bytes": peak_rss_bytes(),
        },
    }


def _figures(llm: LLM) -> None:
    stats = llm.stats
    speed = f", {stats.decode_steps / stats.decode_s:.1f} steps/s" if stats.decode_s else ""
    options.say(
        f"[{llm.mesh.shape} {llm.mesh.backend.name}; load {llm.load_s:.1f} s, compile {stats.compile_s:.1f} s "
        f"({stats.programs_compiled} programs, {stats.programs_after_warmup} after warm-up), first token {stats.ttft_s:.2f} s{speed}]"
    )
    for reason, count in Counter(llm.ignored.values()).items():
        options.say(f"[not read of the checkpoint, {count}: {reason}]")
