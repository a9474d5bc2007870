"""An exported folder is the same model to earlier releases of transformers as to this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import logits, random_ids, relative_l2

from parallama.files.export import export_checkpoint
from parallama.files.find import find

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 2.0}
ROPES = {"default": {"rope_type": "default"}, "linear": LINEAR, "llama3": LLAMA3, "yarn": YARN}


def sizes(rope: str) -> dict[str, Any]:
    return {"layers": 1, "rope_parameters": ROPES[rope] | {"rope_theta": 5e5}}


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_settings_and_dtype_are_written_in_both_spellings(models, tmp_path, rope):
    tiny = models(**sizes(rope))
    export_checkpoint(find(tiny.folder), tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert ROPES[rope].items() <= config["rope_parameters"].items()
    scaling = config["rope_scaling"]
    if rope == "default":
        assert scaling is None
    elif rope == "linear":  # the first release that knew it takes these two keys alone
        assert scaling == {"type": "linear", "factor": 2.0}
    else:
        assert scaling == ROPES[rope]
    back = find(str(tmp_path / "out")).config.rope_parameters
    assert tiny.model.config.rope_parameters.items() <= back.items()


def test_a_tokenizer_that_transformers_5_saved_is_written_by_the_name_that_4_knows(tmp_path):
    source = find("smollm2")
    export_checkpoint(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["chat_template"]
    theirs, ours = source.tokenizer(), find(str(tmp_path / "out")).tokenizer()
    assert theirs is not None and ours is not None
    text = "Twelve 12 moons\n\tx"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


# The releases themselves, each in an environment of its own.

OLD = {"4.33.3": ("default", "linear"), "4.45.2": ("default", "linear", "llama3")}
"""The first that knows `rope_theta`, and the first that reads our tokenizer. (Neither stretches
YaRN by the original length.)
"""


@pytest.fixture(scope="module", params=OLD)
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A release of transformers 4 with its own dependencies, but this environment's torch."""
    where = tmp_path_factory.mktemp(request.param)
    few = ["install", "-q", "--only-binary", ":all:", "--target", str(where)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *few, f"transformers=={request.param}", "numpy<2"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if not (where / "transformers").exists():
        pytest.skip(f"transformers {request.param} cannot be installed: {done.stderr[-300:]}")
    return request.param, where


@pytest.mark.slow
def test_an_earlier_transformers_runs_what_was_exported_to_the_same_logits(old, models, tmp_path):
    version, where = old
    ids = random_ids(1, 96, 101)
    for rope in OLD[version]:
        tiny = models(**sizes(rope))
        export_checkpoint(find(tiny.folder), tmp_path / rope)
        told = run(where, tmp_path / rope, ids)
        assert told["version"] == version
        assert relative_l2(torch.tensor(told["logits"]), logits(tiny.model, ids)) < 1e-5, rope


@pytest.mark.slow
def test_an_earlier_transformers_reads_the_tokenizer_of_an_exported_gguf(old, tmp_path):
    version, where = old
    if version == "4.33.3":
        pytest.skip("its tokenizers does not know what this tokenizer.json holds")
    source = find("smollm2")
    export_checkpoint(source, tmp_path / "out", dtype="bfloat16")
    text = "Twelve 12 moons"
    told = run(where, tmp_path / "out", torch.tensor([[1, 2, 3]]), text)
    tokenizer = source.tokenizer()
    assert tokenizer is not None
    chat = [{"role": "user", "content": text}]
    assert told["dtype"] == "torch.bfloat16"
    assert told["ids"] == tokenizer(text)["input_ids"]
    assert told["chat"] == tokenizer.apply_chat_template(chat, tokenize=False)


def run(where: Path, folder: Path, ids: torch.Tensor, text: str = "") -> dict[str, Any]:
    """What a release in a folder says, with torch from here behind it on the path."""
    site = sysconfig.get_paths()["purelib"]
    code = (
        f"import sys; sys.path += [{site!r}]; import runpy; "
        f"runpy.run_path({str(Path(__file__).with_name('old_transformers.py'))!r}, "
        "run_name='__main__')"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(folder), json.dumps(ids[0].tolist()), text],
        capture_output=True,
        text=True,
        timeout=300,
        env=kept | {"PYTHONPATH": str(where), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told
