"""Finds and loads tasks of lm-evaluation-harness. Needs the extra `eval`.

A task is data, with one exception: its YAML may name Python functions (`!function`) in files beside
it, and these are run. A task in the user's own folder is trusted like a program of theirs; a task
in a model's folder is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import environment
from ..errors import UsageError, cause, lines, listed
from .harness_logs import quieted

_SUGGESTIONS = 3


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks that were found and loaded.

    Attributes:
        manager: the harness's task manager.
        loaded: its tasks and groups.
    """

    manager: Any
    loaded: list[Any]


def find_tasks(
    names: Sequence[str],
    include: Sequence[Path] = (),
    *,
    model: str | None = None,
    quiet: bool = False,
) -> Tasks:
    """Find and load tasks, groups or tags. What their YAML names as `!function` is imported here.

    Args:
        names: names of the harness or of `include`, with `*` for any letters, or YAML files.
        include: folders with tasks of the user's own; they win over the harness's.
        model: the model that is evaluated. No task may come from its folder.
        quiet: none of the harness's warnings on standard error.

    Raises:
        UsageError: the extra isn't installed, a folder isn't there or is a model's own, or a task
            isn't known or cannot be loaded.
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
    with quieted(quiet):
        manager = _manager(wanted, include)
        chosen: list[str] = []
        for name in wanted:
            chosen += [task for task in _matching(manager, name) if task not in chosen]
        loaded: list[Any] = []
        for name in chosen:
            found = _load(manager, name)
            loaded += found if isinstance(found, list) else [found]
    return Tasks(manager=manager, loaded=loaded)


def _manager(wanted: Sequence[str], include: Sequence[Path]) -> Any:
    """A task manager that knows `include`, and the harness's own tasks where they are needed."""
    from lm_eval.tasks import TaskManager

    folders = [str(folder) for folder in include]
    manager = TaskManager(include_path=folders, include_defaults=False)
    for name in wanted:
        entry = manager.task_index.get(name)
        # The harness has 14,000 names of its own, and a group may contain any of them.
        if not Path(name).is_file() and (not entry or entry.kind.name == "GROUP"):
            return TaskManager(include_path=folders)
    return manager


def _matching(manager: Any, name: str) -> list[str]:
    """The tasks that a name stands for.

    Raises:
        UsageError: there are none.
    """
    matching: list[str] = [name] if Path(name).is_file() else manager.match_tasks([name])
    if matching:
        return matching
    known = "list the harness's with: lm-eval ls tasks"
    if near := difflib.get_close_matches(name, manager.all_tasks, _SUGGESTIONS):
        known = f"did you mean {listed(near)}?"
    raise UsageError(
        lines(
            f"task {name!r} is not known",
            known,
            "tasks of your own: --include-path FOLDER, or the path of a YAML file",
        )
    )


def _load(manager: Any, name: str) -> Any:
    try:
        return manager._load_spec(name)
    except Exception as error:  # of many kinds: YAML, data sets, functions of the task's own
        raise UsageError(
            lines(
                f"task {name!r} cannot be loaded: {type(error).__name__}: {cause(error)}",
                "its YAML and its data set must be there",
            )
        ) from error


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UsageError(
            lines("parallama eval needs the package 'lm_eval'", "pip install 'parallama[eval]'")
        ) from None


def _refuse_checkpoints(paths: Sequence[Path], model: str | None) -> None:
    """Raise `UsageError` if a path is in the model's folder or in the cache of the hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    checkpoints = [Path(HF_HUB_CACHE).resolve()]
    if model is not None and Path(model).is_dir():
        checkpoints.append(Path(model).resolve())
    for path in paths:
        if any(path.resolve().is_relative_to(folder) for folder in checkpoints):
            raise UsageError(
                lines(
                    f"tasks in {str(path)!r} came with a checkpoint",
                    "a task may name code, and none of a checkpoint's is run",
                    "look at them, and copy them somewhere else",
                )
            )
