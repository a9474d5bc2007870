"""What the README shows works as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import train_models

README = Path(__file__).parent.parent / "README.md"
COMMAND = str(Path(sys.executable).with_name("parallama"))
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PYTHON = [body for language, body in BLOCKS if language == "python"]


def shown_commands() -> list[tuple[str, str]]:
    """Command lines, and the output that is shown below each."""
    commands: list[tuple[str, str]] = []
    for language, body in BLOCKS:
        if language not in ("console", "sh", "bash", "shell"):
            continue
        joined = body.replace("\\\n", " ")
        for line in joined.splitlines():
            start = line.removeprefix("$ ")
            if line.startswith("$ ") or (language != "console" and start.startswith("parallama ")):
                commands.append((start, ""))
            elif commands and language == "console":
                commands[-1] = (commands[-1][0], commands[-1][1] + line + "\n")
    return commands


GENERATE = [
    (command, shown)
    for command, shown in shown_commands()
    if command.startswith("parallama generate")
]


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PJRT_", "XLA_", "CPU_NUM_", "TF_CPP_"))
    }
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env=kept,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
    return done


def test_the_readme_shows_a_command_and_some_python() -> None:
    assert GENERATE and PYTHON


@pytest.mark.parametrize(
    "code", PYTHON, ids=[f"block {index}" for index in range(1, len(PYTHON) + 1)]
)
def test_python_of_the_readme_runs(code: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    done = run([sys.executable, "example.py"], tmp_path)
    if "largest planet" in code:
        assert "Jupiter" in done.stdout


@pytest.mark.parametrize(
    ("command", "shown"),
    GENERATE,
    ids=[f"command {index}" for index in range(1, len(GENERATE) + 1)],
)
def test_a_command_of_the_readme_prints_what_is_shown(
    command: str, shown: str, tmp_path: Path
) -> None:
    words = shlex.split(command.split(" #")[0])
    done = run([COMMAND, *words[1:]], tmp_path)
    if "Jupiter" in shown:
        assert "Jupiter" in done.stdout
    if shown and "..." not in shown:
        assert shown.strip() in done.stdout


@pytest.mark.parametrize(
    "command",
    [command for command, _ in shown_commands() if command.split()[1] in ("plan", "audit")],
)
def test_a_command_that_proves_something_runs(command: str, tmp_path: Path) -> None:
    done = run([COMMAND, *shlex.split(command)[1:]], tmp_path)
    assert "layers.*.mlp.down_proj" in done.stdout and "all-reduce" in done.stdout


@pytest.mark.parametrize("model", ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_the_training_commands_of_the_readme_run(model: str, tmp_path: Path) -> None:
    """On a tiny model; tests/test_train_smollm2.py has the trained one trained and exported."""
    train, report = (
        command
        for command, _ in shown_commands()
        if command.startswith(("parallama train", "parallama report"))
    )
    assert "--steps 20" in train and "--model smollm2" in train
    words = shlex.split(train.replace("--steps 20", "--steps 2"))[1:]
    if model == "tiny":
        words[words.index("smollm2")] = train_models.make(tmp_path / "tiny")
        words += ["--too_long", "truncate"]  # its tokens are letters and little more
    run([COMMAND, *words, "--cache", str(tmp_path / "cache")], tmp_path)
    done = run([COMMAND, *shlex.split(report)[1:]], tmp_path)
    assert (
        "tokens/s" in done.stdout
        and (tmp_path / "run" / "report.html").exists()
        and (tmp_path / "run" / "model" / "config.json").exists()
    )


@pytest.mark.slow
def test_the_bench_commands_of_the_readme_run_on_a_smaller_model(tmp_path: Path) -> None:
    commands = [command for command, _ in shown_commands() if command.startswith("parallama bench")]
    assert len(commands) == 2
    for command in commands:
        done = run([COMMAND, *shlex.split(command.replace("l200", "tiny"))[1:]], tmp_path)
    assert "decode" in done.stdout and "hf-tp" in done.stdout


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT))) or ["README.md"])
def test_files_that_the_readme_links_to_are_there(link: str) -> None:
    assert (README.parent / link).exists()


def test_options_that_the_readme_names_are_those_of_the_command() -> None:
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "TERM")} | {
        "COLUMNS": "200"
    }
    shown = ""
    for command in (
        "generate",
        "chat",
        "plan",
        "audit",
        "validate",
        "verify",
        "inspect",
        "doctor",
        "bench",
        "eval",
    ):
        shown += subprocess.run(
            [COMMAND, command, "--help"],
            capture_output=True,
            text=True,
            timeout=60,
            env=kept,
            check=True,
        ).stdout
    known = set(re.findall(r"--[a-z][a-z-]+", shown))
    lines = [
        line
        for line in TEXT.splitlines()
        if line.startswith("| `--") or "parallama generate" in line or "parallama bench" in line
    ]
    named = {option for line in lines for option in re.findall(r"--[a-z][a-z-]+", line)}
    assert named and named <= known
