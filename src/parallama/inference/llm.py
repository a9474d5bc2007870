"""A model on a mesh: continue prompts, stream, score."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import UsageError, lines
from ..files.checkpoint import Checkpoint
from ..model.config_checks import eos_ids
from ..plan.overrides import Overrides
from ..sharded.device_weights import DeviceWeights
from ..sharded.stream import StreamStats
from .completion import Chunk, Completion, Row
from .messages import Message, checked, is_conversation
from .prompts import Prompt, Prompts, list_of, members
from .requests import Asked, Request, params_of, requests_of
from .run_stats import RunStats
from .sampling_defaults import with_defaults
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .sharded_model import Progress, ShardedModel
from .slot_pool import SlotPool
from .slot_runner import SlotRunner
from .slot_shapes import SlotShapes
from .text_logits import text_logits
from .token_rules import TokenRules


class LLM(ShardedModel):
    """A model on a mesh. Made by `load`.

    Several threads may use one: a step of each has the devices alone.

    Attributes:
        tokenizer: of transformers, or None.
        max_model_len: most tokens of prompt and answer together.
        adapter: that was merged into the weights, if it was given by itself.
        eos_ids: ids that end a text.
        rules: what parameters mean in the model's tokens.
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
        max_num_seqs: int,
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
        self.rules = TokenRules(tokenizer, self.eos_ids, self.plan.model.vocab)
        self._runs = threading.local()
        self._slots = SlotPool(self.slot_session, max_model_len=max_model_len, slots=max_num_seqs)

    def __repr__(self) -> str:
        return f"LLM({self.name!r}, mesh={self.mesh.shape})"

    @property
    def stats(self) -> RunStats:
        """Of this thread's last run."""
        found: RunStats | None = getattr(self._runs, "stats", None)
        return RunStats() if found is None else found

    # -- what a run is made of

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; see `prompts.Prompts.encode`."""
        return self._prompts.encode(prompt)

    def render_chat(self, messages: Sequence[Message], **how: Any) -> list[int]:
        """Token ids of a conversation; see `prompts.Prompts.render_chat`."""
        return self._prompts.render_chat(messages, **how)

    def requests(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        params: Sequence[SamplingParams],
        *,
        answers: Collection[int] = (),
    ) -> list[Request]:
        """What `run` takes; see `requests.requests_of`.

        Args:
            answers: places of prompts that are conversations.
        """
        return requests_of(
            prompts,
            params,
            generation=self._generation,
            rules=self.rules,
            answers=answers,
            of_chat=self.chat_ends() if answers else (),
            max_model_len=self.max_model_len,
            max_positions=self.plan.model.max_positions,
        )

    def chat_ends(self) -> frozenset[int]:
        """See `prompts.Prompts.chat_ends`."""
        return self._prompts.chat_ends()

    def request(
        self,
        ids: list[int],
        params: SamplingParams,
        seed: int,
        limit: int,
        *,
        answers: bool = False,
    ) -> Request:
        """One request by itself; what is not given is the generation config's to say.

        Args:
            seed: the row's; see `seeds.row_seed`.
            limit: most new tokens.
            answers: it answers a conversation.
        """
        sampling = with_defaults(self._generation, params.sampler(), seed)
        ends, choosing = self.rules.read(params, self.chat_ends() if answers else ())
        return Request(
            prompt=None,
            ids=ids,
            index=0,
            params=params,
            choosing=replace(choosing, sampling=sampling),
            limit=limit,
            ends=ends,
        )

    # -- running

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Asked = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Continue prompts, so many at a time as `load` was told.

        Args:
            prompts: a text, a list of token ids, or a list of either; also `{"prompt": ...}` and
                `{"prompt_token_ids": ...}`.
            sampling_params: how; one for all, or one for each prompt.
            **sampling: the same by name: see `SamplingParams`. A prompt's text depends on nothing
                but the prompt, these, and how many equal prompts came before it.

        Returns:
            `n` completions of each prompt, in the order of the prompts.

        Raises:
            UsageError: a prompt is empty or too long, or an id or a parameter is out of its range.
        """
        batch = list_of(prompts)
        params = params_of(sampling_params, sampling, len(batch))
        encoded = [self._prompts.encoded(prompt) for prompt in batch]
        return self.completed(self.requests(encoded, params))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Asked = None,
        *,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Answer conversations, so many at a time as `load` was told.

        Args:
            messages: one conversation, as `[{"role": "user", "content": "..."}]`, or a list of
                them. Roles are the chat template's: `system`, `user`, `assistant` ...
            continue_final_message: go on with the last message, in place of a new answer.
            chat_template_kwargs: variables for the template, as `{"enable_thinking": False}`.
            sampling_params, sampling: as for `generate`.

        Returns:
            `n` answers to each conversation, in their order.

        Raises:
            UsageError: the template refuses a conversation, or as for `generate`.
        """
        many = isinstance(messages, (list, tuple)) and not is_conversation(messages)
        conversations: list[Any] = list(messages) if many else [messages]
        params = params_of(sampling_params, sampling, len(conversations))
        how = {
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": chat_template_kwargs,
        }
        encoded: list[tuple[str | None, list[int]]] = [
            (None, self.render_chat(checked(each), **how)) for each in conversations
        ]
        if not encoded:
            raise UsageError(lines("there are no conversations", "expected at least one"))
        return self.completed(self.requests(encoded, params, answers=range(len(encoded))))

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """Continue one prompt, token by token.

        Arguments are those of `generate`. Bad ones raise at once, not at the first token.
        """
        params = params_of(sampling_params, sampling, 1)
        if params[0].n != 1:
            raise UsageError(lines(f"n is {params[0].n}", "a stream is one text: expected 1"))
        requests = self.requests([self._prompts.encoded(prompt)], params)
        return (chunk for _, chunk, _ in self.chunks(requests))

    def completed(self, requests: Sequence[Request]) -> list[Completion]:
        """The completion of each request."""
        found = dict(self.run(requests))
        return [found[place] for place in range(len(requests))]

    def run(
        self, requests: Sequence[Request], *, max_num_seqs: int | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """Each request's place in the list with its completion, as they end.

        Args:
            requests: from `requests`.
            max_num_seqs: most of them at a time; as `load` was told if None.
        """
        for place, chunk, row in self.chunks(requests, max_num_seqs=max_num_seqs):
            if chunk.finish_reason is not None:
                yield place, row.completion(requests[place])

    def chunks(
        self, requests: Sequence[Request], *, max_num_seqs: int | None = None
    ) -> Iterator[tuple[int, Chunk, Row]]:
        """Each token of each request, with its place in the list and its row, as they come.

        Arguments are those of `run`.
        """
        return self.continued(requests, [self.row(each) for each in requests], max_num_seqs)

    def row(self, request: Request) -> Row:
        """A row of a batch that has not begun."""
        return Row.of(request, self.tokenizer)

    def continued(
        self, requests: Sequence[Request], rows: Sequence[Row], max_num_seqs: int | None
    ) -> Iterator[tuple[int, Chunk, Row]]:
        """Run requests on slots, which others take over as texts end."""
        if not requests:
            return
        runner = self._slots.take(
            requests,
            shards=self.mesh.shape.data,
            max_num_seqs=max_num_seqs,
            progress=self.report("compiling"),
        )
        for place, request in enumerate(requests):
            runner.add(place, request.ids, request.choosing)
        try:
            yield from self.driven(runner, rows)
        finally:
            for place in range(len(requests)):
                runner.end(place)
            self._slots.give_back(runner)

    def alone(self, positions: int) -> SlotRunner:
        """A runner for one request after the other, each going on from what the last one left.

        Args:
            positions: most tokens of a request.
        """
        shapes = SlotShapes.of(slots=1, positions=positions, shards=self.mesh.shape.data)
        session = self.slot_session(shapes)
        session.prepare(shapes.complete(scored=False), self.report("compiling"))
        caching = not self.steps.follows_span
        return SlotRunner(session, Scheduler(session, prefix_caching=caching, copying=False))

    def driven(self, runner: SlotRunner, rows: Sequence[Row]) -> Iterator[tuple[int, Chunk, Row]]:
        """Run the requests of a runner, named by their rows' places, until all have ended."""
        stats = self._runs.stats = runner.session.stats
        began = time.perf_counter()
        left = len(rows)
        while left:
            for place, choice in runner.round():
                row = rows[place]
                stats.ttft_s = stats.ttft_s or time.perf_counter() - began
                speed = stats.decode_steps / stats.decode_s if stats.decode_s else 0.0
                chunk = row.take(choice, speed)
                if chunk.finish_reason is not None:
                    left -= 1
                    runner.end(place)
                yield place, chunk, row
        self.kv_bytes_per_device = runner.session.cache_bytes_per_device()

    def forget(self) -> None:
        """Free what is kept on the devices for later runs, as the cache of the last one."""
        self._slots.clear()

    def logits(self, ids: Sequence[int] | Sequence[Sequence[int]] | torch.Tensor) -> torch.Tensor:
        """Logits of every position of one sequence (or several of one length), computed at once.

        Returns:
            fp32 on the host, `[S, V]` for one sequence and `[B, S, V]` for several.

        Raises:
            UsageError: there are no tokens, an id is out of range, or the sequences are of unequal
                length or over the limit.
        """
        given: Any = ids
        listed: list[Any] = list_of(given)
        many = listed != [members(ids)]
        batch = [self.encode(row) for row in listed]
        whole, self._runs.stats = text_logits(self, batch, self.max_model_len)
        return whole if many else whole[0]
