"""What `parallama verify` finds in a model folder or file, without devices.

It reports everything that loading would refuse, every weight that is not finite, and every file
that is not as its manifest says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import manifest, nonfinite
from ..files.checkpoint import Checkpoint
from ..files.find import find
from ..files.locate import locate
from ..files.skeleton import make_skeleton
from ..model.config_checks import check_vocabulary, eos_ids
from ..model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong.

    Attributes:
        check: `structure` (config, headers, index, shapes, dtypes), `tensors`, `tokenizer` or
            `manifest`.
        message: in at most three lines, with file and tensor.
    """

    check: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found of a model.

    Attributes:
        tensors: parameters that were read.
        parameters: their numbers together.
        dtypes: dtype as stored -> how many parameters have it.
        ignored: tensors and files that loading does not read -> why.
        manifest_files: files that were checked against the manifest; None if there is none.
        findings: what is wrong.
        notes: what is sound, and done otherwise than one may expect.
    """

    model: str
    model_type: str | None
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    ignored: Mapping[str, str]
    manifest_files: int | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the verdict."""
        return asdict(self) | {
            "ignored": [{"name": name, "reason": reason} for name, reason in self.ignored.items()],
            "passed": self.passed,
        }


class _Findings(list[Finding]):
    """What is wrong so far."""

    def attempt(self, check: str, action: Callable[[], Any]) -> Any:
        """What an action returns; None, and a finding more, where it refuses."""
        try:
            return action()
        except CheckpointError as error:
            self.append(Finding(check=check, message=str(error)))
            return None


def verify(model: str, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Check all that can be checked of a model without devices. Each tensor is read once.

    Args:
        model: folder, `.gguf` file, hub id or shipped name.
        progress: called with the number of tensors done, and of all.

    Raises:
        CheckpointError: there is no such model.
    """
    located, findings = locate(model), _Findings()
    if located.kind == "file" and located.path.suffix != ".gguf":
        find(model)  # says what is expected
    checkpoint: Checkpoint | None = findings.attempt("structure", lambda: find(model))
    dtypes: Counter[str] = Counter()
    numbers = 0
    notes: tuple[str, ...] = ()
    if checkpoint is not None:
        notes = _check_config(checkpoint, findings)

        def read(checkpoint: Checkpoint) -> None:
            nonlocal numbers
            spec = ModelSpec.from_config(checkpoint.config)
            total = sum(1 for _ in spec.parameters())
            for done, (name, tensor) in enumerate(checkpoint.tensors(spec), 1):
                dtypes[str(tensor.dtype).removeprefix("torch.")] += 1
                numbers += tensor.numel()
                file = checkpoint.file_of(name)
                # No run keeps weights in more than float32.
                refuse = partial(nonfinite.refuse, name, tensor, file, torch.float32)
                findings.attempt("tensors", refuse)
                if progress is not None:
                    progress(done, total)

        findings.attempt("tensors", partial(read, checkpoint))
    manifest_files = None
    if located.kind == "folder":
        manifest_files = _check_manifest(located.path, findings)
    return Verification(
        model=model,
        model_type=None if checkpoint is None else checkpoint.config.model_type,
        tensors=sum(dtypes.values()),
        parameters=numbers,
        dtypes=dict(dtypes),
        ignored={} if checkpoint is None else checkpoint.ignored,
        manifest_files=manifest_files,
        findings=tuple(findings),
        notes=notes,
    )


def _check_config(checkpoint: Checkpoint, findings: _Findings) -> tuple[str, ...]:
    """Check that a model can be made, and that its tokenizer and end-of-text ids fit it.

    Returns:
        What the tokenizer's files disagree on.
    """
    config, vocab = checkpoint.config, ModelSpec.from_config(checkpoint.config).vocab
    findings.attempt("structure", lambda: make_skeleton(config))
    tokenizer = findings.attempt("tokenizer", checkpoint.tokenizer)
    findings.attempt("tokenizer", lambda: check_vocabulary(tokenizer, vocab))
    ids = checkpoint.generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    findings.attempt("tokenizer", lambda: eos_ids(ids, tokenizer, vocab))
    return tuple(getattr(tokenizer, "notes", ()))


def _check_manifest(folder: Path, findings: _Findings) -> int | None:
    """Check every file of a manifest; gives their number, None if there is no manifest."""
    entries: Mapping[str, manifest.Entry] | None = findings.attempt(
        "manifest", lambda: manifest.read(folder)
    )
    if entries is None:
        return None
    for name, entry in entries.items():
        findings.attempt("manifest", partial(manifest.check_file, folder, name, entry))
    return len(entries)
