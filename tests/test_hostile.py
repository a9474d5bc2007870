"""Whatever is in a model folder, it loads, or it is an error in at most three lines that name the file and the tensor; the table is `broken_folders`."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from broken_folders import CASES, Case, make, make_good

from parallama import finite
from parallama.checkpoint import SafetensorsFolder
from parallama.errors import CheckpointError
from parallama.llm import eos_ids
from parallama.loading import make_skeleton

LIMIT_S = 10


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_good(tmp_path_factory.mktemp("good") / "model")


def everything(folder: Path) -> SafetensorsFolder:
    """All that loading does with a folder, but for the devices."""
    checkpoint = SafetensorsFolder(folder)
    tokenizer = checkpoint.tokenizer()
    eos_ids(checkpoint.generation.get("eos_token_id", checkpoint.config.eos_token_id), tokenizer, checkpoint.spec.vocab)
    make_skeleton(checkpoint.config)
    names = [name for name, _ in finite.finite_only(checkpoint.tensors(checkpoint.spec), checkpoint.file_of)]
    assert sorted(names) == sorted(name for name, _ in checkpoint.spec.parameters())
    return checkpoint


def check_message(error: CheckpointError, case: Case) -> None:
    message = str(error)
    assert error.exit_code == 3
    assert 1 <= len(message.splitlines()) <= 3 and all(line.isprintable() for line in message.splitlines())
    assert len(message) < 3000
    for part in case.says:
        assert part in message


def test_there_are_enough_cases():
    assert len([case for case in CASES.values() if case.says]) >= 150
    assert len([case for case in CASES.values() if not case.says]) >= 25


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.says and case.where != "chat"])
def test_a_broken_folder_is_an_error_in_three_lines(name, good, tmp_path):
    case = make(name, tmp_path / "model", good)
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        everything(tmp_path / "model")
    check_message(caught.value, case)
    assert time.monotonic() - began < LIMIT_S


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.says])
def test_a_legal_folder_loads(name, good, tmp_path):
    make(name, tmp_path / "model", good)
    everything(tmp_path / "model")
