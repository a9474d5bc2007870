"""What a benchmark of servers is told. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import UsageError, lines
from ..remote_server import CHAT, COMPLETIONS

DATASETS = ("random", "prefix_repetition", "sharegpt", "custom")
FROM_FILES = ("sharegpt", "custom")
"""Data sets that a file may have, or has to."""
METRICS = ("ttft", "tpot", "itl", "e2el")
LIMITED = ("ttft", "tpot", "e2el")
"""Metrics that a request has one of, so that goodput may limit them."""
STRATEGIES = ("linear", "exponential")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The requests: how many, how long, and when; names are those of `vllm bench serve`.

    Attributes:
        endpoint: `/v1/completions` or `/v1/chat/completions`.
        num_warmups: requests of their own that come first and are not measured.
        max_concurrency: most requests at a time.
        request_rate: requests a second; infinite is all at once.
        burstiness: 1 is a Poisson process, less is burstier, more is more even.
        dataset_path: a ShareGPT JSON file, in place of lengths like ShareGPT's; or for `custom` a
            file of JSON lines with a `prompt` each.
        disable_shuffle: requests come in the data set's own order.
        custom_output_len: tokens of an answer, in place of each line's `output_tokens`.
        ignore_eos: go on past the end of text; if None, where prompts are made up.
        goodput: most milliseconds of a metric, by name, for a request to be good.
    """

    endpoint: str = COMPLETIONS
    num_prompts: int = 100
    num_warmups: int = 0
    max_concurrency: int | None = None
    request_rate: float = math.inf
    burstiness: float = 1.0
    ramp_up_strategy: str | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None
    dataset_name: str = "random"
    dataset_path: str | None = None
    disable_shuffle: bool = False
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    prefix_repetition_prefix_len: int = 256
    prefix_repetition_suffix_len: int = 256
    prefix_repetition_num_prefixes: int = 10
    prefix_repetition_output_len: int = 128
    sharegpt_output_len: int | None = None
    custom_output_len: int | None = None
    ignore_eos: bool | None = None
    temperature: float = 0.0
    seed: int = 0
    goodput: Mapping[str, float] = field(default_factory=dict)
    percentile_metrics: Sequence[str] = METRICS
    metric_percentiles: Sequence[float] = (50, 95, 99)
    save_detailed: bool = False

    def __post_init__(self) -> None:
        _one_of("--endpoint", self.endpoint, (COMPLETIONS, CHAT))
        _one_of("--dataset-name", self.dataset_name, DATASETS)
        for name in ("num_prompts", "random_input_len", "random_output_len"):
            self._check(name, 1)
        for name in ("num_warmups", "random_prefix_len", "prefix_repetition_prefix_len", "seed"):
            self._check(name, 0)
        for name in (
            *("max_concurrency", "prefix_repetition_suffix_len", "prefix_repetition_num_prefixes"),
            *("prefix_repetition_output_len", "sharegpt_output_len"),
            "custom_output_len",
        ):
            self._check(name, 1)
        self._check("random_range_ratio", 0, below=1)
        self._check("temperature", 0)
        for name in ("request_rate", "burstiness"):
            if not getattr(self, name) > 0:
                raise UsageError(
                    lines(f"{_option(name)} is {getattr(self, name)}", "expected more than 0")
                )
        for name in self.percentile_metrics:
            _one_of("--percentile-metrics", name, METRICS)
        for percentile in self.metric_percentiles:
            if not 0 <= percentile <= 100:
                raise UsageError(
                    lines(f"--metric-percentiles has {percentile:g}", "expected 0 to 100")
                )
        if self.dataset_path is not None and self.dataset_name not in FROM_FILES:
            raise UsageError(
                lines(
                    f"--dataset-path was given with --dataset-name {self.dataset_name}",
                    f"expected {' or '.join(FROM_FILES)}, whose file it is",
                )
            )
        if self.dataset_path is None and self.dataset_name == "custom":
            raise UsageError(lines("--dataset-name custom has no --dataset-path", "expected both"))
        self._check_ramp()

    def _check(self, name: str, least: float, *, below: float = math.inf) -> None:
        number = getattr(self, name)
        if number is not None and not least <= number < below:
            most = "" if below == math.inf else f", and less than {below:g}"
            raise UsageError(
                lines(f"{_option(name)} is {number}", f"expected at least {least:g}{most}")
            )

    def _check_ramp(self) -> None:
        start, end = self.ramp_up_start_rps, self.ramp_up_end_rps
        if self.ramp_up_strategy is None:
            if start is not None or end is not None:
                raise UsageError(
                    lines(
                        "--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy",
                        f"expected {' or '.join(STRATEGIES)}",
                    )
                )
            return
        _one_of("--ramp-up-strategy", self.ramp_up_strategy, STRATEGIES)
        if self.request_rate != math.inf:
            raise UsageError(
                lines("--request-rate was given with --ramp-up-strategy", "expected one of them")
            )
        if start is None or end is None or not 0 < start <= end < math.inf:
            raise UsageError(
                lines(
                    f"--ramp-up-start-rps is {start}, --ramp-up-end-rps {end}",
                    "expected two rates, the first above 0 and not above the second",
                )
            )

    @property
    def made_up(self) -> bool:
        """Whether prompts are random tokens, in which no text ends by itself."""
        return self.dataset_path is None

    @property
    def goes_past_eos(self) -> bool:
        """What `ignore_eos` comes to."""
        return self.made_up if self.ignore_eos is None else self.ignore_eos


@dataclass(frozen=True, kw_only=True)
class OwnServer:
    """How a server is started for a model: by the options of `parallama serve`.

    Attributes:
        threads: cores that a server may use; all if None.
    """

    mesh: str = "1x1"
    dtype: str = "float32"
    backend: str = "cpu"
    backend_option: Sequence[str] = ()
    allow_nonfinite: bool = False
    threads: int | None = None
    more: Sequence[str] = ()

    def arguments(self) -> list[str]:
        """For `parallama serve MODEL`."""
        told = ["--mesh", self.mesh, "--dtype", self.dtype, "--backend", self.backend]
        for option in self.backend_option:
            told += ["--backend-option", option]
        return [*told, *(["--allow-nonfinite"] if self.allow_nonfinite else []), *self.more]


def read_goodput(given: Sequence[str] | None) -> dict[str, float]:
    """Limits in milliseconds by metric, of `ttft:500 tpot:50`.

    Raises:
        UsageError: one cannot be read.
    """
    found: dict[str, float] = {}
    for each in " ".join(given or []).split():
        name, _, limit = each.partition(":")
        try:
            found[name] = float(limit)
        except ValueError:
            found[name] = math.nan
        if name not in LIMITED or not found[name] >= 0:
            raise UsageError(
                lines(
                    f"--goodput {each} cannot be read",
                    f"expected milliseconds of {', '.join(LIMITED)}, as ttft:500",
                )
            )
    return found


def named(values: Sequence[float]) -> dict[str, float]:
    """Percentiles by the names that they have in keys: `p99`, `p99.9`."""
    return {f"p{value:g}": value for value in values}


def _one_of(option: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise UsageError(lines(f"{option} {given!r} is unknown", f"expected {' or '.join(known)}"))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
