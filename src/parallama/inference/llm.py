"""A model on a mesh: continue prompts, stream, score."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from ..engine.sampling_params import SamplingParams
from ..engine.steps import LOGITS_AXES, StepKey
from ..errors import UsageError, lines, shown
from ..files.checkpoint import Checkpoint
from ..model.config_checks import eos_ids
from ..plan.overrides import Overrides
from ..plan.program_shapes import CHUNK, chunk_size
from ..sharded.device_weights import DeviceWeights
from ..sharded.stream import StreamStats
from . import state
from .completion import Chunk, Completion, Row
from .prompts import Prompts
from .run_stats import RunStats
from .sampling_defaults import with_defaults
from .session import Session
from .sharded_model import Progress, ShardedModel
from .text_stream import TextStream

DEFAULT_NEW_TOKENS = 256


class LLM(ShardedModel):
    """A model on a mesh. Made by `load`.

    Several threads may use one: a step of each has the devices alone.

    Attributes:
        tokenizer: of transformers, or None.
        max_model_len: most tokens of prompt and answer together.
        adapter: that was merged into the weights, if it was given by itself.
        eos_ids: ids that end a text.
        ignored: tensors and files of the checkpoint that were not read -> why.
        load_stats: what reading the checkpoint took.
    """

    def __init__(
        self,
        *,
        name: str,
        skeleton: Any,
        weights: DeviceWeights,
        dtype: torch.dtype,
        tokenizer: Any | None,
        generation: Mapping[str, Any],
        max_model_len: int,
        ignored: Mapping[str, str] | None = None,
        load_s: float,
        load_stats: StreamStats,
        overrides: Overrides | None = None,
        source: Checkpoint,
        adapter: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(
            skeleton, weights, dtype, overrides=overrides, source=source, progress=progress
        )
        self.name, self.adapter = name, adapter
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.ignored: Mapping[str, str] = ignored or {}
        self.load_s = load_s
        self.load_stats = load_stats
        self.kv_bytes_per_device: list[int] = [0] * self.mesh.shape.devices
        self.eos_ids = eos_ids(generation.get("eos_token_id"), tokenizer, self.plan.model.vocab)
        self._generation = generation
        self._prompts = Prompts(name, tokenizer, self.plan.model.vocab)
        self._runs = threading.local()

    def __repr__(self) -> str:
        return f"LLM({self.name!r}, mesh={self.mesh.shape})"

    @property
    def stats(self) -> RunStats:
        """Of this thread's last run."""
        found: RunStats | None = getattr(self._runs, "stats", None)
        return RunStats() if found is None else found

    # -- what a run is made of

    def sampling_params(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = 0,
    ) -> SamplingParams:
        """Sampling parameters; see `sampling_defaults.with_defaults`."""
        given = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        }
        return with_defaults(self._generation, given, seed)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; see `prompts.Prompts.encode`."""
        return self._prompts.encode(prompt)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for an answer; see `prompts.Prompts.render_chat`."""
        return self._prompts.render_chat(messages)

    def _limit(self, longest: int, max_new_tokens: int | None) -> int:
        """New tokens that fit behind the longest prompt."""
        room = self.max_model_len - longest
        if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
            raise UsageError(
                lines(
                    f"max_new_tokens is {max_new_tokens!r}", "expected a whole number of at least 1"
                )
            )
        if room < 1 or (max_new_tokens is not None and max_new_tokens > room):
            limit, most = self.max_model_len, self.plan.model.max_positions
            wanted = f" and {max_new_tokens} new ones" if max_new_tokens is not None else ""
            raise UsageError(
                lines(
                    f"a prompt of {longest} tokens{wanted} is over the limit of {limit}",
                    f"expected at most {limit} together (the model's maximum is {most})",
                )
            )
        return min(DEFAULT_NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens

    # -- running

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> list[Completion]:
        """Continue prompts, all in one batch.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            max_new_tokens: most new tokens a prompt; if None 256, or what the model's maximum
                leaves.
            stop: strings that end a text.
            ignore_eos: go on past the end-of-text token.
            **sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed; see
                `sampling_params`. Every row draws with the same seed, so a prompt's text doesn't
                depend on its neighbours.

        Returns:
            One completion a prompt, in their order.

        Raises:
            UsageError: a prompt is empty or too long, or an id or an option is out of its range.
        """
        if not isinstance(prompts, Sequence):
            raise UsageError(
                lines(
                    f"prompts is {shown(prompts)}",
                    "expected a text, a list of token ids, or a list of either",
                )
            )
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        batch: list[Any] = [prompts] if one else list(prompts)
        if not batch:
            raise UsageError(lines("there are no prompts", "expected at least one"))
        encoded = [self.encode(prompt) for prompt in batch]
        rows = self._rows(encoded, max_new_tokens, stop)
        for _ in self._run(encoded, rows, self.sampling_params(**sampling), ignore_eos):
            pass
        return [
            row.completion(prompt if isinstance(prompt, str) else None, ids)
            for prompt, ids, row in zip(batch, encoded, rows, strict=True)
        ]

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """Continue one prompt, token by token.

        Arguments are those of `generate`. Bad ones raise at once, not at the first token.
        """
        encoded = [self.encode(prompt)]
        rows = self._rows(encoded, max_new_tokens, stop)
        params = self.sampling_params(**sampling)
        return (chunk for _, chunk in self._run(encoded, rows, params, ignore_eos))

    def _rows(
        self,
        encoded: Sequence[Sequence[int]],
        max_new_tokens: int | None,
        stop: str | Sequence[str],
    ) -> list[Row]:
        limit = self._limit(max(len(ids) for ids in encoded), max_new_tokens)
        stops = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(string, str) and string for string in stops):
            raise UsageError(lines(f"stop is {stop!r}", "expected strings that aren't empty"))
        if stops and self.tokenizer is None:
            raise UsageError(
                lines(f"model {self.name!r} has no tokenizer", "stop strings need one")
            )
        return [Row(TextStream(self.tokenizer, stops), limit) for _ in encoded]

    def _run(
        self, encoded: list[list[int]], rows: list[Row], params: SamplingParams, ignore_eos: bool
    ) -> Iterator[tuple[int, Chunk]]:
        longest = max(len(ids) for ids in encoded)
        limit = max(row.limit for row in rows)
        session = self.session(
            [params] * len(encoded),
            capacity=longest + limit,
            longest_prompt=longest,
            eos=[] if ignore_eos else self.eos_ids,
        )
        yield from self.drive(session, encoded, rows, ignore_eos)

    def drive(
        self, session: Session, encoded: list[list[int]], rows: list[Row], ignore_eos: bool
    ) -> Iterator[tuple[int, Chunk]]:
        """Run a session until every row has ended."""
        self._runs.stats = session.stats
        eos = set() if ignore_eos else set(self.eos_ids)
        decode_s, decode_steps = session.stats.decode_s, session.stats.decode_steps
        first = session.prefill(encoded)
        for choices in chain([first], session.decode(max(row.limit for row in rows) - 1)):
            seconds = session.stats.decode_s - decode_s
            speed = (session.stats.decode_steps - decode_steps) / seconds if seconds else 0.0
            for choice in choices:
                if rows[choice.row].finish_reason is None:
                    yield choice.row, rows[choice.row].take(choice, eos, speed)
            if all(row.finish_reason is not None for row in rows):
                break
        self.kv_bytes_per_device = session.cache_bytes_per_device()

    def logits(self, ids: Sequence[int] | Sequence[Sequence[int]] | torch.Tensor) -> torch.Tensor:
        """Logits of every position of one sequence (or several of one length), computed at once.

        Returns:
            fp32 on the host, `[S, V]` for one sequence and `[B, S, V]` for several.

        Raises:
            UsageError: there are no tokens, an id is out of range, or the sequences are of unequal
                length or over the limit.
        """
        listed: list[Any] = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        many = bool(listed) and not isinstance(listed[0], int)
        batch = [self.encode(row) for row in (listed if many else [listed])]
        length = len(batch[0])
        if any(len(row) != length for row in batch):
            raise UsageError(
                lines(
                    "the sequences have different lengths",
                    "expected one length, or a call for each",
                )
            )
        if length > self.max_model_len:
            raise UsageError(
                lines(
                    f"a sequence of {length} tokens is over the limit of {self.max_model_len}",
                    f"expected at most {self.max_model_len}",
                )
            )
        rows = -(-len(batch) // self.mesh.shape.data) * self.mesh.shape.data
        size = chunk_size(length) if length <= CHUNK else -(-length // CHUNK) * CHUNK
        padded = torch.zeros(rows, size, dtype=torch.long)
        padded[: len(batch), :length] = torch.tensor(batch)
        arguments = state.text_arguments(self.steps, padded, None, longest=length)
        key = StepKey(kind="logits", batch=rows, length=0, new=size, fresh=True)
        with self.mesh.counted() as compiled:
            self.programs.warm_up([key], self.report("compiling"))
            self._runs.stats = RunStats(programs_compiled=compiled())
            out = self.programs[key](arguments)["logits"]
        whole = self.mesh.fetch(out, LOGITS_AXES)[: len(batch), :length, : self.plan.model.vocab]
        return whole if many else whole[0]
