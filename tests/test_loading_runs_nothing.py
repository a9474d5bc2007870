"""Loading runs no code of a checkpoint, and no program but this package's own modules.

The source says so, and so does Python's own audit while folders are loaded.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from broken_folders import SINGLE, make
from forks import environment
from test_layers import SOURCE, imports, own_imports, place, report

HERE = Path(__file__).parent
RUNNERS = {
    "subprocess",
    "multiprocessing",
    "runpy",
    "code",
    "codeop",
    "pty",
    "socket",
    "concurrent.futures.process",
    "webbrowser",
    "pickle",
    "marshal",
}


OWN_MODULES = {"isolated_process", "files/bounded_process"}
"""What starts modules of this package, to bound what a tokenizer takes."""


def test_no_module_that_reads_checkpoints_can_start_a_process_but_of_this_package():
    waiting, seen, problems = ["files/checkpoint", "files/gguf_file"], set(), []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = SOURCE / f"{name}.py"
        if name in OWN_MODULES:
            text = path.read_text(encoding="utf-8")
            assert text.count("Popen(") == text.count("Popen(\n") == 1
            assert '[sys.executable, "-P", "-m", ' in text
            continue
        problems += [
            f"{place(path, node)}: imports {other}"
            for node, other in imports(path)
            if other in RUNNERS or other.split(".")[0] in RUNNERS
        ]
        waiting += [other for _, other in own_imports(path)]
    reached = {"model_files", "weight_files", "tokenizer_files", "safetensors_header"}
    assert {f"files/{name}" for name in reached} <= seen
    report(problems)


class Evil:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = []
    for name in (
        "as it is",
        "shards",
        "config: auto_map",
        "config: keys that name code",
        "config: internal keys",
    ):
        made.append(tmp_path / name.replace(" ", "_").replace(":", ""))
        make(name, made[-1])
    for name in (
        "tokenizer config: a class of its own",
        "tokenizer config: vocab_file elsewhere",
        "tokenizer_config.json is a link out of the folder",
    ):
        made.append(tmp_path / name.replace(" ", "_").replace(":", ""))
        make(name, made[-1])
    make("extra files", tmp_path / "extra")
    for file in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin"):
        (tmp_path / "extra" / file).write_bytes(pickle.dumps(Evil(tmp_path / "unpickled")))
    make("as it is", tmp_path / "pickled")
    (tmp_path / "pickled" / SINGLE).write_bytes(pickle.dumps(Evil(tmp_path / "unpickled")))
    for folder in (*made, tmp_path / "extra"):
        for module in (
            "evil",
            "configuration_evil",
            "modeling_evil",
            "tokenization_evil",
            "sitecustomize",
        ):
            (folder / f"{module}.py").write_text(
                f"import os\nos.mkdir({str(tmp_path / 'imported')!r})\n", encoding="utf-8"
            )
    return [*made, tmp_path / "extra", tmp_path / "pickled"]


def test_nothing_of_a_checkpoint_is_run_and_nothing_outside_is_opened(folders, tmp_path):
    command = [sys.executable, "-P", str(HERE / "loading_audit.py"), *map(str, folders)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(),
        stdin=subprocess.DEVNULL,
        cwd=folders[0],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [outcome.split(",")[0] for outcome in found["outcomes"]] == [
        *["21 tensors"] * 5,
        *("refused", "21 tensors", "refused"),
        *("21 tensors", "refused"),
    ]
    assert found["opened"] > 10
    assert found["noted"] == []
    assert found["outside"] == []
    assert not (tmp_path / "unpickled").exists() and not (tmp_path / "imported").exists()
