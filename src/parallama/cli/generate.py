"""`parallama generate`: continue prompts."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import text_files
from ..errors import UsageError, lines
from . import options, output
from .input import text_of

if TYPE_CHECKING:
    from ..inference.completion import Completion
    from ..inference.llm import LLM


def generate(
    *,
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
    chosen: options.ModelOptions,
    max_model_len: options.MaxModelLen = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            help="Most new tokens a prompt.",
            show_default="256",
            callback=options.within(1),
        ),
    ] = None,
    sampling: options.SamplingOptions,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue one or more prompts; a single one streams to the terminal."""
    prompts: list[Any] = _prompts(prompt, prompt_ids, prompt_file)
    if system is not None and not chat:
        raise UsageError(lines("--system was given without --chat", "expected both, or neither"))
    chosen.check_lengths(max_model_len, max_new_tokens)
    with output.only_json(as_json), output.progress(quiet) as progress:
        llm = chosen.load(progress=progress, max_model_len=max_model_len)
        if chat:
            prompts = [_in_template(llm, text, system) for text in prompts]
        settings: dict[str, Any] = sampling.arguments | {
            "max_new_tokens": max_new_tokens,
            "stop": stop or [],
            "ignore_eos": ignore_eos,
        }
        outputs: list[Completion] = []
        if as_json or len(prompts) > 1:
            outputs = llm.generate(prompts, **settings)
        else:
            for chunk in llm.stream(prompts[0], **settings):
                typer.echo(chunk.text, nl=False)
                sys.stdout.flush()
            typer.echo()
    if as_json:
        output.print_json(_document(llm, outputs), readable=True)
    else:
        for number, completion in enumerate(outputs, 1):
            typer.echo(f"--- {number} of {len(prompts)}\n{completion.text}")
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
            prompts.append(text_files.read(file))
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
        prompts.append(text_of(sys.stdin.read))
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
    """The document of `--json`."""
    return {
        "model": llm.name,
        "backend": llm.mesh.backend.name,
        "mesh": dict(llm.mesh.shape),
        "dtype": str(llm.steps.dtype).removeprefix("torch."),
        "outputs": [
            {
                "prompt": each.prompt_ids if each.prompt is None else each.prompt,
                "text": each.text,
                "token_ids": each.token_ids,
                "logprobs": each.logprobs,
                "finish_reason": each.finish_reason,
            }
            for each in outputs
        ],
        "ignored": [{"name": name, "reason": reason} for name, reason in llm.ignored.items()],
        "stats": _stats(llm, sum(len(each.token_ids) - 1 for each in outputs)),
    }


def _stats(llm: LLM, decoded: int) -> dict[str, Any]:
    """What loading and the last run took; `decoded` tokens came from decode steps."""
    from ..host import peak_rss_bytes

    stats, load = llm.stats, llm.load_stats
    per_s = decoded / stats.decode_s if stats.decode_s else None
    host_ms = 1e3 * stats.decode_host_s / stats.decode_steps if stats.decode_steps else None
    return {
        "load_s": llm.load_s,
        "load_bytes_read": load.bytes_read,
        "load_bytes_per_s": load.bytes_per_s,
        "load_baseline_rss_bytes": load.baseline_rss_bytes,
        "load_peak_rss_bytes": load.peak_rss_bytes,
        "largest_tensor_bytes": load.largest_tensor_bytes,
        "compile_s": stats.compile_s,
        "ttft_s": stats.ttft_s,
        "prefill_tokens_per_s": stats.prefill_tokens / stats.prefill_s,
        "decode_tokens_per_s": per_s,
        "decode_host_ms_per_step": host_ms,
        "programs_compiled": stats.programs_compiled,
        "programs_after_warmup": stats.programs_after_warmup,
        "param_bytes_per_device": llm.param_bytes_per_device(),
        "kv_bytes_per_device": llm.kv_bytes_per_device,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _figures(llm: LLM) -> None:
    stats = llm.stats
    speed = f", {stats.decode_steps / stats.decode_s:.1f} steps/s" if stats.decode_s else ""
    output.say(
        f"[{llm.mesh.shape} {llm.mesh.backend.name}; load {llm.load_s:.1f} s,"
        f" compile {stats.compile_s:.1f} s ({stats.programs_compiled} programs,"
        f" {stats.programs_after_warmup} after warm-up), first token {stats.ttft_s:.2f} s{speed}]"
    )
    for reason, count in Counter(llm.ignored.values()).items():
        output.say(f"[not read of the checkpoint, {count}: {reason}]")
