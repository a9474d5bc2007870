"""`parallama train` fine-tunes a trained model on every mesh as a plain loop of torch does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import command, environment

from parallama.files.find import find
from parallama.train.logs import read_log
from parallama.train.packing import Rows, make_batch
from parallama.train.tokens import prepare

HERE = Path(__file__).parent
SEED = 3
LAYERS = 4
# AdamW's first updates are nearly the signs of gradients, so differences of rounding grow with the
# learning rate: 1e-6 in the first loss became 1.3e-4 in the 17th of 2x4 at 1e-4.
HOW: dict[str, Any] = {
    "lr": 3e-5,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
}


@dataclass(frozen=True)
class Data:
    """The sequences of a run: how long they are, and whether they hold several documents."""

    steps: int
    packing: bool
    sequences: int = 4
    seq_len: int = 112


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first four layers of SmolLM2, with its embeddings and tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    folder, whole = tmp_path_factory.mktemp("smollm2"), find("smollm2")
    config = type(whole.config).from_dict(whole.config.to_dict() | {"num_hidden_layers": LAYERS})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    wanted = {name for name, _ in model.named_parameters()}
    tensors = {name: tensor for name, tensor in whole.tensors(whole.spec) if name in wanted}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = whole.tokenizer()
    assert tokenizer is not None and tensors.keys() == wanted
    tokenizer.save_pretrained(folder)
    return str(folder)


class PlainLoop:
    """Every step's loss and gradient norm of the plain loop, which runs once for each data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[tuple[str, Data], list[list[float]]] = {}

    def __call__(self, model: str, data: Data) -> list[list[float]]:
        if (model, data) not in self._found:
            self._found[model, data] = self._run(model, data)
        return self._found[model, data]

    def _run(self, name: str, data: Data) -> list[list[float]]:
        model = find(name)
        corpus = prepare(
            ["shipped:chat"],
            model.tokenizer(),
            seq_len=data.seq_len,
            too_long="drop",
            cache=self.folder / "cache",
        )
        rows = Rows(corpus, data.seq_len, seed=SEED, packing=data.packing)
        steps = [make_batch(rows.take(data.sequences), 1) for _ in range(data.steps)]
        several = sum(int(batch.documents.max()) > 0 for batch in steps)
        assert several > data.steps // 2 if data.packing else several == 0
        arrays = {
            name: np.concatenate([getattr(batch, name) for batch in steps])
            for name in ("ids", "labels", "documents")
        }
        np.savez(self.folder / "batches.npz", **arrays)
        # Two threads that wait for each other on a busy machine are slower than one.
        request = HOW | {"model": str(model.location), "threads": 1}
        request["batches"] = str(self.folder / "batches.npz")
        (self.folder / "request.json").write_text(json.dumps(request))
        done = subprocess.run(
            [sys.executable, str(HERE / "plain_training.py"), str(self.folder / "request.json")],
            capture_output=True,
            text=True,
            # Threads that wait for each other, spinning, are slow on a busy machine.
            env=environment() | {"OMP_WAIT_POLICY": "PASSIVE"},
            timeout=3600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PlainLoop:
    return PlainLoop(tmp_path_factory.mktemp("plain"))


PACKED, ALONE = Data(steps=20, packing=True), Data(steps=20, packing=False)
CASES: list[tuple[str, Data, dict[str, Any]]] = [
    ("2x4", PACKED, {"grad_accum": 2, "remat": "full", "fsdp": True}),
    ("1x3", PACKED, {"grad_accum": 2, "remat": "none"}),
    ("1x2", PACKED, {"grad_accum": 1, "remat": "none"}),
    ("2x4", PACKED, {"grad_accum": 1, "remat": "full"}),
    ("1x2", ALONE, {"grad_accum": 2, "remat": "full"}),
    ("1x3", ALONE, {"grad_accum": 1, "remat": 2}),
    ("2x4", ALONE, {"grad_accum": 2, "remat": "none"}),
    ("2x4", ALONE, {"grad_accum": 1, "remat": "none", "fsdp": True}),
]


@pytest.mark.parametrize(
    ("whole", "mesh", "data", "keys"),
    [
        (False, "1x2", Data(steps=2, packing=True), {"grad_accum": 2, "remat": "full"}),
        *(pytest.param(True, *case, marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_the_losses_of_a_run_are_those_of_a_plain_loop(
    plain: PlainLoop,
    four_layers: str,
    whole: bool,
    mesh: str,
    data: Data,
    keys: dict[str, Any],
    tmp_path: Path,
) -> None:
    model = "smollm2" if whole else four_layers
    out = tmp_path / "run"
    given: dict[str, Any] = {
        "model": model,
        "data": "shipped:chat",
        "out": out,
        "mesh": mesh,
        "steps": data.steps,
        "batch_size": data.sequences // keys["grad_accum"],
        "seq_len": data.seq_len,
        "packing": data.packing,
        "too_long": "drop",
        "seed": SEED,
        "lr": HOW["lr"],
        "beta2": HOW["betas"][1],
        "weight_decay": HOW["weight_decay"],
        "save_every": 0,
        "export": not whole,
        "cache": plain.folder / "cache",
    } | keys
    wanted = plain(model, data)
    options = [
        f"--{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in given.items()
    ]
    done = command(["train", *options], limit_s=3600)
    assert done.code == 0, done.err[-3000:]
    assert "0 programs after warm-up" in done.err
    entries = read_log(out)
    losses, norms = ([entry[name] for entry in entries] for name in ("loss", "grad_norm"))
    worst = [
        max(abs(mine / theirs[at] - 1) for mine, theirs in zip(ours, wanted, strict=True))
        for at, ours in enumerate((losses, norms))
    ]
    assert worst[0] < 1e-4 and worst[1] < 1e-2
    if given["export"]:
        assert json.loads((out / "model" / "config.json").read_text())["dtype"] == "float32"
        before, after = (Path(folder, "model.safetensors") for folder in (model, out / "model"))
        assert after.stat().st_size == pytest.approx(before.stat().st_size, rel=0.01)
    else:
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
