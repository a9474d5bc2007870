"""lm-evaluation-harness's model interface, on a sharded model. Needs the extra `eval`.

Texts become tokens as with the harness's own `hf` model, so that both score the same tokens: a context's last spaces belong to what follows it, an empty context is the tokenizer's BOS (or else
EOS) token, and what is too long loses its beginning, which is counted in `cut`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..engine.sampling_params import SamplingParams
from ..errors import UsageError, lines, shown
from ..files.chat_template import Renderer, renderer_of
from ..inference.llm import LLM
from ..inference.session import Session
from ..inference.text_stream import TextStream
from ..plan.program_shapes import text_size
from .scorer import Scorer, Text

DEFAULT_NEW_TOKENS = 256
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Of transformers' generation settings those that change nothing with this value.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}

Pair = tuple[tuple[str, str], list[int], list[int]]


class HarnessLM(TemplateLM):  # type: ignore[misc]
    """A model for `lm_eval.simple_evaluate`.

    Args:
        llm: from `parallama.load`.
        batch: sequences that are run at once, over all devices; a multiple of the mesh's "data" axis.
        seed: of what tasks sample. Every request draws from a seed of its own.

    Attributes:
        cut: requests that lost their beginning, for they were longer than `llm.max_model_len`.
        programs_compiled: by torch-xla's own count, before each kind of requests was run.
        programs_after_warmup: the same, while they ran.
        requests, tokens: what was run, without filling.

    Raises:
        UsageError: the batch doesn't divide, or the model has no tokenizer or one that has neither BOS nor EOS.
    """

    def __init__(self, llm: LLM, batch: int = 8, seed: int = 0) -> None:
        super().__init__()
        if batch < 1 or batch % llm.mesh.shape.data:
            raise UsageError(
                lines(
                    f"a batch of {batch} sequences on mesh {llm.mesh.shape}",
                    f'expected a multiple of {llm.mesh.shape.data}, the axis "data"',
                )
            )
        if llm.tokenizer is None:
            raise UsageError(
                lines(
                    f"model {llm.name!r} has no tokenizer",
                    "tasks are texts: expected a model with one",
                )
            )
        if llm.tokenizer.bos_token_id is None and llm.tokenizer.eos_token_id is None:
            raise UsageError(
                lines(
                    f"the tokenizer of {llm.name!r} has neither a BOS nor an EOS token",
                    "expected one, for empty contexts",
                )
            )
        self.llm = llm
        self.tokenizer = llm.tokenizer
        self.cut = self.programs_compiled = self.programs_after_warmup = self.requests = (
            self.generated
        ) = 0
        self._seed = seed
        self._scorer = Scorer(llm, batch)
        self._renderer: Renderer | None = None

    # -- what the harness asks for

    @property
    def batch_size(self) -> int:
        return self._scorer.batch

    @property
    def max_length(self) -> int:
        return self.llm.max_model_len

    @property
    def tokens(self) -> int:
        return self._scorer.tokens + self.generated

    @property
    def eot_token_id(self) -> int:
        eos: int | None = self.tokenizer.eos_token_id
        return self.prefix_token_id if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        bos: int | None = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.llm.name).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids. Special tokens are added as the tokenizer does it, but no second BOS where the text begins with one."""
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode(self.prefix_token_id)
        ):
            given = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's chat template writes it; without `add_generation_prompt` it ends within its last message.

        Raises:
            UsageError: there is no template, or it refuses the messages.
            CheckpointError: it is broken, or takes too long.
        """
        if self._renderer is None:
            if not getattr(self.tokenizer, "chat_template", None):
                raise UsageError(
                    lines(
                        f"model {self.llm.name!r} has no chat template",
                        "expected an instruction-tuned model, or no --apply-chat-template",
                    )
                )
            self._renderer = renderer_of(self.tokenizer, repr(self.llm.name))
        return self._renderer.render(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` that overlap by one token."""
        windows: list[Pair] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            found = get_rolling_token_windows(
                token_list=ids,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in found]
            windows += [
                ((request.args[0], ""), context, continuation) for context, continuation in pairs
            ]
            counts.append(len(pairs))
        scores = iter(self._scored(windows, len(requests)))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations in nats, and whether greedy decoding chooses them."""
        for context, continuation in (request.args for request in requests):
            if not continuation:
                raise UsageError(
                    lines(
                        f"the continuation of {shown(context)} is empty",
                        "expected some text to score",
                    )
                )
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Pair], **_: Any) -> list[tuple[float, bool]]:
        return self._scored(requests, len(requests))

    def _scored(self, pairs: Sequence[Pair], requests: int) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether greedy decoding chooses it."""
        texts = []
        for (context, continuation), before, after in pairs:
            if not before or not after:
                raise UsageError(
                    lines(
                        f"context {shown(context)} with continuation {shown(continuation)}",
                        "expected at least one token of each",
                    )
                )
            if len(after) > self.max_length:
                raise UsageError(
                    lines(
                        f"the continuation {shown(continuation)} has {len(after)} tokens",
                        f"expected at most {self.max_length}, the model's limit",
                    )
                )
            kept = (before + after)[-(self.max_length + 1) :]
            self.cut += len(kept) < len(before) + len(after)
            texts.append(Text(kept, len(after)))
        began = self.llm.mesh.compilations()
        self._scorer.warm_up(texts)
        ready = self.llm.mesh.compilations()
        scores = self._scorer(texts, self.llm.report("scoring"))
        self._count(requests, began, ready)
        return [(score.logprob, score.greedy) for score in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts until one of the strings that their task stops at, or an end-of-text token."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        texts: dict[int, str] = {}
        began = self.llm.mesh.compilations()
        made = [_Generation(self, requests[members[0]].args[1]) for members in groups.values()]
        batches = []
        for generation, members in zip(made, groups.values(), strict=True):
            encoded = {index: generation.encode(requests[index].args[0]) for index in members}
            order = sorted(members, key=lambda index: -len(encoded[index]))
            for first in range(0, len(order), self.batch_size):
                rows = order[first : first + self.batch_size]
                batches.append((generation, rows, [encoded[row] for row in rows]))
        shapes = {
            (id(generation), generation.longest(prompts)): (generation, rows, prompts)
            for generation, rows, prompts in batches
        }
        for generation, rows, prompts in shapes.values():
            generation.session(prompts, rows)
        ready = self.llm.mesh.compilations()
        progress = self.llm.report("generating")
        for generation, rows, prompts in batches:
            texts.update(zip(rows, generation.run(prompts, rows), strict=True))
            if progress is not None:
                progress(len(texts), len(requests))
        self._count(len(requests), began, ready)
        return [texts[index] for index in range(len(requests))]

    def seed_of(self, request: int) -> int:
        """The seed of a request: the same prompt asked for several times has several texts."""
        return ((self._seed << 32) + request) % (1 << 64)

    def _count(self, requests: int, began: int, ready: int) -> None:
        self.requests += requests
        self.programs_compiled += ready - began
        self.programs_after_warmup += self.llm.mesh.compilations() - ready


class _Generation:
    """How one task's texts are generated.

    Args:
        given: the harness's generation settings.

    Raises:
        UsageError: a setting is not known, or leaves no room for a context.
    """

    def __init__(self, harness: HarnessLM, given: dict[str, Any]) -> None:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS))
        llm = harness.llm
        self.harness = harness
        self.new: int = settings.pop("max_gen_toks")
        self.until = handle_stop_sequences(
            settings.pop("until"), eos=harness.tokenizer.decode(harness.eot_token_id)
        )
        self.room = llm.max_model_len - self.new
        if self.new < 1 or self.room < 1:
            raise UsageError(
                lines(
                    f"the task generates {self.new} tokens",
                    f"expected at least one, and fewer than {llm.max_model_len}, the model's limit with its context",
                )
            )
        sampled = settings.pop("do_sample")
        sampling = {name: settings.pop(name) for name in _SAMPLING if name in settings}
        unknown = {
            name: value
            for name, value in settings.items()
            if value is not None and _NEUTRAL.get(name) != value
        }
        if unknown:
            name, value = next(iter(unknown.items()))
            raise UsageError(
                lines(
                    f"the task's generation setting {name!r} is {shown(value)}",
                    f"known: do_sample, until, max_gen_toks, {', '.join(_SAMPLING)}",
                )
            )
        self._sampling = sampling | ({} if sampled else {"temperature": 0.0})
        if sampled and "temperature" not in sampling:
            self._sampling["temperature"] = 1.0
        # A stop string that is a special token is not part of any text: the token ends it.
        special = set(harness.tokenizer.all_special_tokens)
        stops = {
            harness.tokenizer.convert_tokens_to_ids(string)
            for string in self.until
            if string in special
        }
        self.ends = [*llm.eos_ids, *sorted(stops - set(llm.eos_ids))]

    def encode(self, context: str) -> list[int]:
        ids = self.harness.tok_encode(context)
        if not ids:
            raise UsageError(lines("a context to continue has no tokens", "expected some text"))
        self.harness.cut += len(ids) > self.room
        return ids[-self.room :]

    def longest(self, prompts: Sequence[Sequence[int]]) -> int:
        """How long a batch's prompts may be: of the few sizes that texts are scored in, so that batches share programs."""
        return min(
            text_size(max(len(prompt) for prompt in prompts), self.harness.llm.max_model_len),
            self.room,
        )

    def session(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Session:
        """For a batch, which fills it."""
        llm, longest = self.harness.llm, self.longest(prompts)
        params: list[SamplingParams] = [
            llm.sampling_params(**self._sampling, seed=self.harness.seed_of(row)) for row in rows
        ]
        return llm.session(
            params,
            capacity=longest + self.new,
            longest_prompt=longest,
            eos=self.ends,
            batch=self.harness.batch_size,
        )

    def run(self, prompts: Sequence[list[int]], rows: Sequence[int]) -> list[str]:
        """The texts that follow, each until it ends."""
        session, tokenizer, ends = (
            self.session(prompts, rows),
            self.harness.tokenizer,
            set(self.ends),
        )
        streams = [TextStream(tokenizer, self.until) for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        live = set(range(len(prompts)))
        choices = session.prefill(prompts)
        steps = session.decode(self.new - 1)
        while True:
            for choice in choices:
                if choice.row in live:
                    tokens[choice.row].append(choice.token)
                    streams[choice.row].push(choice.token)
                    if choice.token in ends or streams[choice.row].stopped:
                        live.discard(choice.row)
            following = next(steps, None) if live else None
            if following is None:
                break
            choices = following
        self.harness.generated += sum(len(row) for row in tokens)
        # What a text is cut at is the harness's to say.
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
        return [postprocess_generated_text(text, self.until, None) for text in texts]
