"""lm-evaluation-harness asks our server, and finds what `parallama eval` finds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forks import command, environment
from servers import Server

from parallama.files.find import find

HERE = Path(__file__).parent
LIMIT = 256
CLOZE = ("parallama_facts", "parallama_cloze")
QUIZ = ("parallama_quiz",)


@dataclass(frozen=True)
class Served:
    """A server with SmolLM2, and a folder with its tokenizer."""

    url: str
    tokenizer: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("lm-eval")
    tokenizer = find("smollm2").tokenizer()
    assert tokenizer is not None
    tokenizer.save_pretrained(root / "tokenizer")
    server = Server("smollm2", "--max-model-len", str(LIMIT), "--quiet", log=root / "log")
    yield Served(server.url, str(root / "tokenizer"))
    server.stop()


def harness(
    kind: str, served: Served, tasks: tuple[str, ...], out: Path, **more: object
) -> dict[str, Any]:
    """The `results` of `lm_eval --model KIND`, which it writes into a file."""
    path = "chat/completions" if kind == "local-chat-completions" else "completions"
    asked = {"model": "smollm2", "base_url": f"{served.url}/v1/{path}", "max_length": LIMIT}
    asked |= {"max_retries": 1, "tokenizer_backend": "huggingface", "tokenizer": served.tokenizer}
    given = ",".join(f"{name}={value}" for name, value in (asked | more).items())
    told = ["--model", kind, "--model_args", given, "--tasks", ",".join(tasks)]
    told += ["--include_path", "eval_tasks", "--output_path", str(out)]
    if kind == "local-chat-completions":
        told.append("--apply_chat_template")
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *told],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=HERE,
        env=environment() | {"PJRT_DEVICE": "CPU", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = out.rglob("results_*.json")
    found: dict[str, Any] = json.loads(written.read_text())["results"]
    return found


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    """The `results` of `parallama eval`."""
    told = ["eval", "smollm2", "--tasks", ",".join((*CLOZE, *QUIZ)), "--include_path", "eval_tasks"]
    told += ["--max-model-len", str(LIMIT), "--json", "--quiet"]
    done = command(told, cwd=HERE)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)["results"]
    return found


def check_same(found: dict[str, Any], ours: dict[str, Any], tasks: tuple[str, ...]) -> None:
    assert found.keys() == set(tasks)
    for task in tasks:
        figures = {
            name: value
            for name, value in found[task].items()
            if isinstance(value, float) and "stderr" not in name
        }
        assert figures
        assert {name: ours[task][name] for name in figures} == pytest.approx(figures, rel=1e-4)


def test_answers_that_are_generated_give_the_numbers_of_eval(
    served: Served, ours: dict[str, Any], tmp_path: Path
) -> None:
    check_same(harness("local-completions", served, QUIZ, tmp_path), ours, QUIZ)


@pytest.mark.parametrize("more", [{}, {"num_concurrent": 4}])
def test_prompts_that_are_scored_give_the_numbers_of_eval(
    served: Served, ours: dict[str, Any], tmp_path: Path, more: dict[str, object]
) -> None:
    check_same(harness("local-completions", served, CLOZE, tmp_path, **more), ours, CLOZE)


def test_conversations_are_answered(served: Served, tmp_path: Path) -> None:
    found = harness("local-chat-completions", served, QUIZ, tmp_path, num_concurrent=2)
    assert 0 <= found["parallama_quiz"]["exact_match,stripped"] <= 1
