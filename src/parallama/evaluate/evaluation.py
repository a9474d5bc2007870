"""What `parallama eval` does: tasks of lm-evaluation-harness, found and loaded, run on a sharded model, and their results written. Needs the extra `eval`.

A task is data, with one exception: its YAML may name Python functions (`!function`), which lie beside it and are run. A task of the user's own folder is as trusted as a program of theirs; one that
lies in a model's folder is refused, for nothing in there is run.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import environment
from ..errors import ParallamaError, RunError, UsageError, cause, lines, listed
from ..inference.llm import LLM

BOOTSTRAPS = 100_000
_KNOWN_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks that were found and loaded.

    Attributes:
        manager: the harness's.
        loaded: its tasks and groups.
    """

    manager: Any
    loaded: list[Any]


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How tasks are run; names and meanings are the harness's.

    Attributes:
        num_fewshot: examples before each question; each task's own number if None.
        limit: at most so many documents of a task, or this share of them if below 1.
        apply_chat_template: put requests into the model's chat template.
        system_instruction: the conversation's system message.
        fewshot_as_multiturn: examples as turns of the conversation; so if None, with a chat template.
        seed: of few-shot examples and of what is sampled; the harness's own seeds if None.
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
        if self.limit is not None and not (
            0 < self.limit < 1 or (self.limit >= 1 and self.limit == int(self.limit))
        ):
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


def find_tasks(
    names: Sequence[str],
    include: Sequence[Path] = (),
    *,
    model: str | None = None,
    quiet: bool = False,
) -> Tasks:
    """Find and load tasks, groups or tags. What their YAML names as `!function` is imported here.

    Args:
        names: of the harness or of `include`, with `*` for any letters, or YAML files.
        include: folders with tasks of the user's own; they win over the harness's.
        model: the model that they are for: none may come from its folder.

    Raises:
        UsageError: the extra isn't installed, a folder isn't there or is a model's own, a task isn't known, or cannot be loaded.
    """
    _need_harness()
    environment.keep_one_process()
    for folder in include:
        if not folder.is_dir():
            raise UsageError(
                lines(
                    f"--include-path {str(folder)!r} is no folder",
                    "expected a folder with YAML files of tasks",
                )
            )
    wanted = [name for given in names for name in given.split(",") if name]
    if not wanted:
        raise UsageError(lines("no task was named", "expected --tasks NAME,NAME"))
    _refuse_checkpoints([*include, *(Path(name) for name in wanted if Path(name).is_file())], model)
    from lm_eval.tasks import TaskManager

    with _kept_quiet(quiet):
        manager = TaskManager(
            include_path=[str(folder) for folder in include], include_defaults=False
        )
        own = [manager.task_index.get(name) for name in wanted]
        # The harness's own folder has 14,000 names, and a group may name any of them.
        if not all(
            Path(name).is_file() or (entry and entry.kind.name != "GROUP")
            for name, entry in zip(wanted, own, strict=True)
        ):
            manager = TaskManager(include_path=[str(folder) for folder in include])
        chosen = []
        for name in wanted:
            matching = [name] if Path(name).is_file() else manager.match_tasks([name])
            if not matching:
                near = difflib.get_close_matches(name, manager.all_tasks, _KNOWN_SHOWN)
                known = (
                    f"did you mean {listed(near)}?"
                    if near
                    else "list the harness's with: lm-eval ls tasks"
                )
                raise UsageError(
                    lines(
                        f"task {name!r} is not known",
                        known,
                        "tasks of your own: --include-path FOLDER, or the path of a YAML file",
                    )
                )
            chosen += [task for task in matching if task not in chosen]
        loaded = []
        for name in chosen:
            try:
                found = manager._load_spec(name)
            except (
                Exception
            ) as error:  # of many kinds: YAML, data sets, functions of the task's own
                raise UsageError(
                    lines(
                        f"task {name!r} cannot be loaded: {type(error).__name__}: {cause(error)}",
                        "its YAML and its data set must be there",
                    )
                ) from error
            loaded += found if isinstance(found, list) else [found]
    return Tasks(manager=manager, loaded=loaded)


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
        batch: sequences that are run at once, over all devices; 8, filled up to a multiple of the "data" axis, if None.
        quiet: none of the harness's warnings on standard error.

    Returns:
        The harness's own document (`results`, `n-samples`, `configs`, `config` ...), with `model`, `backend`, `mesh`, `dtype`, `batch_size`, `max_model_len`, `requests`, `tokens`, `cut_requests`,
        `programs_compiled`, `programs_after_warmup`, `evaluation_s`.

    Raises:
        UsageError: tasks or options don't fit the model.
        RunError: the harness, or a task's own code, failed.
    """
    found = tasks if isinstance(tasks, Tasks) else find_tasks(tasks, model=llm.name, quiet=quiet)
    options = EvalOptions() if options is None else options
    from lm_eval import simple_evaluate

    from .harness import HarnessLM

    data = llm.mesh.shape.data
    harness = HarnessLM(llm, -(-8 // data) * data if batch is None else batch, options.seed or 0)
    multiturn = (
        options.apply_chat_template
        if options.fewshot_as_multiturn is None
        else options.fewshot_as_multiturn
    )
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    limit = options.limit if options.limit is None or options.limit < 1 else int(options.limit)
    began = time.perf_counter()
    try:
        with _kept_quiet(quiet):
            document = simple_evaluate(
                model=harness,
                tasks=found.loaded,
                task_manager=found.manager,
                num_fewshot=options.num_fewshot,
                batch_size=harness.batch_size,
                limit=limit,
                apply_chat_template=options.apply_chat_template,
                system_instruction=options.system_instruction,
                fewshot_as_multiturn=multiturn,
                bootstrap_iters=options.bootstraps,
                log_samples=options.log_samples,
                **({} if options.seed is None else dict.fromkeys(seeds, options.seed)),
            )
    except ParallamaError:
        raise
    except Exception as error:
        raise RunError(
            lines(
                f"the harness failed: {type(error).__name__}: {cause(error)}", "--debug shows where"
            )
        ) from error
    assert document is not None
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


def as_json(document: Mapping[str, Any], **layout: Any) -> str:
    """A document as JSON, with what JSON has no form for as the harness writes it."""
    from lm_eval.utils import handle_non_serializable

    return json.dumps(document, default=handle_non_serializable, ensure_ascii=False, **layout)


def write(document: Mapping[str, Any], path: Path) -> list[Path]:
    """Write results where the harness would, under its names: `PATH/MODEL/results_DATE.json` (or beside `PATH` if that ends in .json), and `samples_TASK_DATE.jsonl`.

    Raises:
        RunError: a file cannot be written.
    """
    date = datetime.now().isoformat().replace(":", "-")
    named = path.suffix == ".json"
    folder = path.parent if named else path / str(document["model"]).strip("/").replace("/", "__")
    results = folder / (f"{path.stem}_{date}.json" if named else f"results_{date}.json")
    samples: Mapping[str, Any] = document.get("samples") or {}
    contents = {
        results: as_json(
            {key: value for key, value in document.items() if key != "samples"}, indent=2
        )
    }
    for task, rows in samples.items():
        contents[folder / f"samples_{task}_{date}.jsonl"] = "".join(
            as_json(_sample(row)) + "\n" for row in rows
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in contents.items():
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(
            lines(
                f"results cannot be written to {str(folder)!r}: {error.strerror}",
                "expected a folder that can be written to",
            )
        ) from error
    return list(contents)


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """A document's row as the harness logs it: arguments by name, for tables have no lists of unequal kinds."""
    named = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(arguments)}
        for i, arguments in enumerate(row["arguments"])
    }
    return {**row, "arguments": named, "target": str(row["target"])}


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UsageError(
            lines("parallama eval needs the package 'lm_eval'", "pip install 'parallama[eval]'")
        ) from None


def _refuse_checkpoints(paths: Sequence[Path], model: str | None) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    checkpoints = [
        Path(HF_HUB_CACHE).resolve(),
        *([Path(model).resolve()] if model is not None and Path(model).is_dir() else []),
    ]
    for path in paths:
        if any(path.resolve().is_relative_to(folder) for folder in checkpoints):
            raise UsageError(
                lines(
                    f"tasks in {str(path)!r} came with a checkpoint",
                    "a task may name code, and none of a checkpoint's is run",
                    "look at them, and copy them somewhere else",
                )
            )


@contextlib.contextmanager
def _kept_quiet(quiet: bool) -> Iterator[None]:
    """Within: the harness prints nothing to standard output, draws bars on terminals only, and its warnings go to standard error, if anywhere."""
    errors = sys.stderr
    handler = logging.StreamHandler(errors)
    handler.setFormatter(logging.Formatter("[lm_eval: %(message)s]"))
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("lm_eval")
    before = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.ERROR if quiet else logging.WARNING)
    logger.addHandler(handler)
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            contextlib.redirect_stdout(errors if errors.isatty() and not quiet else io.StringIO())
        )
        if quiet or not errors.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate, logger.level = before
