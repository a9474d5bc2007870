"""What the tests of faults in proving and evaluating run in a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import eval_cases
import torch

import parallama
from parallama.evaluate.evaluation import EvalOptions, evaluate, find_tasks
from parallama.evaluate.scorer import Scorer, Text
from parallama.prove.module_parity import MOST_POSITIONS, compare_modules
from parallama.prove.reference import ReferenceOutputs
from parallama.prove.tolerance import Tolerance


def too_many_positions(folder: str) -> tuple[str, int, str]:
    """What is raised where modules are compared on too long a text: type, exit code, message."""
    llm = parallama.load(folder)
    tolerance = Tolerance(dtype="float32", devices=1)
    try:
        compare_modules(
            llm.steps, ReferenceOutputs(Path(folder)), [1] * (MOST_POSITIONS + 1), tolerance
        )
    except parallama.ParallamaError as error:
        return type(error).__name__, error.exit_code, str(error)
    raise AssertionError("nothing was raised")


class Others:
    """Somebody else in the process, who has programs of new shapes compiled now and then."""

    def __init__(self, llm: parallama.LLM) -> None:
        self._llm, self._rows = llm, 0
        self.compiled = 0

    def __call__(self, *_: Any) -> None:
        self._rows += self._llm.mesh.shape.data
        before = self._llm.mesh.compilations()
        self._llm.logits(torch.zeros(self._rows, 1, dtype=torch.long))
        self.compiled += self._llm.mesh.compilations() - before


def scored_beside_others(
    folder: str, mesh: str, texts: list[tuple[list[int], int]]
) -> dict[str, int]:
    """What a scorer counts where others have programs compiled between its batches; and all that
    were compiled.
    """
    llm = parallama.load(folder, mesh=mesh)
    others, began = Others(llm), llm.mesh.compilations()
    scorer, given = Scorer(llm, batch=2), [Text(ids, count) for ids, count in texts]
    others()
    scorer.warm_up(given)
    others()
    scorer(given, progress=others)
    return {
        "compiled": scorer.programs_compiled,
        "after_warmup": scorer.programs_after_warmup,
        "by_others": others.compiled,
        "all": llm.mesh.compilations() - began,
    }


def evaluated_beside_others(folder: str, mesh: str) -> dict[str, int]:
    """What an evaluation counts where others have programs compiled between its batches; and all
    that were compiled.
    """
    llm = parallama.load(folder, mesh=mesh)
    others, began = Others(llm), llm.mesh.compilations()
    llm._progress = lambda what, *_: others() if what in ("scoring", "generating") else None
    document = evaluate(
        llm,
        find_tasks(["parallama_facts,parallama_quiz"], [eval_cases.FOLDER], quiet=True),
        EvalOptions(limit=4, bootstraps=0),
        batch=2,
        quiet=True,
    )
    return {
        "compiled": document["programs_compiled"],
        "after_warmup": document["programs_after_warmup"],
        "by_others": others.compiled,
        "all": llm.mesh.compilations() - began,
    }
