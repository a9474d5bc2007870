"""What `parallama verify` finds in a model folder or file: everything that loading would refuse, every weight that is not finite, every file that is not as its manifest says. No devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import manifest, nonfinite
from ..files.checkpoint import Checkpoint
from ..files.find import find
from ..files.locate import locate
from ..files.skeleton import make_skeleton
from ..model.config_checks import eos_ids
from ..model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong.

    Attributes:
        check: `structure` (config, headers, index, shapes, dtypes), `tensors`, `tokenizer` or `manifest`.
        message: in at most three lines, with file and tensor.
    """

    check: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a model folder was found to be.

    Attributes:
        tensors: parameters that were read.
        parameters: their numbers together.
        dtypes: dtype as stored -> how many parameters have it.
        ignored: tensors and files that loading does not read -> why.
        manifest_files: files that were held against the manifest; None if there is none.
        findings: what is wrong.
    """

    model: str
    model_type: str | None
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    ignored: Mapping[str, str]
    manifest_files: int | None
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the verdict."""
        return asdict(self) | {
            "ignored": [{"name": name, "reason": reason} for name, reason in self.ignored.items()],
            "passed": self.passed,
        }


def verify(model: str, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Check all that can be checked of a model without devices. Each tensor is read once.

    Args:
        model: folder, `.gguf` file, hub id or shipped name.
        progress: called with tensors done and their number.

    Raises:
        CheckpointError: there is no such model.
    """
    located = locate(model)
    findings: list[Finding] = []

    def attempt(check: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except CheckpointError as error:
            findings.append(Finding(check=check, message=str(error)))
            return None

    if located.kind == "file" and located.path.suffix != ".gguf":
        find(model)  # says what is expected
    checkpoint: Checkpoint | None = attempt("structure", lambda: find(model))
    dtypes: Counter[str] = Counter()
    numbers = 0
    if checkpoint is not None:
        spec = ModelSpec.from_config(checkpoint.config)
        attempt("structure", lambda: make_skeleton(checkpoint.config))
        tokenizer = attempt("tokenizer", checkpoint.tokenizer)
        named = checkpoint.generation.get(
            "eos_token_id", getattr(checkpoint.config, "eos_token_id", None)
        )
        attempt("tokenizer", lambda: eos_ids(named, tokenizer, spec.vocab))

        def read() -> None:
            nonlocal numbers
            total = sum(1 for _ in spec.parameters())
            for done, (name, tensor) in enumerate(checkpoint.tensors(spec), 1):
                dtypes[str(tensor.dtype).removeprefix("torch.")] += 1
                numbers += tensor.numel()
                attempt(
                    "tensors", partial(nonfinite.refuse, name, tensor, checkpoint.file_of(name))
                )

                if progress is not None:
                    progress(done, total)

        attempt("tensors", read)
    folder = located.path if located.kind == "folder" else None
    return Verification(
        model=model,
        model_type=None if checkpoint is None else checkpoint.config.model_type,
        tensors=sum(dtypes.values()),
        parameters=numbers,
        dtypes=dict(dtypes),
        ignored=checkpoint.ignored if checkpoint is not None else {},
        manifest_files=None if folder is None else _check_manifest(folder, attempt),
        findings=tuple(findings),
    )


def _check_manifest(folder: Path, attempt: Callable[[str, Callable[[], Any]], Any]) -> int | None:
    entries: Mapping[str, manifest.Entry] | None = attempt(
        "manifest", lambda: manifest.read(folder)
    )
    if entries is None:
        return None
    for name, entry in entries.items():
        attempt("manifest", partial(manifest.check_file, folder, name, entry))
    return len(entries)
