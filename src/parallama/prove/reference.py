"""transformers' own answers, from one device and without XLA, in a process of its own; they come back as safetensors.

Run as `python -m parallama.prove.reference FOLDER` by `Reference`; the request stands in `FOLDER/request.json`. A process of its own, because a host backward and XLA
devices don't go together in one, and so that nothing of what is checked takes part.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..errors import ParallamaError, RunError, cause, lines
from ..files import skeleton
from ..files.find import find
from ..model.spec import ModelSpec
from ..sharded import loading
from .activations import points, tapped

FLOAT32 = "float32"
LIMIT_S = 3600.0
_REQUEST = "request.json"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to compute.

    Attributes:
        model: folder, `.gguf` file, hub id or shipped name.
        ids: one text's tokens.
        prefill: so many of them are taken in at once, the others one by one.
        traced: so many of the first ones are run with every point's output kept, and with gradients.
        gradients: whether to compute them.
        dtype: of the run that is held against this; where it isn't float32, logits come in both.
    """

    model: str
    ids: tuple[int, ...]
    prefill: int
    traced: int
    gradients: bool
    dtype: str


def compute(request: Request, folder: Path) -> None:
    """Write `float32.safetensors` (and one of the run's dtype) with `prefill` `[S, V]` and `decode` `[N, V]`, `points.safetensors` and `gradients.safetensors`."""
    from safetensors.torch import save_file

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            folder / f"{name}.safetensors",
        )

    checkpoint = find(request.model)
    model = skeleton.to_host(checkpoint, torch.float32)
    ids = torch.tensor([request.ids])
    save(FLOAT32, _logits(model, ids, request.prefill))
    traced = ids[:, : request.traced]
    save("points", _points(model, traced, ModelSpec.from_config(checkpoint.config)))
    if request.gradients:
        # Not transformers' loss: torch's log_softmax in float32 loses so much of a large vocabulary's tail that the gradients of a trained model are off by 1e-3 (see `loss`).
        logits = model(input_ids=traced, use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits.double(), traced[0, 1:]).backward()
        save("gradients", {name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    if request.dtype != FLOAT32:
        save(request.dtype, _logits(model.to(loading.DTYPES[request.dtype]), ids, request.prefill))


def _logits(model: Any, ids: torch.Tensor, prefill: int) -> dict[str, torch.Tensor]:
    _forget(model)
    with torch.no_grad():
        out = model(ids[:, :prefill], use_cache=True)
        found = {"prefill": out.logits[0].float()}
        steps = []
        for token in ids[0, prefill:]:
            out = model(token[None, None], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits[0, -1].float())
    return found | ({"decode": torch.stack(steps)} if steps else {})


def _points(model: Any, ids: torch.Tensor, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Every point's output, `[S, W]`."""
    _forget(model)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, tensor: torch.Tensor) -> None:
        seen[name] = tensor[0]

    with torch.no_grad(), tapped(points(spec), model.get_submodule, keep):
        model(ids, use_cache=False)
    return seen


def _forget(model: Any) -> None:
    """A new rotary embedding: some of them remember the longest text so far, and all would be cast to the model's dtype."""
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)


class Answers:
    """What `compute` wrote into a folder, read one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def logits(self, part: str, dtype: str = FLOAT32) -> torch.Tensor:
        """`prefill` or `decode`, `[N, V]`."""
        return self._read(dtype, part)

    def point(self, name: str) -> torch.Tensor:
        """`[S, W]`."""
        return self._read("points", name)

    def gradient(self, name: str) -> torch.Tensor:
        """A parameter's gradient, as in the checkpoint."""
        return self._read("gradients", name)

    def _read(self, file: str, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._folder / f"{file}.safetensors", framework="pt") as handle:
            return handle.get_tensor(name)


class Reference:
    """A process that computes the answers to a request while others do other things. A context manager: at its end process and files are gone.

    Raises:
        RunError: from `answers`, if the process failed or took longer than an hour.
    """

    def __init__(self, request: Request) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="parallama-reference-")
        self._folder = Path(self._temporary.name)
        self._log = self._folder / "log"
        (self._folder / _REQUEST).write_text(json.dumps(asdict(request)), encoding="utf-8")
        # -P: what lies in the user's folder is not to be imported in place of a package.
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "parallama.prove.reference", str(self._folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def answers(self) -> Answers:
        """Wait until they are there."""
        try:
            code = self._process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise RunError(
                lines(
                    f"the reference took more than {LIMIT_S:.0f} s",
                    "expected a smaller model, or fewer tokens",
                )
            ) from None
        if code:
            words = [
                line.strip()
                for line in self._log.read_text(errors="replace").splitlines()
                if line.strip()
            ]
            raise RunError(
                lines(
                    f"the reference process ended with exit code {code}",
                    words[-1][:200] if words else "it said nothing",
                )
            )
        return Answers(self._folder)

    def __enter__(self) -> Reference:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._temporary.cleanup()


def main(arguments: list[str], say: Callable[[str], object] = sys.stderr.write) -> int:
    """Answer the request in the folder that is named; returns the exit code."""
    if len(arguments) != 1:
        say("this is started by `parallama validate`; expected one argument, a folder\n")
        return 2
    folder = Path(arguments[0])
    try:
        request = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
        compute(Request(**(request | {"ids": tuple(request["ids"])})), folder)
    except Exception as error:
        say(
            f"{str(error).splitlines()[0] if isinstance(error, ParallamaError) else f'{type(error).__name__}: {cause(error)}'}\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
