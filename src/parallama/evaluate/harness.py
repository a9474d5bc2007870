"""lm-evaluation-harness's model interface, on a sharded model. Needs the extra `eval`.

Texts become tokens as in the harness's own `hf` model, so that both score the same tokens. Spaces
at the end of a context belong to what follows, an empty context is the tokenizer's BOS (or EOS)
token, and what is too long loses its beginning (counted in `cut`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..errors import UsageError, lines, shown
from ..files.chat_template import Renderer, renderer_of
from ..inference.llm import LLM
from ..inference.run_stats import RunStats
from .generation import TaskGeneration
from .scorer import Scorer, Text

Pair = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation as texts, and the token ids of each."""


class HarnessLM(TemplateLM):  # type: ignore[misc]
    """A model for `lm_eval.simple_evaluate`.

    Args:
        llm: from `parallama.load`.
        batch: sequences that are run at once, over all devices; a multiple of the mesh's "data"
            axis.
        seed: for tasks that sample. Every request draws from a seed of its own.

    Attributes:
        cut: requests that lost their beginning, because they were longer than
            `llm.max_model_len`.
        programs_compiled: by the engine's own count, before each kind of requests was run.
        programs_after_warmup: the same, while they ran.
        requests, tokens: what was run, without idle rows and padding.

    Raises:
        UsageError: the batch doesn't divide, or the model has no tokenizer or one that has
            neither BOS nor EOS.
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
        self.cut = self.requests = 0
        self._seed = seed
        self._scorer = Scorer(llm, batch)
        self._generated = self._compiled = self._compiled_late = 0
        self._renderer: Renderer | None = None

    # -- what was run

    @property
    def tokens(self) -> int:
        return self._scorer.tokens + self._generated

    @property
    def programs_compiled(self) -> int:
        return self._scorer.programs_compiled + self._compiled

    @property
    def programs_after_warmup(self) -> int:
        return self._scorer.programs_after_warmup + self._compiled_late

    # -- what the harness asks for

    @property
    def batch_size(self) -> int:
        return self._scorer.batch

    @property
    def max_length(self) -> int:
        return self.llm.max_model_len

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
        """Token ids of a text.

        The tokenizer adds its special tokens, but no second BOS where the text begins with one.
        """
        begins = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and string.startswith(begins):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in the model's chat template.

        Without `add_generation_prompt` the text ends within the last message.

        Raises:
            UsageError: there is no template, or it refuses the messages.
            CheckpointError: the template is broken, or takes too long.
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
        pairs: list[Pair] = []
        counts = []
        for request in requests:
            text = request.args[0]
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [make_disjoint_window(window) for window in windows]
            pairs += [((text, ""), context, continuation) for context, continuation in found]
            counts.append(len(found))
        scores = iter(self._scored(pairs, len(requests)))
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
        self._scorer.warm_up(texts)
        scores = self._scorer(texts, self.llm.report("scoring"))
        self.requests += requests
        return [(score.logprob, score.greedy) for score in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts, each until a stop string of its task or an end-of-text token."""
        tasks: dict[str, TaskGeneration] = {}
        made, asked, rows = [], [], []
        for index, (context, settings) in enumerate(request.args for request in requests):
            name = repr(settings)
            if name not in tasks:
                eos_text = self.tokenizer.decode(self.eot_token_id)
                tasks[name] = TaskGeneration(self.llm, self.tokenizer, settings, eos_text=eos_text)
            made.append(tasks[name])
            ids = self._prompt(context, tasks[name].room)
            request, row = tasks[name].request(ids, self._seed_of(index))
            asked.append(request)
            rows.append(row)
        progress, done = self.llm.report("generating"), 0
        stats = RunStats()
        for number, (_, chunk, _) in enumerate(self.llm.continued(asked, rows, self.batch_size)):
            if number == 0:  # later ones may be of a run that `progress` makes
                stats = self.llm.stats
            done += chunk.finish_reason is not None
            if progress is not None and chunk.finish_reason is not None:
                progress(done, len(requests))
        self._compiled += stats.programs_compiled
        self._compiled_late += stats.programs_after_warmup
        self._generated += sum(len(row.token_ids) for row in rows)
        self.requests += len(requests)
        return [each.text(row) for each, row in zip(made, rows, strict=True)]

    def _prompt(self, context: str, room: int) -> list[int]:
        """Token ids of a context to continue, of which the last `room` are kept."""
        ids = self.tok_encode(context)
        if not ids:
            raise UsageError(lines("a context to continue has no tokens", "expected some text"))
        self.cut += len(ids) > room
        return ids[-room:]

    def _seed_of(self, request: int) -> int:
        """The seed of a request: a prompt that is asked for several times gets several texts."""
        return ((self._seed << 32) + request) % (1 << 64)
