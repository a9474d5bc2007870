"""The trained model as a folder that transformers loads."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..errors import RunError, cause, lines
from ..loading import make_skeleton


def save_model(folder: Path, source: Checkpoint, tokenizer: Any, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Write weights with the config, generation config and tokenizer of the model that they were trained from. The folder is whole, or not there.

    Args:
        folder: must not be there.
        tensors: every parameter, on the host, by the checkpoint's names.

    Raises:
        RunError: it can't be written.
    """
    model = make_skeleton(source.config)
    _, unexpected = model.load_state_dict(dict(tensors), strict=False, assign=True)
    assert not unexpected, unexpected
    model.tie_weights()
    model.config.quantization_config = None  # of a GGUF file, whose weights are plain numbers now
    del model.config.quantization_config
    made = Path(tempfile.mkdtemp(prefix=".exporting-", dir=folder.parent))
    try:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.chmod(0o755)
        made.rename(folder)
    except OSError as error:
        raise RunError(
            lines(f"the trained model cannot be written to {str(folder)!r}: {cause(error)}", "make room, then run again with --resume auto")
        ) from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
