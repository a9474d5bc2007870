"""What a plan is asked to run: its sizes, checked, and the memory they need. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import UsageError, lines
from ..model.known_configs import ITEMSIZES
from ..model.spec import ModelSpec
from .cost import Memory, memory
from .hardware import Hardware
from .placement import Plan
from .train_collectives import TrainStep

DEFAULT_PROMPT = 512
_MOST_ROWS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a plan is asked to run.

    Attributes:
        batch: rows over all devices.
        seq: tokens of each prompt, or of each row in training.
        max_model_len: positions of the cache, prompt and answer together.
        dtype: of weights, cache and activations: a name of `known_configs.ITEMSIZES`.
        stored_dtype: of the checkpoint, if its config says so.
        train: forecast this training step too; its sizes are those of the request.
        optimizer_slots: numbers that the optimizer keeps for each trained one.
        hardware: to say whether it fits.
    """

    batch: int
    seq: int
    max_model_len: int
    dtype: str
    stored_dtype: str | None = None
    train: TrainStep | None = None
    optimizer_slots: int = 2
    hardware: Hardware | None = None

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]

    @property
    def rematerialized_layers(self) -> int:
        """Layers that the training step computes twice; 0 without one."""
        return 0 if self.train is None else len(self.train.rematerialized)

    def train_step(self) -> TrainStep:
        """The training step of the request's sizes; a plain one if none is asked for."""
        sizes: dict[str, Any] = {
            "batch": self.batch,
            "seq": self.seq,
            "itemsize": self.itemsize,
        }
        return TrainStep(**sizes) if self.train is None else replace(self.train, **sizes)

    def memory(self, plan: Plan) -> Memory:
        """Bytes on each device while the batch runs."""
        return memory(
            plan,
            batch=self.batch,
            max_model_len=self.max_model_len,
            itemsize=self.itemsize,
        )

    def check(self, model: ModelSpec) -> None:
        """Raise `UsageError` if a number is out of the model's range."""
        for name, value, most, limit in (
            ("--batch", self.batch, _MOST_ROWS, ""),
            (
                "--max-model-len",
                self.max_model_len,
                model.max_positions,
                ", the model's maximum",
            ),
            ("--seq", self.seq, self.max_model_len, ", the maximum length"),
        ):
            if not 1 <= value <= most:
                raise UsageError(lines(f"{name} is {value}", f"expected 1 to {most}{limit}"))
