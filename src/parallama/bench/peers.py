"""What people run without this package, to compare with.

transformers eager, compiled, and tensor-parallel over processes.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..errors import RunError, cause, lines
from ..files.checkpoint import SafetensorsFolder
from ..files.find import find
from ..model.spec import ModelSpec

_CLOSE, _PREFILL, _DECODE = range(3)
_WARM_STEPS = 3


def load(model: str, dtype: torch.dtype, split: Any = None) -> Any:
    """The transformers causal LM on the host, ready for inference, with its default attention.

    Args:
        model: folder, `.gguf` file, hub id or shipped name.
        split: transformers' `DistributedConfig`.

    Raises:
        CheckpointError: there is no such model, or it cannot be loaded.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    checkpoint = find(model)
    config = checkpoint.config
    folder = checkpoint.location if isinstance(checkpoint, SafetensorsFolder) else None
    tensors = None if folder else dict(checkpoint.tensors(ModelSpec.from_config(config)))
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    loaded = model_class.from_pretrained(
        folder,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        attn_implementation="sdpa",
        distributed_config=split,
    )
    return loaded.eval()


def next_token(forward: Callable[..., Any], ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The greedy token after `[B, S]` ids that follow what is in the cache, `[B]`."""
    out = forward(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1)


def _one_process(peer: str, devices: int) -> None:
    if devices != 1:
        raise RunError(
            lines(f"peer {peer} on {devices} devices", "expected 1: it does not split a model")
        )


class HF:
    """transformers as it comes: eager, `DynamicCache`, sdpa.

    Its greedy loop has less around it than `generate` has.

    Args:
        model: see `load`.
        devices: 1.
        dtype: of weights and cache.
        threads: torch's.

    Raises:
        RunError: more than one device.
        CheckpointError: see `load`.
    """

    def __init__(self, model: str, devices: int, dtype: torch.dtype, threads: int) -> None:
        _one_process("hf", devices)
        torch.set_num_threads(threads)
        self._model = load(model, dtype)

    def prepare(self, batch: int, prompt: int, steps: int) -> None:
        """Nothing: the cache grows with what it is given."""

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Start anew with prompts of one length; returns each row's first greedy token."""
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        return self._run(torch.tensor(prompts))

    def decode(self) -> list[int]:
        """The next greedy token of every row."""
        return self._run(self._token[:, None])

    def close(self) -> None:
        """Nothing: no other process was started."""

    @torch.inference_mode()
    def _run(self, ids: torch.Tensor) -> list[int]:
        self._token = next_token(self._model, ids, self._cache)
        return self._token.tolist()


class StaticPeer(ABC):
    """A peer with transformers' `StaticCache`: runs only the sizes that `prepare` made room for."""

    _model: Any
    _token: torch.Tensor

    def _make_room(self, batch: int, prompt: int, steps: int) -> None:
        from transformers import StaticCache

        # Earlier cases count against dynamo's limit of recompilations, and make shapes dynamic.
        torch._dynamo.reset()
        self._shape, self._steps, self._left = (batch, prompt), steps, 0
        self._cache = StaticCache(config=self._model.config, max_cache_len=prompt + steps + 1)

    def _warm_up(self) -> None:
        """Run what was prepared until everything is compiled."""
        self.prefill([[0] * self._shape[1]] * self._shape[0])
        for _ in range(min(self._steps, _WARM_STEPS)):
            self.decode()

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Start anew with prompts `[B, S]` as prepared; returns each row's first greedy token."""
        assert {(len(prompts), len(prompt)) for prompt in prompts} == {self._shape}
        self._left = self._steps
        for layer in self._cache.layers:
            layer.cumulative_length.zero_()  # what is behind it is never looked at
        return self._run(torch.tensor(prompts))

    def decode(self) -> list[int]:
        """The next greedy token of every row; at most as often after a prefill as prepared."""
        assert self._left, "the cache ends here, and XLA would write over its last position"
        self._left -= 1
        return self._run(self._token[:, None])

    def close(self) -> None:
        """Let the cache go."""
        self._cache, self._left = None, 0

    @abstractmethod
    def _run(self, ids: torch.Tensor) -> list[int]:
        """The token after `[B, S]` ids, `[B]`; it is also kept as `_token`."""


class HFCompile(StaticPeer):
    """transformers with a static cache, as its `generate` runs it: prefill eager, decode compiled.

    Arguments and errors as `HF`.
    """

    def __init__(self, model: str, devices: int, dtype: torch.dtype, threads: int) -> None:
        from transformers import CompileConfig

        _one_process("hf-compile", devices)
        torch.set_num_threads(threads)
        self._model = load(model, dtype)
        # reduce-overhead, the default elsewhere, is about CUDA graphs: a CPU gains nothing by it.
        self._compiled = self._model.get_compiled_call(CompileConfig(mode="default"))

    def prepare(self, batch: int, prompt: int, steps: int) -> None:
        """Allocate the cache and compile the decode step for it.

        Raises:
            RunError: torch.compile fails, as it does without a C++ compiler.
        """
        self._make_room(batch, prompt, steps)
        try:
            self._warm_up()
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RunError(
                lines(f"torch.compile fails: {cause(error)}", "expected a C++ compiler, as g++")
            ) from None

    @torch.no_grad()
    def _run(self, ids: torch.Tensor) -> list[int]:
        forward = self._compiled if ids.shape[1] == 1 else self._model
        self._token = next_token(forward, ids, self._cache)
        return self._token.tolist()


class HFTP(HF):
    """transformers' own tensor parallelism (`tp_plan="auto"`): one process a device, over gloo.

    Run it under `torchrun --nproc-per-node=DEVICES`. The process whose `rank` is 0 is used as any
    peer and calls `close` at the end. The others call `follow`, which returns after that.
    transformers needs accelerate for it. Otherwise as `HF`.

    Args:
        model, dtype: as for `HF`.
        devices: as many as there are processes.
        threads: of all processes together.

    Raises:
        RunError: not under torchrun, another number of processes, no accelerate, or heads that do
            not divide over the processes.
        CheckpointError: see `load`.
    """

    def __init__(self, model: str, devices: int, dtype: torch.dtype, threads: int) -> None:
        from transformers.distributed import DistributedConfig

        self._check(model, devices)
        torch.set_num_threads(max(1, threads // devices))
        dist.init_process_group("gloo")
        if dist.get_world_size() != devices:
            raise RunError(
                lines(
                    f"peer hf-tp in {dist.get_world_size()} processes",
                    f"expected one for each of {devices} devices",
                )
            )
        self.rank = dist.get_rank()
        # `tp_plan` by itself does the same, but is deprecated.
        self._model = load(model, dtype, DistributedConfig(tp_plan="auto"))

    @staticmethod
    def _check(model: str, devices: int) -> None:
        """Refuse what cannot run, before processes meet."""
        spec = ModelSpec.from_config(find(model).config)
        for name, heads in (("query", spec.query_heads), ("KV", spec.kv_heads)):
            if heads % devices:
                raise RunError(
                    lines(
                        f"peer hf-tp: {heads} {name} heads on {devices} processes",
                        "expected a divisor of the heads",
                    )
                )
        if importlib.util.find_spec("accelerate") is None:
            raise RunError(
                lines(
                    "peer hf-tp: transformers' tp_plan needs accelerate",
                    "run: pip install accelerate",
                )
            )
        if not dist.is_torchelastic_launched():
            raise RunError(
                lines(
                    "peer hf-tp runs one process a device",
                    f"start it with: torchrun --nproc-per-node={devices}",
                )
            )

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """See `HF.prefill`; rank 0 only."""
        ids = torch.tensor(prompts)
        self._tell(_PREFILL, *ids.shape)
        dist.broadcast(ids, 0)
        return super().prefill(prompts)

    def decode(self) -> list[int]:
        """See `HF.decode`; rank 0 only."""
        self._tell(_DECODE)
        return super().decode()

    def close(self) -> None:
        """Let the other processes go and end the process group; rank 0 only."""
        self._tell(_CLOSE)
        dist.destroy_process_group()

    def follow(self) -> None:
        """Do what rank 0 does until it closes; every other rank."""
        command = torch.zeros(3, dtype=torch.int64)
        while True:
            dist.broadcast(command, 0)
            kind, *shape = command.tolist()
            if kind == _CLOSE:
                return dist.destroy_process_group()
            if kind == _PREFILL:
                ids = torch.zeros(shape, dtype=torch.int64)
                dist.broadcast(ids, 0)
                super().prefill(ids.tolist())
            else:
                super().decode()

    def _tell(self, kind: int, batch: int = 0, length: int = 0) -> None:
        dist.broadcast(torch.tensor([kind, batch, length]), 0)
