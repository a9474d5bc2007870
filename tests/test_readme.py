"""What README and guides show works as it stands there. docs/testing.md says how."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from guide_process import GuideProcess
from guides import DOCS, GUIDES, LANGUAGES, README, ROOT, Block, Shown, blocks, commands, prints
from json_documents import documents
from json_reference import Document, differences

COMMAND = str(Path(sys.executable).with_name("parallama"))
README_WORDS = 900
PAGES = [README, *sorted(DOCS.rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
HISTORY = {DOCS / "design.md", DOCS / "history" / "log.md", DOCS / "history" / "field.md"}
GUIDANCE = [page for page in PAGES if page not in HISTORY]
"""Pages that say what there is; others also say what isn't, or was."""


@pytest.fixture(scope="module")
def described() -> dict[str, Document]:
    return documents()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, GuideProcess]]:
    """By whether they keep the HLO of their programs; started when they are first asked for."""
    home = tmp_path_factory.mktemp("guides")

    class Processes(dict[bool, GuideProcess]):
        def __missing__(self, keep_hlo: bool) -> GuideProcess:
            made = self[keep_hlo] = GuideProcess(home / f"home-{keep_hlo}", keep_hlo=keep_hlo)
            return made

    made = Processes()
    yield made
    for process in made.values():
        process.stop()


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with SmolLM2's heads, tokenizer and chat template."""
    from reference import make_model

    from parallama.files.find import find

    folder = tmp_path_factory.mktemp("stand-in") / "model"
    made = make_model(heads=9, kv_heads=3, hidden=72, intermediate=96, vocab=49152, tied=True)
    made.save_pretrained(folder)
    tokenizer = find("smollm2").tokenizer()
    assert tokenizer is not None
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PJRT_", "XLA_", "CPU_NUM_", "TF_CPP_"))
    }
    return subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env=kept,
        stdin=subprocess.DEVNULL,
    )


def of_language(file: Path, language: str) -> list[Block]:
    return [block for block in blocks(file) if block.language == language]


@pytest.mark.parametrize("model", ["stand-in", pytest.param("smollm2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_works_from_its_first_block_to_its_last(
    guide: str,
    model: str,
    stand_in: str,
    processes: dict[bool, GuideProcess],
    described: dict[str, Document],
    tmp_path: Path,
) -> None:
    shown = [each for block in of_language(DOCS / guide, "console") for each in commands(block)]
    process = processes[any(each.words[1] == "audit" for each in shown)]
    real = model == "smollm2"
    for block in blocks(DOCS / guide):
        if block.title:
            (tmp_path / block.title).write_text(block.body, encoding="utf-8")
        elif block.language == "python":
            code = block.body if real else block.body.replace('"smollm2"', repr(stand_in))
            done = process.run(tmp_path, code=code, where=block.where)
            assert done["code"] == 0, f"{block.where}\n{done['out']}\n{done['err']}"
        elif block.language == "console":
            for each in commands(block):
                if each.words[1] != "bench" or "--make" in each.words or real:
                    carry_out(each, process, tmp_path, described, None if real else stand_in)
    log = tmp_path / "run" / "log.jsonl"
    if log.exists():
        for line in log.read_text().splitlines():
            assert differences(described["The log of a run"], json.loads(line)) == []


def carry_out(
    shown: Shown,
    process: GuideProcess,
    folder: Path,
    described: dict[str, Document],
    stand_in: str | None,
) -> None:
    """Run a command, and hold its exit code, its output and its document against what is shown."""
    assert shown.words[0] == "parallama"
    words = [stand_in if stand_in and word == "smollm2" else word for word in shown.words[1:]]
    if "--backend" in words:  # another one than the process has
        done = run([COMMAND, *words], folder)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        answer = process.run(folder, words=words, stdin=shown.stdin)
        code, out, err = answer["code"], answer["out"], answer["err"]
    assert code == shown.code, f"{shown.line}\n{out[-2000:]}\n{err[-2000:]}"
    if shown.file:
        (folder / shown.file).write_text(out, encoding="utf-8")
    elif stand_in is None or "smollm2" not in shown.words:
        assert prints(out + err, shown.output), f"{shown.line}\n{out}\n{err}"
    if shown.as_json:
        document = json.loads(out)
        if words[:2] == ["bench", "--make"]:
            assert set(document) == {"folder", "shape", "parameters"}
            return
        for part in document.get("phases", [document]):
            assert differences(described[shown.title], part) == []


@pytest.mark.parametrize(
    "shown",
    [
        each
        for block in of_language(README, "console")
        for each in commands(block)
        if each.words[0] == "parallama"
    ],
    ids=lambda shown: " ".join(shown.words[:2]),
)
def test_a_command_of_the_readme_prints_what_is_shown(shown: Shown, tmp_path: Path) -> None:
    done = run([COMMAND, *shown.words[1:]], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert prints(done.stdout, shown.output), done.stdout


@pytest.mark.parametrize("block", of_language(README, "python"), ids=lambda block: block.where)
def test_python_of_the_readme_runs(block: Block, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(block.body, encoding="utf-8")
    done = run([sys.executable, "example.py"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Paris" in done.stdout


def test_the_demo_of_the_readme_is_what_make_demo_runs() -> None:
    (shown,) = (
        each
        for block in of_language(README, "console")
        for each in commands(block)
        if each.words[:2] == ("parallama", "generate")
    )
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if "parallama generate" in line)
    assert shlex.split(line.partition("parallama ")[2]) == list(shown.words[1:])


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= README_WORDS


@pytest.mark.parametrize("page", GUIDANCE, ids=lambda page: page.name)
def test_pages_have_lines_of_at_most_100_columns(page: Path) -> None:
    """But tables, code and addresses."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    long = [
        line
        for line in text.splitlines()
        if len(line) > 100 and not line.startswith("|") and "](" not in line
    ]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    """Files and their headings; `mkdocs build --strict` knows only what is in docs/."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s:]+)\)", text):
        name, _, heading = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading and not heading.startswith("parallama."):
            assert heading in headings(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", GUIDANCE, ids=lambda page: page.name)
def test_files_of_the_repository_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:tests|docs|src|benchmarks)/[\w/.-]*\w", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    for name in re.findall(r"`((?:model|plan|files|engine|cli|prove|train)/[\w/]+\.py)`", text):
        assert (ROOT / "src" / "parallama" / name).exists(), f"{page.name} names {name}"


def headings(file: Path) -> set[str]:
    """The anchors of a page, as GitHub and mkdocs both make them."""
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in titles)
    return {re.sub(r"[\s-]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_that_are_not_run_need_another_machine_a_network_or_minutes(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, block.where
        assert not (block.language == "sh" and "$ " in block.body), block.where
    if page.parent == DOCS:
        lines = [line for block in of_language(page, "sh") for line in block.body.splitlines()]
        ours = [line for line in lines if line.startswith("parallama")]
        for line in ours:
            assert re.search(r"--backend (tpu|tt)|--tasks arc_easy|l200|^parallama serve", line), (
                line
            )


def test_options_in_a_table_are_those_of_a_command() -> None:
    import typer

    from parallama.cli import app

    group: Any = typer.main.get_command(app)
    known = {
        name
        for command in group.commands.values()
        for option in command.params
        for name in (*option.opts, *option.secondary_opts)
    }
    assert "--mesh" in known
    for page in GUIDANCE:
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("| `--"):
                named = set(re.findall(r"--[a-z][a-z.-]+", line.split("|")[1]))
                assert named <= known, f"{page.name}: {named - known}"


def test_the_hooks_of_pre_commit_are_the_checks_of_make_check() -> None:
    """The checks, without the paths that pre-commit gives them itself; none is fetched."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [each["repo"] for each in config["repos"]] == ["local"]
    hooks = {hook["entry"].partition(".venv/bin/")[2] for hook in config["repos"][0]["hooks"]}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = re.findall(r"^(?:check|docs):.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    checks = {line.partition("$(RUN)/")[2] for rule in rules for line in rule.splitlines()}
    assert {check.split(" src")[0] for check in checks} == hooks


def test_the_reference_has_every_public_name() -> None:
    import parallama

    text = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: parallama\.(\w+)$", text, re.MULTILINE)
    assert sorted([*named, "__version__"]) == sorted(parallama.__all__)


def test_guides_show_the_document_of_every_command(described: dict[str, Document]) -> None:
    shown = {
        each.title
        for guide in GUIDES
        for block in of_language(DOCS / guide, "console")
        for each in commands(block)
        if each.as_json
    }
    # A benchmark of servers needs one: its document is read in test_bench_serve.
    commands_of = {title for title in described if title.startswith("parallama")}
    assert shown == commands_of - {"parallama bench --serve"}
