"""Results of an evaluation as JSON, and as the files that lm-evaluation-harness would write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import RunError, lines


def as_json(document: Mapping[str, Any], **layout: Any) -> str:
    """A document as JSON; what JSON has no form for is written as the harness writes it."""
    from lm_eval.utils import handle_non_serializable

    return json.dumps(document, default=handle_non_serializable, ensure_ascii=False, **layout)


def write(document: Mapping[str, Any], path: Path) -> list[Path]:
    """Write results where the harness would, under its names.

    These are `PATH/MODEL/results_DATE.json`, or a file beside `PATH` if that ends in .json, and a
    `samples_TASK_DATE.jsonl` for each task with samples.

    Raises:
        RunError: a file cannot be written.
    """
    date = datetime.now().isoformat().replace(":", "-")
    if path.suffix == ".json":
        folder, name = path.parent, f"{path.stem}_{date}.json"
    else:
        folder = path / str(document["model"]).strip("/").replace("/", "__")
        name = f"results_{date}.json"
    kept = {key: value for key, value in document.items() if key != "samples"}
    contents = {folder / name: as_json(kept, indent=2)}
    samples: Mapping[str, Any] = document.get("samples") or {}
    for task, rows in samples.items():
        text = "".join(as_json(_sample(row)) + "\n" for row in rows)
        contents[folder / f"samples_{task}_{date}.jsonl"] = text
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
    """A document's row as the harness logs it: with its arguments by name, not in a list."""
    named = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(arguments)}
        for i, arguments in enumerate(row["arguments"])
    }
    return {**row, "arguments": named, "target": str(row["target"])}
