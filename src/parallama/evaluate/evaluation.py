"""What `parallama eval` does: runs tasks of lm-evaluation-harness on a sharded model. Needs the
extra `eval`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ParallamaError, RunError, UsageError, cause, lines
from ..inference.llm import LLM
from .harness_logs import quieted
from .tasks import Tasks, find_tasks

BOOTSTRAPS = 100_000
_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How tasks are run; names and meanings are the harness's.

    Attributes:
        num_fewshot: examples before each question; each task's own number if None.
        limit: at most so many documents of a task, or this share of them if below 1.
        apply_chat_template: put requests into the model's chat template.
        system_instruction: the conversation's system message.
        fewshot_as_multiturn: examples are turns of the conversation. If None, they are with a
            chat template.
        seed: of few-shot examples and of sampling; the harness's own seeds if None.
        bootstraps: resamplings for standard errors that have no formula; 0 is no standard errors.
        log_samples: keep every document with its requests and answers, under "samples".
    """

    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None
    seed: int | None = None
    bootstraps: int = BOOTSTRAPS
    log_samples: bool = False

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(lines(f"num_fewshot is {self.num_fewshot}", "expected 0 or more"))
        if self.limit is not None and not _is_limit(self.limit):
            raise UsageError(
                lines(
                    f"limit is {self.limit:g}",
                    "expected a whole number of documents, or a share of them between 0 and 1",
                )
            )
        if self.seed is not None and not 0 <= self.seed < 1 << 32:
            raise UsageError(lines(f"seed is {self.seed}", f"expected 0 to {(1 << 32) - 1}"))
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise UsageError(
                lines(
                    "fewshot_as_multiturn was given without apply_chat_template",
                    "expected both, or neither",
                )
            )

    def arguments(self) -> dict[str, Any]:
        """Arguments of the harness's `simple_evaluate`."""
        multiturn = self.fewshot_as_multiturn
        limit = self.limit
        found: dict[str, Any] = {
            "num_fewshot": self.num_fewshot,
            "limit": limit if limit is None or limit < 1 else int(limit),
            "apply_chat_template": self.apply_chat_template,
            "system_instruction": self.system_instruction,
            "fewshot_as_multiturn": self.apply_chat_template if multiturn is None else multiturn,
            "bootstrap_iters": self.bootstraps,
            "log_samples": self.log_samples,
        }
        if self.seed is not None:
            for name in ("random_seed", "numpy_random_seed", "torch_random_seed"):
                found[name] = self.seed
            found["fewshot_random_seed"] = self.seed
        return found


def _is_limit(limit: float) -> bool:
    return 0 < limit < 1 or (limit >= 1 and limit == int(limit))


def evaluate(
    llm: LLM,
    tasks: Tasks | Sequence[str],
    options: EvalOptions | None = None,
    *,
    batch: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run tasks on a model.

    Args:
        llm: from `parallama.load`.
        tasks: from `find_tasks`, or names of the harness's own tasks.
        batch: sequences that are run at once, over all devices. If None, 8, rounded up to a
            multiple of the "data" axis.
        quiet: none of the harness's warnings on standard error.

    Returns:
        The harness's own document (`results`, `n-samples`, `configs`, `config` ...), with `model`,
        `backend`, `mesh`, `dtype`, `batch_size`, `max_model_len`, `requests`, `tokens`,
        `cut_requests`, `programs_compiled`, `programs_after_warmup`, `evaluation_s`.

    Raises:
        UsageError: tasks or options don't fit the model.
        RunError: the harness, or a task's own code, failed.
    """
    found = tasks if isinstance(tasks, Tasks) else find_tasks(tasks, model=llm.name, quiet=quiet)
    options = EvalOptions() if options is None else options
    from lm_eval import simple_evaluate

    from .harness import HarnessLM

    data = llm.mesh.shape.data
    if batch is None:
        batch = -(-_BATCH // data) * data
    harness = HarnessLM(llm, batch, options.seed or 0)
    began = time.perf_counter()
    try:
        with quieted(quiet):
            document = simple_evaluate(
                model=harness,
                tasks=found.loaded,
                task_manager=found.manager,
                batch_size=harness.batch_size,
                **options.arguments(),
            )
    except ParallamaError:
        raise
    except Exception as error:
        raise RunError(
            lines(
                f"the harness failed: {type(error).__name__}: {cause(error)}", "--debug shows where"
            )
        ) from error
    if document is None:
        raise RunError(lines("the harness gave no results", "expected one process, of rank 0"))
    return dict(document) | {
        "model": llm.name,
        "backend": llm.mesh.backend.name,
        "mesh": dict(llm.mesh.shape),
        "dtype": str(llm.steps.dtype).removeprefix("torch."),
        "batch_size": harness.batch_size,
        "max_model_len": llm.max_model_len,
        "requests": harness.requests,
        "tokens": harness.tokens,
        "cut_requests": harness.cut,
        "programs_compiled": harness.programs_compiled,
        "programs_after_warmup": harness.programs_after_warmup,
        "evaluation_s": time.perf_counter() - began,
    }
