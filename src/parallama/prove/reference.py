"""transformers' own outputs, from one device and without XLA, computed in a process of its own.

`ReferenceProcess` runs `python -m parallama.prove.reference FOLDER`. The request is in
`FOLDER/request.json`, and the outputs come back as safetensors. A process of its own, because a
backward on the host and XLA devices don't go together in one, and so that nothing of what is
checked takes part.
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
from ..isolated_process import how_ended
from ..model.spec import ModelSpec
from ..sharded import loading
from .activations import activations, hooked

FLOAT32 = "float32"
LIMIT_S = 3600.0
_REQUEST = "request.json"


@dataclass(frozen=True, kw_only=True)
class ReferenceRequest:
    """What to compute.

    Attributes:
        model: folder, `.gguf` file, hub id or shipped name.
        adapter: of the model, if it has one.
        ids: the tokens of one text.
        prefill: so many of them are run at once, the others one by one.
        traced: so many of the first ones are run with every activation kept, and with gradients.
        gradients: whether to compute gradients.
        dtype: of the run that is compared with this; where it isn't float32, logits are computed
            in both.
    """

    model: str
    adapter: str | None = None
    ids: tuple[int, ...]
    prefill: int
    traced: int
    gradients: bool
    dtype: str


def compute(request: ReferenceRequest, folder: Path) -> None:
    """Write what is asked for into a folder.

    `float32.safetensors` (and one of the run's dtype) has `prefill` `[S, V]` and `decode`
    `[N, V]`. `activations.safetensors` and `gradients.safetensors` have a tensor for each name.
    """
    from safetensors.torch import save_file

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(whole, folder / f"{name}.safetensors")

    checkpoint = find(request.model, request.adapter)
    model = skeleton.to_host(checkpoint, torch.float32)
    ids = torch.tensor([request.ids])
    save(FLOAT32, _logits(model, ids, request.prefill))
    traced = ids[:, : request.traced]
    save("activations", _activations(model, traced, ModelSpec.from_config(checkpoint.config)))
    if request.gradients:
        # Not transformers' loss: torch's log_softmax in float32 loses so much of a large
        # vocabulary's tail that a trained model's gradients are off by 1e-3 (see `loss`).
        logits = model(input_ids=traced, use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits.double(), traced[0, 1:]).backward()
        save("gradients", {name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    if request.dtype != FLOAT32:
        save(request.dtype, _logits(model.to(loading.DTYPES[request.dtype]), ids, request.prefill))


def _logits(model: Any, ids: torch.Tensor, prefill: int) -> dict[str, torch.Tensor]:
    _renew_rotary(model)
    with torch.no_grad():
        out = model(ids[:, :prefill], use_cache=True)
        found = {"prefill": out.logits[0].float()}
        steps = []
        for token in ids[0, prefill:]:
            out = model(token[None, None], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits[0, -1].float())
    return found | ({"decode": torch.stack(steps)} if steps else {})


def _activations(model: Any, ids: torch.Tensor, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Every activation, `[S, W]`."""
    _renew_rotary(model)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, tensor: torch.Tensor) -> None:
        seen[name] = tensor[0]

    with torch.no_grad(), hooked(activations(spec), model.get_submodule, keep):
        model(ids, use_cache=False)
    return seen


def _renew_rotary(model: Any) -> None:
    """A new rotary embedding: some remember the longest text so far, and a cast would cast it."""
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)


class ReferenceOutputs:
    """What `compute` wrote into a folder, read one tensor at a time.

    Raises:
        RunError: from each method, if there is no such tensor.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def logits(self, part: str, dtype: str = FLOAT32) -> torch.Tensor:
        """`prefill` or `decode`, `[N, V]`."""
        return self._read(dtype, part)

    def activation(self, name: str) -> torch.Tensor:
        """`[S, W]`."""
        return self._read("activations", name)

    def gradient(self, name: str) -> torch.Tensor:
        """A parameter's gradient, as in the checkpoint."""
        return self._read("gradients", name)

    def _read(self, file: str, name: str) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._folder / f"{file}.safetensors", framework="pt") as handle:
                return handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise RunError(
                lines(
                    f"the reference's {name!r} cannot be read from {file}.safetensors: "
                    f"{cause(error)}",
                    "expected what its process has written",
                )
            ) from None


class ReferenceProcess:
    """A process that computes the outputs for a request while others do other things.

    A context manager: at its end the process and its files are gone.
    """

    def __init__(self, request: ReferenceRequest) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="parallama-reference-")
        self._folder = Path(self._temporary.name)
        self._log = self._folder / "log"
        (self._folder / _REQUEST).write_text(json.dumps(asdict(request)), encoding="utf-8")
        # -P: the user's folder is no place to import packages from.
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "parallama.prove.reference", str(self._folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def outputs(self) -> ReferenceOutputs:
        """Wait until they are computed.

        Raises:
            RunError: the process failed, or took longer than `LIMIT_S`.
        """
        try:
            code = self._process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise RunError(
                lines(
                    f"the reference took more than {LIMIT_S:g} s",
                    "expected a smaller model, or fewer tokens",
                )
            ) from None
        if code:
            said = self._log.read_text(errors="replace").splitlines()
            words = [line.strip() for line in said if line.strip()]
            raise RunError(
                lines(
                    f"the reference process {how_ended(code)}",
                    words[-1][:200] if words else "it said nothing",
                )
            )
        return ReferenceOutputs(self._folder)

    def __enter__(self) -> ReferenceProcess:
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
    """Compute the outputs for the request in the folder that is named; returns the exit code."""
    if len(arguments) != 1:
        say("this is started by `parallama validate`; expected one argument, a folder\n")
        return 2
    folder = Path(arguments[0])
    try:
        request = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
        compute(ReferenceRequest(**(request | {"ids": tuple(request["ids"])})), folder)
    except ParallamaError as error:
        say(f"{str(error).splitlines()[0]}\n")
        return 1
    except Exception as error:
        say(f"{type(error).__name__}: {cause(error)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
