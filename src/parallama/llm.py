"""A model on a mesh: continue prompts, stream, score."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import torch

from .buckets import CHUNK, chunk_size
from .chat_template import Renderer, renderer_of
from .checkpoint import Checkpoint
from .config_checks import end_ids
from .errors import UsageError, lines, shown
from .export import Exported, export_weights, resolve, stored_dtypes
from .generate import RunStats, Session, make_programs, text_arguments
from .loading import make_skeleton
from .mesh import DeviceMesh
from .plan import Overrides, Plan, make_plan, read_overrides
from .program import compiled_programs
from .reshard import Mover, Resharding, another_mesh
from .sampling import SamplingParams
from .shard import DeviceWeights, Layout, check_ids
from .steps import StepKey, Steps
from .stream import StreamStats
from .text import TextStream
from .topology import DATA, MODEL, MeshShape
from .weight_writer import SHARD_BYTES

DEFAULT_NEW_TOKENS = 256
FinishReason = Literal["stop", "length"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and of how much."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a prompt led to.

    Attributes:
        prompt: the prompt's text, or None if it was given as token ids.
        prompt_ids: its tokens.
        text: the new text, without special tokens and without a stop string.
        token_ids: the new tokens, the end-of-text one included.
        logprobs: log-probability of each under the model's own distribution.
        finish_reason: `stop` (end-of-text token or stop string) or `length`.
    """

    prompt: str | None
    prompt_ids: list[int]
    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One token of a stream.

    Attributes:
        text: text that is certain now; may be empty.
        token: the token's id.
        logprob: its log-probability.
        finish_reason: None until the last chunk.
        tokens_per_s: of decoding so far; 0 at the first token.
    """

    text: str
    token: int
    logprob: float
    finish_reason: FinishReason | None
    tokens_per_s: float


@dataclass
class Row:
    """A row of a running batch, as the host sees it."""

    stream: TextStream
    limit: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None


class LLM:
    """A model on a mesh. Made by `load`.

    Attributes:
        plan: where every tensor lies, and why.
        mesh: the devices.
        tokenizer: of transformers, or None.
        max_model_len: most tokens of prompt and answer together.
        eos_ids: ids that end a text.
        ignored: tensors and files of the checkpoint that were not read -> why.
        load_stats: what reading the checkpoint took.
        source: the checkpoint.
        stats: of the last run.
    """

    def __init__(
        self,
        *,
        name: str,
        steps: Steps,
        tokenizer: Any | None,
        generation: Mapping[str, Any],
        max_model_len: int,
        ignored: Mapping[str, str] | None = None,
        load_s: float,
        load_stats: StreamStats,
        overrides: Overrides | None = None,
        source: Checkpoint,
        progress: Progress | None = None,
    ) -> None:
        self.name = name
        self.steps = steps
        self.plan: Plan = steps.plan
        self.mesh: DeviceMesh = steps.mesh
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.ignored: Mapping[str, str] = ignored or {}
        self.load_s = load_s
        self.load_stats = load_stats
        self.source = source
        self.stats = RunStats()
        self.kv_bytes_per_device: list[int] = [0] * self.mesh.shape.devices
        self.eos_ids = eos_ids(generation.get("eos_token_id"), tokenizer, steps.plan.model.vocab)
        self._generation = generation
        self._progress = progress
        self._renderer: Renderer | None = None
        self.programs = make_programs(steps)
        self._overrides = overrides
        self._sessions: WeakSet[Session] = WeakSet()

    def __repr__(self) -> str:
        return f"LLM({self.name!r}, mesh={self.mesh.shape})"

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
        """Sampling parameters, with what is None from the model's generation config; a seed of None is drawn at random."""
        own = self._generation
        # transformers' meaning of a generation config: greedy unless it says do_sample, and then with these defaults.
        sampled = bool(own.get("do_sample", False))
        defaults = {
            "temperature": 1.0 if sampled else 0.0,
            "top_k": 50 if sampled else 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        if not sampled:
            own = {name: own[name] for name in ("repetition_penalty",) if name in own}

        def pick(name: str, given: Any) -> Any:
            return given if given is not None else defaults[name] if own.get(name) is None else own[name]

        return SamplingParams(
            temperature=pick("temperature", temperature),
            top_k=pick("top_k", top_k),
            top_p=pick("top_p", top_p),
            min_p=pick("min_p", min_p),
            repetition_penalty=pick("repetition_penalty", repetition_penalty),
            seed=secrets.randbits(64) if seed is None else seed,
        )

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; ids are checked and passed through.

        Raises:
            UsageError: the prompt is empty, an id is out of range, or there is no tokenizer for a text.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise UsageError(lines("the prompt is empty", "expected some text"))
            if self.tokenizer is None:
                raise UsageError(lines(f"model {self.name!r} has no tokenizer", "give the prompt as token ids"))
            ids = list(self.tokenizer(prompt)["input_ids"])
        else:
            ids = list(prompt) if isinstance(prompt, Sequence) else [prompt]
            if not isinstance(prompt, Sequence) or not all(type(token) is int for token in ids):
                raise UsageError(lines(f"the prompt {shown(prompt)} is neither text nor a list of token ids"))
        if not ids:
            raise UsageError(lines("the prompt has no tokens", "expected at least one"))
        check_ids(ids, self.plan.model.vocab)
        return ids

    def _limit(self, longest: int, max_new_tokens: int | None) -> int:
        """New tokens that fit behind the longest prompt."""
        room = self.max_model_len - longest
        if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
            raise UsageError(lines(f"max_new_tokens is {max_new_tokens!r}", "expected a whole number of at least 1"))
        if room < 1 or (max_new_tokens is not None and max_new_tokens > room):
            wanted = f" and {max_new_tokens} new ones" if max_new_tokens is not None else ""
            raise UsageError(
                lines(
                    f"a prompt of {longest} tokens{wanted} is over the limit of {self.max_model_len}",
                    f"expected at most {self.max_model_len} together (the model's maximum is {self.plan.model.max_positions})",
                )
            )
        return min(DEFAULT_NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens

    def report(self, what: str) -> Callable[[int, int], None] | None:
        if self._progress is None:
            return None
        progress = self._progress
        return lambda done, total: progress(what, done, total)

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
            max_new_tokens: most new tokens a prompt; 256, or what the model's maximum leaves, if None.
            stop: strings that end a text.
            ignore_eos: go on past the end-of-text token.
            **sampling: see `sampling_params`: temperature, top_k, top_p, min_p, repetition_penalty, seed. Every row draws with the same seed, so
                a prompt's text doesn't depend on its neighbours.

        Returns:
            One completion a prompt, in their order.

        Raises:
            UsageError: a prompt is empty or too long, an id out of range, an option out of its range.
        """
        if not isinstance(prompts, Sequence):
            raise UsageError(lines(f"prompts is {shown(prompts)}", "expected a text, a list of token ids, or a list of either"))
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        batch: list[Any] = [prompts] if one else list(prompts)
        if not batch:
            raise UsageError(lines("there are no prompts", "expected at least one"))
        encoded = [self.encode(prompt) for prompt in batch]
        rows = self._rows(encoded, max_new_tokens, stop)
        for _ in self._run(encoded, rows, self.sampling_params(**sampling), ignore_eos):
            pass
        return [
            Completion(
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_ids=ids,
                text=row.text,
                token_ids=row.token_ids,
                logprobs=row.logprobs,
                finish_reason=row.finish_reason or "length",
            )
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
        """Continue one prompt, token by token; arguments as for `generate`. Bad ones raise at once, not at the first token."""
        encoded = [self.encode(prompt)]
        rows = self._rows(encoded, max_new_tokens, stop)
        params = self.sampling_params(**sampling)
        return (chunk for _, chunk in self._run(encoded, rows, params, ignore_eos))

    def _rows(self, encoded: Sequence[Sequence[int]], max_new_tokens: int | None, stop: str | Sequence[str]) -> list[Row]:
        limit = self._limit(max(len(ids) for ids in encoded), max_new_tokens)
        stops = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(string, str) and string for string in stops):
            raise UsageError(lines(f"stop is {stop!r}", "expected strings that aren't empty"))
        if stops and self.tokenizer is None:
            raise UsageError(lines(f"model {self.name!r} has no tokenizer", "stop strings need one"))
        return [Row(TextStream(self.tokenizer, stops), limit) for _ in encoded]

    def _run(self, encoded: list[list[int]], rows: list[Row], params: SamplingParams, ignore_eos: bool) -> Iterator[tuple[int, Chunk]]:
        longest = max(len(ids) for ids in encoded)
        limit = max(row.limit for row in rows)
        session = self.session(
            [params] * len(encoded),
            capacity=longest + limit,
            longest_prompt=longest,
            eos=[] if ignore_eos else self.eos_ids,
        )
        yield from self.drive(session, encoded, rows, ignore_eos)

    def session(self, rows: Sequence[SamplingParams], **options: Any) -> Session:
        """A session on this model, which moves with it in `reshard`; see `Session` for the options."""
        made = Session(self.steps, self.programs, rows, progress=self.report("compiling"), **options)
        self._sessions.add(made)
        return made

    def drive(self, session: Session, encoded: list[list[int]], rows: list[Row], ignore_eos: bool) -> Iterator[tuple[int, Chunk]]:
        """Run a session until every row has ended."""
        self.stats = session.stats
        eos = set() if ignore_eos else set(self.eos_ids)
        decode_s, decode_steps = session.stats.decode_s, session.stats.decode_steps
        first = session.prefill(encoded)
        for choices in chain([first], session.decode(max(row.limit for row in rows) - 1)):
            seconds = session.stats.decode_s - decode_s
            speed = (session.stats.decode_steps - decode_steps) / seconds if seconds else 0.0
            for choice in choices:
                row = rows[choice.row]
                if row.finish_reason is not None:
                    continue
                row.token_ids.append(choice.token)
                row.logprobs.append(choice.logprob)
                text = row.stream.push(choice.token)
                if choice.token in eos or row.stream.stopped:
                    row.finish_reason = "stop"
                elif len(row.token_ids) >= row.limit:
                    row.finish_reason = "length"
                if row.finish_reason is not None:
                    text += row.stream.finish()
                    if row.stream.stopped:
                        row.finish_reason = "stop"
                row.text += text
                yield (
                    choice.row,
                    Chunk(text=text, token=choice.token, logprob=choice.logprob, finish_reason=row.finish_reason, tokens_per_s=speed),
                )
            if all(row.finish_reason is not None for row in rows):
                break
        self.kv_bytes_per_device = session.cache_bytes_per_device()

    def logits(self, ids: Sequence[int] | Sequence[Sequence[int]] | torch.Tensor) -> torch.Tensor:
        """Logits of every position of one sequence (or several of one length), computed at once.

        Returns:
            fp32 on the host, `[S, V]` for one sequence and `[B, S, V]` for several.

        Raises:
            UsageError: no tokens, an id out of range, sequences of unequal length or over the limit.
        """
        listed: list[Any] = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        many = bool(listed) and not isinstance(listed[0], int)
        batch = [self.encode(row) for row in (listed if many else [listed])]
        length = len(batch[0])
        if any(len(row) != length for row in batch):
            raise UsageError(lines("the sequences have different lengths", "expected one length, or a call for each"))
        if length > self.max_model_len:
            raise UsageError(
                lines(f"a sequence of {length} tokens is over the limit of {self.max_model_len}", f"expected at most {self.max_model_len}")
            )
        rows = -(-len(batch) // self.mesh.shape.data) * self.mesh.shape.data
        size = chunk_size(length) if length <= CHUNK else -(-length // CHUNK) * CHUNK
        padded = torch.zeros(rows, size, dtype=torch.long)
        padded[: len(batch), :length] = torch.tensor(batch)
        arguments = text_arguments(self.steps, padded, None, longest=length)
        key = StepKey(kind="logits", batch=rows, length=0, new=size, fresh=True)
        before = compiled_programs()
        self.programs.warm_up([key], self.report("compiling"))
        self.stats.programs_compiled += compiled_programs() - before
        out = self.programs[key](arguments)["logits"]
        whole = self.mesh.fetch(out, (DATA, None, MODEL))[: len(batch), :length, : self.plan.model.vocab]
        return whole if many else whole[0]

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation by the model's chat template, ready for an answer.

        Raises:
            UsageError: there is no tokenizer or no chat template, or the template refuses the messages.
            CheckpointError: the template is broken, or takes too long.
        """
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(lines(f"model {self.name!r} has no chat template", "expected an instruction-tuned model, or a plain prompt"))
        if not messages:
            raise UsageError(lines("the conversation is empty", "expected at least one message"))
        if self._renderer is None:
            self._renderer = renderer_of(self.tokenizer, repr(self.name))
        # As apply_chat_template does: the template writes special tokens itself.
        ids = list(self.tokenizer(self._renderer.render(messages), add_special_tokens=False)["input_ids"])
        check_ids(ids, self.plan.model.vocab)
        return ids

    def reshard(
        self, mesh: str | MeshShape | tuple[int, int] | DeviceMesh | None = None, plan: str | Path | Overrides | None = None
    ) -> Resharding:
        """Move the model to another mesh or plan, with the caches of everything that runs on it: chats, and streams that are half read, go on from there.

        Tensors move one by one; the host never holds more than one, and nothing is read again. Programs are then compiled for the new layout.

        Args:
            mesh: of as many devices; the present one if None.
            plan: overrides as for `load`; the present ones if None.

        Raises:
            FitError: the mesh has another number of devices.
            PlanError: the plan doesn't describe the model; nothing has moved then.
        """
        new_mesh = another_mesh(self.mesh, mesh)
        overrides = self._overrides if plan is None else read_overrides(plan) if isinstance(plan, (str, Path)) else plan
        made, weights, dtype = make_plan(self.plan.model, new_mesh.shape, overrides), self.steps.weights, self.steps.dtype
        sessions = list(self._sessions)
        mover = Mover(
            self.mesh, new_mesh, chain(weights.tensors.values(), *(session.tensors() for session in sessions)), self.report("moving")
        )
        for session in sessions:  # programs hold the weights that they were traced with
            session.leave()
        self.programs = make_programs(self.steps)
        moved = mover(weights.tensors, lambda name: Layout.of(weights.plan, name), lambda name: Layout.of(made, name))
        self.steps = Steps(make_skeleton(self.source.config), DeviceWeights(plan=made, mesh=new_mesh, tensors=moved), dtype)
        self.plan, self.mesh, self.programs, self._overrides = made, new_mesh, make_programs(self.steps), overrides
        for session in sessions:
            session.move(self.steps, self.programs, mover)
        began = time.perf_counter()
        for session in sessions:
            session.ready(self.report("compiling"))
        return mover.result(compile_s=time.perf_counter() - began)

    def export(self, folder: str | Path, *, dtype: str = "auto", shard_bytes: int = SHARD_BYTES, allow_nonfinite: bool = False) -> Exported:
        """Write the weights as they are on the devices, with everything that came with the checkpoint; see `export.export_weights`.

        Args:
            dtype: `auto` is what they are in on the devices, `stored` what they had in the checkpoint; or a name of `export.DTYPES`.
        """
        weights = self.steps.weights
        return export_weights(
            ((name, weights.fetch(name)) for name in weights.tensors),
            self.source,
            folder,
            dtype=self.steps.dtype if dtype == "auto" else stored_dtypes(self.source) if dtype == "stored" else resolve(dtype),
            shard_bytes=shard_bytes,
            allow_nonfinite=allow_nonfinite,
            progress=self.report("writing"),
        )

    def param_bytes_per_device(self) -> list[int]:
        """Bytes of parameters on each device, measured on their shards."""
        return self.steps.weights.bytes_per_device()


def eos_ids(named: Any, tokenizer: Any | None, vocab: int) -> list[int]:
    """Ids that end a text: those of the generation config or the config, else the tokenizer's.

    Raises:
        CheckpointError: they are no ids of the vocabulary.
    """
    if named is not None:
        return end_ids(named, "the model", vocab)
    return end_ids(getattr(tokenizer, "eos_token_id", None), "the tokenizer", vocab)
