"""`parallama generate`: continue prompts, answer conversations."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, lines
from ..progress_bars import progress_bars
from . import options, output
from .asked import Asked, from_options, from_prompts_file
from .template_args import TemplateArgs, template_kwargs
from .text_options import TextOptions

if TYPE_CHECKING:
    from ..inference.completion import Completion
    from ..inference.llm import LLM
    from ..inference.requests import Request


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
        Path | None,
        typer.Option(
            "--prompt-file", help="A file that holds one prompt; its last newline is left out."
        ),
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option("--messages", help="A JSON file with a conversation, or a list of them."),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts-file",
            help="A file with a prompt a line, or .jsonl with prompt or messages and sampling"
            " parameters; results are JSON lines, printed as they end.",
        ),
    ] = None,
    max_num_seqs: Annotated[
        int,
        typer.Option(
            "--max-num-seqs",
            help="Most rows at a time of --prompts-file.",
            callback=options.within(1),
        ),
    ] = 16,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", help="System message, with --chat.")
    ] = None,
    chat_template_arg: TemplateArgs = None,
    continue_final_message: Annotated[
        bool,
        typer.Option("--continue-final-message", help="Go on with a conversation's last message."),
    ] = False,
    n: Annotated[
        int, typer.Option("--n", help="Completions of each prompt.", callback=options.within(1))
    ] = 1,
    texts: TextOptions,
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
    if prompts_file is not None and (prompt or prompt_ids or prompt_file or messages):
        raise UsageError(
            lines("--prompts-file was given beside another prompt", "expected one of them")
        )
    if prompts_file is not None and as_json:
        raise UsageError(
            lines("--json was given with --prompts-file", "its results are JSON lines without it")
        )
    if system is not None and not chat:
        raise UsageError(lines("--system was given without --chat", "expected both, or neither"))
    how = {
        "chat_template_kwargs": template_kwargs(chat_template_arg),
        "continue_final_message": continue_final_message,
    }
    if prompts_file is None:
        asked = from_options(prompt, prompt_ids, prompt_file, messages)
    else:
        asked = from_prompts_file(prompts_file)
    if chat:
        asked = [_in_conversation(each, system) for each in asked]
    for option, given in (
        ("--chat-template-arg", chat_template_arg),
        ("--continue-final-message", continue_final_message),
    ):
        if given and not any(each.messages for each in asked):
            raise UsageError(
                lines(f"{option} was given without a conversation", "expected messages, or --chat")
            )
    chosen.check_lengths(max_model_len, max_new_tokens)
    settings: dict[str, Any] = sampling.arguments | texts.arguments
    settings |= {"max_new_tokens": max_new_tokens, "n": n}
    with progress_bars(quiet) as progress:
        with output.only_json(as_json or prompts_file is not None):
            llm = chosen.load(progress=progress, max_model_len=max_model_len)
            requests = _requests(llm, asked, settings, how)
            outputs = llm.completed(requests) if as_json else []
        if as_json:
            output.print_json(_document(llm, outputs), readable=True)
        elif prompts_file is not None:
            _print_lines(llm, requests, asked, max_num_seqs)
        elif len(requests) == 1:
            for _, chunk, _ in llm.chunks(requests):
                typer.echo(chunk.text, nl=False)
                sys.stdout.flush()
            typer.echo()
        else:
            for number, completion in enumerate(llm.completed(requests), 1):
                typer.echo(f"--- {number} of {len(requests)}\n{completion.text}")
    if not quiet:
        _figures(llm)


def _in_conversation(asked: Asked, system: str | None) -> Asked:
    """A prompt as what a user says, for `--chat`."""
    if not isinstance(asked.prompt, str):
        given = "--prompt-ids was" if asked.messages is None else "messages were"
        raise UsageError(
            lines(f"{given} given with --chat", "expected text, which the chat template can hold")
        )
    system_message = [{"role": "system", "content": system}] if system is not None else []
    messages = [*system_message, {"role": "user", "content": asked.prompt}]
    return replace(asked, prompt=None, messages=messages)


def _requests(
    llm: LLM, asked: Sequence[Asked], settings: Mapping[str, Any], how: Mapping[str, Any]
) -> list[Request]:
    """What the model is asked for: a request for each completion.

    Args:
        settings: for `SamplingParams`, where a prompt has none of its own.
        how: conversations are rendered, see `LLM.chat`.
    """
    from ..inference.sampling_params import SamplingParams

    prompts: list[tuple[str | None, list[int]]] = []
    for each in asked:
        if each.messages is not None:
            prompts.append((None, llm.render_chat(each.messages, **how)))
        elif each.prompt is not None:
            text = each.prompt if isinstance(each.prompt, str) else None
            prompts.append((text, llm.encode(each.prompt)))
    params = [SamplingParams(**{**settings, **each.params}) for each in asked]
    answers = [place for place, each in enumerate(asked) if each.messages is not None]
    return llm.requests(prompts, params, answers=answers)


def _print_lines(
    llm: LLM, requests: Sequence[Request], asked: Sequence[Asked], max_num_seqs: int
) -> None:
    """Print each completion as a line of JSON, as soon as it has ended."""
    of = list(accumulate(int(request.index == 0) for request in requests))
    for place, completion in llm.run(requests, max_num_seqs=max_num_seqs):
        output.print_json(
            {**asked[of[place] - 1].carried, **_completion(completion)}, readable=True
        )
        sys.stdout.flush()


def _completion(each: Completion) -> dict[str, Any]:
    scores = each.prompt_logprobs
    return {
        "prompt": each.prompt_ids if each.prompt is None else each.prompt,
        "index": each.index,
        "text": each.text,
        "token_ids": each.token_ids,
        "logprobs": each.logprobs,
        "top_logprobs": each.top_logprobs,
        "prompt_logprobs": scores and [scored and asdict(scored) for scored in scores],
        "finish_reason": each.finish_reason,
        "stop_reason": each.stop_reason,
    }


def _document(llm: LLM, outputs: list[Completion]) -> dict[str, Any]:
    """The document of `--json`."""
    return {
        "model": llm.name,
        "backend": llm.mesh.backend.name,
        "mesh": dict(llm.mesh.shape),
        "dtype": str(llm.steps.dtype).removeprefix("torch."),
        "outputs": [_completion(each) for each in outputs],
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
