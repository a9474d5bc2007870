"""What the tests of `parallama eval` run in a worker."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import smollm2_cases

import parallama
from parallama.engine.torch_xla.counters import compilations
from parallama.evaluate.evaluation import EvalOptions, evaluate, find_tasks
from parallama.evaluate.scorer import Scorer, Text

FOLDER = Path("eval_tasks")


@functools.cache
def trained(mesh: str, max_model_len: int) -> parallama.LLM:
    """SmolLM2 of the other acceptance tests, with a shorter limit."""
    llm = copy.copy(smollm2_cases.model(mesh))
    llm.max_model_len = max_model_len
    return llm


def evaluated(
    mesh: str, tasks: str, max_model_len: int, batch: int | None = None, **options: Any
) -> dict[str, Any]:
    """The figures of a run, and what each request of each document got."""
    from eval_reference import summary

    before = compilations()
    document = evaluate(
        trained(mesh, max_model_len),
        find_tasks([tasks], [FOLDER], quiet=True),
        EvalOptions(log_samples=True, bootstraps=0, **options),
        batch=batch,
        quiet=True,
    )
    own = (
        "mesh",
        "dtype",
        "batch_size",
        "max_model_len",
        "requests",
        "tokens",
        "cut_requests",
        "programs_compiled",
        "programs_after_warmup",
    )
    return (
        summary(document)
        | {name: document[name] for name in own}
        | {"compiled": compilations() - before}
    )


def refused(
    mesh: str, max_model_len: int, runs: list[dict[str, Any]]
) -> list[tuple[str, int, str]]:
    """What each run raises: type, exit code, message."""
    raised = []
    for run in runs:
        try:
            evaluated(mesh, max_model_len=run.pop("max_model_len", max_model_len), **run)
            raised.append(("nothing", 0, ""))
        except Exception as error:
            raised.append((type(error).__name__, getattr(error, "exit_code", 0), str(error)))
    return raised


def scored(
    folder: str, mesh: str, batch: int, max_model_len: int, texts: list[tuple[list[int], int]]
) -> dict[str, Any]:
    """Scores of texts given as token ids, and how many programs were compiled before and after."""
    llm = parallama.load(folder, mesh=mesh, max_model_len=max_model_len)
    scorer, given = Scorer(llm, batch), [Text(ids, count) for ids, count in texts]
    began = compilations()
    scorer.warm_up(given)
    ready = compilations()
    scores = scorer(given)
    return {
        "scores": [(score.logprob, score.greedy) for score in scores],
        "programs": len(llm.programs),
        "compiled": ready - began,
        "after_warmup": compilations() - ready,
        "tokens": scorer.tokens,
    }
