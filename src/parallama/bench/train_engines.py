"""Whole optimizer steps, for `parallama bench --train`.

Ours as `parallama train` takes them, and transformers' in a plain eager loop.
"""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any, Protocol

import torch

from ..files.find import find
from ..sharded.loading import DTYPES
from ..train.options import StepOptions


class TrainEngine(Protocol):
    """One way to take optimizer steps; it lives in a process of its own."""

    def step(self, rows: list[list[int]]) -> float:
        """One step on rows of one length.

        Returns:
            The mean loss of their tokens but each row's first, with the weights before the step.
        """
        ...

    def bytes_per_device(self) -> dict[str, list[int]]:
        """What each device holds between steps.

        Under `params`, `optimizer`, and `gradients` where they stay.
        """
        ...


class Ours:
    """`train.torch_xla.step.Trainer`, its program compiled before the first step."""

    def __init__(self, given: dict[str, Any], options: StepOptions, lr: float) -> None:
        from ..engine.interface import start
        from ..train.trainer import make_trainer

        mesh = start(
            given["mesh"], backend=given["backend"], backend_options=given["backend_options"]
        )
        self._trainer = make_trainer(
            find(given["model"]), mesh, options, allow_nonfinite=given["allow_nonfinite"]
        )
        self._trainer.compile()
        self._lr = lr

    def step(self, rows: list[list[int]]) -> float:
        """See `TrainEngine.step`."""
        import numpy as np

        from ..train.batch import Batch

        ids = np.array(rows, dtype=np.int64)[None]
        positions = np.broadcast_to(np.arange(ids.shape[2]), ids.shape).astype(np.int64)
        batch = Batch(ids=ids, labels=ids, positions=positions, documents=np.zeros_like(ids))
        return self._trainer.step(batch, self._lr).loss

    def bytes_per_device(self) -> dict[str, list[int]]:
        """See `TrainEngine.bytes_per_device`; measured on the shards."""
        return self._trainer.bytes_per_device()


class HF:
    """transformers' model in training mode, with its default attention and its own loss.

    torch's AdamW updates it, and gradients are clipped as ours are.
    """

    def __init__(self, given: dict[str, Any], options: StepOptions, lr: float) -> None:
        from .peers import load

        torch.set_num_threads(given["threads"])
        self._model = load(given["model"], DTYPES[given["dtype"]]).train()
        self._clip = options.max_grad_norm
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
        )

    def step(self, rows: list[list[int]]) -> float:
        """See `TrainEngine.step`."""
        ids = torch.tensor(rows)
        loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())

    def bytes_per_device(self) -> dict[str, list[int]]:
        """See `TrainEngine.bytes_per_device`; torch lets gradients go between steps."""
        kept = [
            tensor
            for state in self._optimizer.state.values()
            for tensor in state.values()
            if torch.is_tensor(tensor)
        ]
        return {
            "params": [sum(each.nbytes for each in self._model.parameters())],
            "optimizer": [sum(each.nbytes for each in kept)],
        }


class Served:
    """The commands of a training engine, for `worker`."""

    def __init__(self, given: dict[str, Any], versions: tuple[str, ...]) -> None:
        asked = given["train"]
        options = StepOptions(**asked["step"])
        began = time.perf_counter()
        engines: dict[str, Any] = {"parallama": Ours, "hf": HF}
        self.engine: TrainEngine = engines[given["engine"]](given, options, asked["lr"])
        self.started: dict[str, Any] = {
            "versions": {name: importlib.metadata.version(name) for name in versions},
            "start_s": time.perf_counter() - began,
        }

    def step(self, rows: list[list[int]]) -> dict[str, Any]:
        """One step, timed."""
        began = time.perf_counter()
        loss = self.engine.step(rows)
        return {"seconds": time.perf_counter() - began, "loss": loss}

    def held(self) -> dict[str, Any]:
        """What the devices hold."""
        return {"bytes_per_device": self.engine.bytes_per_device()}

    def close(self) -> None:
        """Nothing else runs."""
