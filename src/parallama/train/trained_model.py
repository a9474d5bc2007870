"""What a run leaves at its end: the trained model, and its adapter by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from ..errors import RunError, cause, lines
from ..files.checkpoint import Checkpoint
from ..files.export import export_weights
from ..files.locate import SHIPPED, locate
from .torch_xla.lora import save_adapter

if TYPE_CHECKING:
    from .trainer import Trainer

MODEL, ADAPTER = "model", "adapter"


def export_model(trainer: Trainer, source: Checkpoint, name: str, run: Path, state: str) -> Path:
    """Write the model as a folder that transformers loads, in float32, as it was trained.

    Adapters are merged. They are also written by themselves, for PEFT.

    Args:
        name: of the model that was trained.
        run: the run's folder.
        state: which checkpoint there is to go back to, in words.

    Raises:
        RunError: it cannot be written.
    """
    folder, lora = run / MODEL, trainer.options.lora
    try:
        if lora is not None:
            save_adapter(run / ADAPTER, trainer.adapters(), lora, lasting_name(name))
        if not folder.exists():  # a run that is complete may be resumed once more
            export_weights(trainer.host_parameters(), source, folder, dtype=torch.float32)
    except RunError as error:
        raise _unwritten(str(error).splitlines()[0], state) from None
    except (OSError, SafetensorError) as error:
        raise _unwritten(f"the adapter cannot be written: {cause(error)}", state) from None
    return folder


def lasting_name(model: str) -> str:
    """A model's name that means the same from any folder: paths become absolute."""
    located = locate(model)
    return model if located.kind == "hub" or model in SHIPPED else str(located.path.resolve())


def _unwritten(what: str, state: str) -> RunError:
    return RunError(
        lines(
            what,
            state,
            "make room in a folder that is writable, then run again with --resume auto",
        )
    )
