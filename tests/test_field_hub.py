"""Repositories of a hub as people fill them: what is downloaded of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_hub
import forks
import pytest
from broken_folders import INDEX, SINGLE, make_good, make_sharded
from messages import says

FIND = """
import json, sys
from parallama.errors import CheckpointError
from parallama.files.find import find

said = {}
for name in sys.argv[1:]:
    try:
        found = find(name)
        said[name] = [sum(1 for _ in found.tensors(found.spec)), found.tokenizer() is not None]
    except CheckpointError as error:
        said[name] = str(error)
print(json.dumps(said))
"""
SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def clutter(folder: Path) -> None:
    """What repositories hold besides: the same weights for other programs, pictures, a demo."""
    (folder / "consolidated.safetensors").write_bytes(b"c" * 100_000)
    (folder / "pytorch_model.bin").write_bytes(b"p" * 100_000)
    (folder / "README.md").write_text("a model")
    for name in ("onnx/config.json", "onnx/tokenizer.json", "original/params.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "original" / "tokenizer.model").write_bytes(b"t" * 1000)
    (folder / "original" / SINGLE).write_bytes(b"o" * 1000)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each repository gave, and the hub that sent it."""
    root = tmp_path_factory.mktemp("hub")
    sharded, single = make_good(root / "org/shards"), make_good(root / "org/single")
    make_sharded(sharded)
    for folder in (sharded, single):
        clutter(folder)
    (sharded / "additional_chat_templates").mkdir()
    (sharded / "additional_chat_templates" / "tools.jinja").write_text("tools")
    for name, file in (("pickles", "pytorch_model.bin"), ("ggufs", "tiny-Q4_K_M.gguf")):
        folder = make_good(root / "org" / name)
        (folder / SINGLE).rename(folder / file)
    names = [f"org/{path.name}" for path in sorted((root / "org").iterdir())]
    home = tmp_path_factory.mktemp("home")
    with fake_hub.serve(root) as hub:
        changed = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | changed
        done = subprocess.run(
            [sys.executable, "-c", FIND, *names],
            capture_output=True,
            text=True,
            env=environment,
            timeout=forks.LIMIT_S,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), hub, root


def test_of_weights_only_the_files_that_the_index_names_are_downloaded(found):
    told, hub, root = found
    assert told["org/shards"] == [21, True]
    folder = root / "org/shards"
    shards = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    templates = {"chat_template.jinja", "additional_chat_templates/tools.jinja"}
    wanted = SMALL | templates | shards | {INDEX}
    assert hub.files_of("org/shards") == {name: (folder / name).stat().st_size for name in wanted}


def test_without_an_index_the_single_file_is_downloaded_and_no_other(found):
    told, hub, root = found
    assert told["org/single"] == [21, True]
    wanted = SMALL | {"chat_template.jinja", SINGLE}
    assert hub.files_of("org/single") == {
        name: (root / "org/single" / name).stat().st_size for name in wanted
    }


@pytest.mark.parametrize(
    ("name", "file"), [("pickles", "pytorch_model.bin"), ("ggufs", "tiny-Q4_K_M.gguf")]
)
def test_a_repository_without_safetensors_is_refused_before_its_weights_come(found, name, file):
    told, hub, _ = found
    assert says(told[f"org/{name}"], f"'org/{name}'", file, SINGLE)
    assert file not in hub.files_of(f"org/{name}")
