"""`parallama bench --serve`: its options, by the names of `vllm bench serve`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.serve_options import DATASETS, LIMITED, METRICS, OwnServer, Workload, read_goodput
from ..errors import UsageError, lines
from ..progress_bars import progress_bars
from ..remote_server import COMPLETIONS, is_address
from . import options, output
from .model_command import ModelCommand
from .unused_options import refuse

_OF_OUR_SERVER = {
    *("mesh", "dtype", "backend", "backend_option", "allow_nonfinite", "threads"),
    *("max_model_len", "max_num_seqs", "max_num_batched_tokens"),
}
"""Options of the server that is started; one that runs already was started with its own."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What `--serve` measures."""

    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            help="With --serve: 'transformers' (its own server) or an address; several times.",
        ),
    ] = None
    served_model_name: Annotated[
        str | None,
        typer.Option(
            "--served-model-name",
            help="What the server calls its model.",
            show_default="the first that it names",
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer", help="A model whose tokenizer makes the prompts.", show_default="MODEL's"
        ),
    ] = None
    api_key: options.ApiKey = None
    endpoint: Annotated[
        str, typer.Option("--endpoint", help="/v1/completions or /v1/chat/completions.")
    ] = COMPLETIONS
    num_prompts: Annotated[int, typer.Option("--num-prompts", help="Requests.")] = 100
    num_warmups: Annotated[
        int, typer.Option("--num-warmups", help="Requests before, which do not count.")
    ] = 0
    max_concurrency: Annotated[
        int | None, typer.Option("--max-concurrency", help="Most requests at a time.")
    ] = None
    request_rate: Annotated[
        float, typer.Option("--request-rate", help="Requests a second; inf sends all at once.")
    ] = float("inf")
    burstiness: Annotated[
        float,
        typer.Option("--burstiness", help="1 is a Poisson process, less is burstier, inf is even."),
    ] = 1.0
    ramp_up_strategy: Annotated[
        str | None,
        typer.Option("--ramp-up-strategy", help="linear or exponential, in place of one rate."),
    ] = None
    ramp_up_start_rps: Annotated[
        float | None, typer.Option("--ramp-up-start-rps", help="The first rate of a ramp.")
    ] = None
    ramp_up_end_rps: Annotated[
        float | None, typer.Option("--ramp-up-end-rps", help="The last rate of a ramp.")
    ] = None
    dataset_name: Annotated[str, typer.Option("--dataset-name", help=f"{', '.join(DATASETS)}.")] = (
        "random"
    )
    dataset_path: Annotated[
        Path | None,
        typer.Option(
            "--dataset-path",
            help="sharegpt: its JSON file, else random tokens of such lengths; custom: JSON lines"
            " with a prompt and output_tokens each.",
        ),
    ] = None
    disable_shuffle: Annotated[
        bool, typer.Option("--disable-shuffle", help="Keep the data set's own order.")
    ] = False
    random_input_len: Annotated[
        int, typer.Option("--random-input-len", help="Tokens of a random prompt.")
    ] = 1024
    random_output_len: Annotated[
        int, typer.Option("--random-output-len", help="Tokens of the answer to it.")
    ] = 128
    random_range_ratio: Annotated[
        float,
        typer.Option("--random-range-ratio", help="Both vary by this share up and down."),
    ] = 0.0
    random_prefix_len: Annotated[
        int, typer.Option("--random-prefix-len", help="Tokens before, which all prompts share.")
    ] = 0
    prefix_repetition_prefix_len: Annotated[
        int, typer.Option("--prefix-repetition-prefix-len", help="Tokens of each shared prefix.")
    ] = 256
    prefix_repetition_suffix_len: Annotated[
        int, typer.Option("--prefix-repetition-suffix-len", help="Tokens behind it.")
    ] = 256
    prefix_repetition_num_prefixes: Annotated[
        int, typer.Option("--prefix-repetition-num-prefixes", help="Shared prefixes.")
    ] = 10
    prefix_repetition_output_len: Annotated[
        int, typer.Option("--prefix-repetition-output-len", help="Tokens of an answer.")
    ] = 128
    sharegpt_output_len: Annotated[
        int | None,
        typer.Option(
            "--sharegpt-output-len", help="Tokens of an answer.", show_default="the data set's"
        ),
    ] = None
    custom_output_len: Annotated[
        int | None,
        typer.Option(
            "--custom-output-len",
            help="Tokens of an answer.",
            show_default="each line's output_tokens, or 256",
        ),
    ] = None
    ignore_eos: Annotated[
        bool | None,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Go on past the end of text.",
            show_default="where prompts are random",
        ),
    ] = None
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0
    seed: Annotated[int, typer.Option("--seed", help="Of prompts and arrivals.")] = 0
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            "--goodput",
            help="Milliseconds that a good request may take, as 'ttft:500 tpot:50'; also e2el.",
        ),
    ] = None
    percentile_metrics: Annotated[
        str, typer.Option("--percentile-metrics", help="Latencies to report, with commas.")
    ] = ",".join(METRICS)
    metric_percentiles: Annotated[
        str, typer.Option("--metric-percentiles", help="Percentiles of them, with commas.")
    ] = "50,95,99"
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="Every request's figures and texts in --json.")
    ] = False
    max_model_len: options.MaxModelLen = None
    max_num_seqs: Annotated[
        int | None, typer.Option("--max-num-seqs", help="Most rows of the server that is started.")
    ] = None
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option("--max-num-batched-tokens", help="Most tokens of a step of that server."),
    ] = None

    def workload(self) -> Workload:
        """The requests that these ask for."""
        given: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(Workload)}
        given |= {
            "dataset_path": None if self.dataset_path is None else str(self.dataset_path),
            "goodput": read_goodput(self.goodput),
            "percentile_metrics": _split(self.percentile_metrics),
            "metric_percentiles": [_percentile(each) for each in _split(self.metric_percentiles)],
        }
        return Workload(**given)

    def of_our_server(self) -> list[str]:
        """What `parallama serve` is told besides."""
        told = {
            "--max-model-len": self.max_model_len,
            "--max-num-seqs": self.max_num_seqs,
            "--max-num-batched-tokens": self.max_num_batched_tokens,
        }
        return [
            word
            for option, number in told.items()
            if number is not None
            for word in (option, str(number))
        ]


class BenchCommand(ModelCommand):
    """Takes several limits behind one `--goodput`, as `vllm bench serve` does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        for word in args:
            many = len(spread) > 1 and spread[-2] == "--goodput"
            spread += ["--goodput", word] if many and _is_limit(word) else [word]
        return super().parse_args(ctx, spread)


NAMES = {each.name for each in fields(ServeOptions)}


def serve(
    context: typer.Context,
    target: str,
    asked: ServeOptions,
    own: OwnServer,
    *,
    command: str,
    picture: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure a server, and print what was measured."""
    if is_address(target):
        refuse(context, _OF_OUR_SERVER, "was given with a server's address", "it runs already")
    workload = asked.workload()
    from ..bench import plot, serve_plot, serve_run, serve_view

    if picture is not None:
        plot.check_target(picture)
    with progress_bars(quiet) as watch:
        report = serve_run.run(
            target,
            workload,
            own,
            command=_without_key(command, asked.api_key),
            peers=asked.peer or (),
            model=asked.served_model_name,
            tokenizer=asked.tokenizer,
            api_key=asked.api_key,
            say=(lambda _what: None) if quiet else output.say,
            watch=watch,
        )
    if as_json:
        output.print_json(report.to_dict(), readable=True)
    else:
        from rich.console import Console

        serve_view.render(report, Console())
    if picture is not None:
        serve_plot.plot(report, picture)


def _is_limit(word: str) -> bool:
    return word.partition(":")[0] in LIMITED and ":" in word


def _without_key(command: str, key: str | None) -> str:
    """A command line for a report, which must not show a key."""
    return command if not key else command.replace(key, "...")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _percentile(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            lines(f"--metric-percentiles has {text!r}", "expected numbers with commas, as 50,99")
        ) from None
