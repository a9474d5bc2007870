"""A second engine: torch on the host, and transformers' own forward. It imports nothing but the
door.

A tensor on its "devices" is a list of parts, one a device. A step puts the parts together, runs on
the host, and
splits the results. It is strict where another engine might forgive: a tensor that came out of a
step again is dead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from parallama.engine.interface import (
    Axes,
    Backend,
    Compiled,
    DeviceTensor,
    Engine,
    State,
    Steps,
    Traits,
)
from parallama.engine.steps import CACHE_AXES, LOGITS_AXES, STATE_AXES, StepKey, cache_names
from parallama.errors import ProgramError, RunError, lines
from parallama.plan import heads
from parallama.plan.mesh_shape import MeshShape
from parallama.plan.placement import Blocks, Plan
from parallama.plan.program_shapes import MOST_TOP

HIDDEN = -1e30


@dataclass
class HostTensor:
    """A tensor on the devices; `parts` is empty once it is dead."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: tuple[str | None, ...]
    parts: list[torch.Tensor]

    def element_size(self) -> int:
        return self.dtype.itemsize

    def alive(self) -> list[torch.Tensor]:
        assert self.parts, "a tensor is used that a step has given back under its name"
        return self.parts


class HostEngine(Engine):
    """So many "devices", all of them host memory."""

    lock = threading.RLock()
    made = 0

    def __init__(self, shape: str | MeshShape) -> None:
        self.shape = MeshShape.parse(shape)
        self.backend = Backend(name="host", devices=self.shape.devices)
        self.traits = Traits(
            in_host_memory=True, adopts=self.shape.devices == 1, sum_bytes=1, trains=False
        )

    def reshaped(self, shape: MeshShape) -> HostEngine:
        return HostEngine(shape)

    def put_shards(self, shard: Callable[[int], torch.Tensor], axes: Axes) -> HostTensor:
        holders = self.shape.holders(tuple(axes))
        given = {device: shard(device) for device in dict.fromkeys(holders)}
        parts = [given[holder].clone() for holder in holders]
        local = parts[0].shape
        assert all(part.shape == local for part in parts) and len(local) == len(axes)
        shape = tuple(size * self.shape.size(axis) for size, axis in zip(local, axes, strict=True))
        return HostTensor(shape, parts[0].dtype, tuple(axes), parts)

    def adopt(self, tensor: torch.Tensor) -> HostTensor:
        assert self.traits.adopts and tensor.is_contiguous()
        return HostTensor(tuple(tensor.shape), tensor.dtype, (None,) * tensor.dim(), [tensor])

    def shards(self, tensor: HostTensor) -> list[torch.Tensor]:
        return [part.clone() for part in tensor.alive()]

    def parts(self, tensor: HostTensor) -> list[tuple[slice, ...]]:
        tensor.alive()
        found = []
        for device in range(self.shape.devices):
            local = self.local_slices(tensor.shape, tensor.axes, device)
            spans = (each.indices(size) for each, size in zip(local, tensor.shape, strict=True))
            found.append(tuple(slice(first, last) for first, last, _ in spans))
        return found

    def relay(self, tensor: HostTensor, axes: Axes) -> HostTensor:
        return self.put(self.fetch(tensor, tensor.axes), axes)

    def steps(
        self, skeleton: Any, plan: Plan, weights: Mapping[str, DeviceTensor], dtype: torch.dtype
    ) -> HostSteps:
        return HostSteps(skeleton, self, plan, weights, dtype)

    def compilations(self) -> int:
        return HostEngine.made

    def wait(self) -> None:
        pass

    def device_names(self) -> list[str]:
        return [f"host:{device}" for device in range(self.shape.devices)]


class HostSteps(Steps):
    """The steps of a model, by transformers' forward on the host."""

    mesh: HostEngine
    follows_span = False

    def __init__(
        self,
        skeleton: Any,
        mesh: HostEngine,
        plan: Plan,
        weights: Mapping[str, DeviceTensor],
        dtype: torch.dtype,
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.mesh, self.plan, self.weights, self.dtype = mesh, plan, weights, dtype
        self.model = AutoModelForCausalLM.from_config(
            skeleton.config, attn_implementation="eager", dtype=dtype
        ).eval()
        host = {
            placement.name: in_checkpoint(
                mesh.fetch(weights[placement.name], placement.axes), plan.blocks(placement.name)
            )
            for placement in plan.parameters
        }
        self.model.load_state_dict(host, strict=not plan.model.tied)
        self.model.tie_weights()

    def compile(self, key: StepKey, state: State) -> HostProgram:
        step = getattr(self, f"_{key.kind}")
        return HostProgram(self, lambda given: step(key, given), state)

    # -- each step: whole host tensors in, host tensors with their axes out

    def _grow(self, key: StepKey, given: Mapping[str, torch.Tensor]) -> Results:
        for name, tensor in given.items():
            longer = (0, 0, 0, key.new - tensor.shape[2])
            yield name, torch.nn.functional.pad(tensor, longer), CACHE_AXES

    def _logits(self, key: StepKey, given: Mapping[str, torch.Tensor]) -> Results:
        logits, _ = self._forward(given["ids"], given["start"], {})
        yield "logits", self._padded(logits), LOGITS_AXES

    def _score(self, key: StepKey, given: Mapping[str, torch.Tensor]) -> Results:
        logits, _ = self._forward(given["ids"], given["start"], {})
        chances = torch.log_softmax(logits, -1).gather(2, given["targets"][..., None])[..., 0]
        yield "logprobs", chances, STATE_AXES["logprobs"]
        yield "greedy", logits.argmax(-1) == given["targets"], STATE_AXES["greedy"]

    def _prefill(self, key: StepKey, given: Mapping[str, torch.Tensor]) -> Results:
        count, final = given["count"], given["final"]
        logits, written = self._forward(
            given["ids"], given["start"], self._cache(given), fresh=key.fresh
        )
        last = logits[torch.arange(key.batch), (count - 1).clamp(min=0)]
        yield from self._chosen(given, last, given["start"] + count, final)
        yield from self._cached(written)

    def _decode(self, key: StepKey, given: Mapping[str, torch.Tensor]) -> Results:
        position = given["position"]
        logits, written = self._forward(given["token"][:, None], position, self._cache(given))
        yield from self._chosen(given, logits[:, 0], position + 1, ~given["done"])
        if key.scored:
            yield "logits", self._padded(logits)[:, 0], STATE_AXES["logits"]
        yield from self._cached(written)

    def _slot_prefill(self, key: StepKey, given: Mapping[str, torch.Tensor]) -> Results:
        per_shard = key.batch // self.mesh.shape.data
        rows = torch.arange(self.mesh.shape.data) * per_shard + given["slot"]
        count, final = given["count"], given["final"]
        cache = {name: tensor[rows] for name, tensor in self._cache(given).items()}
        logits, written = self._forward(given["ids"], given["start"], cache)
        last = logits[torch.arange(len(rows)), (count - 1).clamp(min=0)]
        yield from self._in_slots(given, rows, written)
        yield from self._best(
            given, rows, last, given["start"] + count, final, count > 0, given["bias"]
        )
        if key.scored:
            chances = torch.log_softmax(logits, -1)
            scores = chances.gather(2, given["targets"][..., None])[..., 0]
            yield "logprobs", scores, STATE_AXES["logprobs"]
            best = chances.topk(min(MOST_TOP, chances.shape[-1]))
            yield "prompt_top_ids", best.indices.int(), STATE_AXES["prompt_top_ids"]
            yield "prompt_top_logprobs", best.values, STATE_AXES["prompt_top_logprobs"]

    def _slot_decode(self, key: StepKey, given: Mapping[str, torch.Tensor]) -> Results:
        shards = self.mesh.shape.data
        rows = torch.arange(key.batch).reshape(shards, -1)[:, : key.rows // shards].flatten()
        live, position = given["live"][rows], given["position"][rows]
        cache = {name: tensor[rows] for name, tensor in self._cache(given).items()}
        logits, written = self._forward(given["token"][rows][:, None], position, cache)
        yield from self._in_slots(given, rows, written)
        bias = given["bias"][rows]
        yield from self._best(given, rows, logits[:, 0], position + 1, live, live, bias)

    def _slot_copy(self, key: StepKey, given: Mapping[str, torch.Tensor]) -> Results:
        first = torch.arange(self.mesh.shape.data) * (key.batch // self.mesh.shape.data)
        for name, tensor in given.items():
            if name not in ("source", "target"):
                copied = tensor.clone()
                copied[first + given["target"]] = tensor[first + given["source"]]
                yield name, copied, STATE_AXES.get(name, CACHE_AXES)

    def _in_slots(
        self, given: Mapping[str, torch.Tensor], rows: torch.Tensor, written: Mapping[str, Any]
    ) -> Results:
        cache = {name: tensor.clone() for name, tensor in self._cache(given).items()}
        for name, tensor in cache.items():
            tensor[rows] = written[name]
        yield from self._cached(cache)

    def _best(
        self,
        given: Mapping[str, torch.Tensor],
        rows: torch.Tensor,
        logits: torch.Tensor,
        position: torch.Tensor,
        chooses: torch.Tensor,
        moves: torch.Tensor,
        bias: torch.Tensor,
    ) -> Results:
        """The best token of each slot in `rows` that chooses, and the best few."""
        assert not given["temperature"].any(), "this engine is greedy"
        chances = torch.log_softmax(logits, -1)
        best = chances.topk(min(MOST_TOP, chances.shape[-1]))
        yield "top_ids", best.indices.int(), STATE_AXES["top_ids"]
        yield "top_logprobs", best.values, STATE_AXES["top_logprobs"]
        added = torch.where(given["biased"][rows][:, None], bias[:, : logits.shape[1]], 0.0)
        token = (logits + added).argmax(-1)
        logprob = chances.gather(1, token[:, None])[:, 0]
        for name, new, taken in (
            ("token", token, chooses),
            ("logprob", logprob, chooses),
            ("position", position, moves),
        ):
            whole = given[name].clone()
            whole[rows] = torch.where(taken, new.to(whole.dtype), whole[rows])
            yield name, whole, STATE_AXES[name]

    def _chosen(
        self,
        given: Mapping[str, torch.Tensor],
        logits: torch.Tensor,
        position: torch.Tensor,
        live: torch.Tensor,
    ) -> Results:
        """The best token of each live row; the others keep what they had."""
        assert not given["temperature"].any(), "this engine is greedy"
        token = logits.argmax(-1)
        logprob = torch.log_softmax(logits, -1).gather(1, token[:, None])[:, 0]
        token = torch.where(live, token, given["token"])
        ended = (token[:, None] == given["eos"]).any(-1)
        out = {
            "token": token,
            "logprob": torch.where(live, logprob, given["logprob"]),
            "position": torch.where(live, position, given["position"]),
            "done": torch.where(live, ended, given["done"]),
        }
        for name, tensor in out.items():
            yield name, tensor, STATE_AXES[name]

    def _forward(
        self,
        ids: torch.Tensor,
        start: torch.Tensor,
        cache: Mapping[str, torch.Tensor],
        *,
        fresh: bool = False,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`[B, S]` ids at positions from `start` `[B]` -> logits `[B, S, V]` fp32, and the written
        cache.
        """
        from transformers import DynamicCache

        batch, new = ids.shape
        past, cached = DynamicCache(), 0
        for layer in range(self.plan.model.layers if cache and not fresh else 0):
            key, value = cache[f"cache.key.{layer}"], cache[f"cache.value.{layer}"]
            past.update(key, value, layer)
            cached = key.shape[2]
        visible = torch.ones(new, new).tril().bool().expand(batch, new, new)
        before = torch.arange(cached) < start[:, None, None].expand(batch, new, 1)
        seen = torch.cat([before, visible], -1)[:, None]
        lowest = torch.finfo(self.dtype).min
        with torch.no_grad():
            logits = self.model(
                input_ids=ids,
                attention_mask=torch.zeros(seen.shape, dtype=self.dtype).masked_fill(~seen, lowest),
                position_ids=start[:, None].long() + torch.arange(new),
                past_key_values=past,
                use_cache=True,
            ).logits
        written = {name: tensor.clone() for name, tensor in cache.items()}
        for name, tensor in written.items():
            _, kind, layer = name.split(".")
            states = getattr(past.layers[int(layer)], f"{kind}s")[:, :, cached:]
            for row in range(batch):
                at = int(start[row])
                tensor[row, :, at : at + new] = states[row]
        return logits.float(), written

    def _cache(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The cache's tensors with the checkpoint's KV heads."""
        names, blocks = cache_names(self.plan.model.layers), self.plan.cache_blocks()
        return {name: in_checkpoint(given[name], blocks) for name in names}

    def _cached(self, written: Mapping[str, torch.Tensor]) -> Results:
        for name, tensor in written.items():
            yield name, laid_out(tensor, self.plan.cache_blocks()), CACHE_AXES

    def _padded(self, logits: torch.Tensor) -> torch.Tensor:
        more = (0, self.plan.vocab - self.plan.model.vocab)
        return torch.nn.functional.pad(logits, more, value=HIDDEN)


Results = Iterator[tuple[str, torch.Tensor, Sequence[str | None]]]


class HostProgram(Compiled):
    """A step with the shapes and dtypes that it was made for."""

    trace_s = last_run_s = 0.0

    def __init__(
        self, steps: HostSteps, step: Callable[[Mapping[str, torch.Tensor]], Results], state: State
    ) -> None:
        HostEngine.made += 1
        self._mesh, self._step = steps.mesh, step
        self._wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}

    def __call__(self, state: State) -> dict[str, DeviceTensor]:
        mesh, given = self._mesh, {}
        for name, (shape, dtype) in self._wanted.items():
            tensor = state[name]
            if (tensor.shape, tensor.dtype) != (shape, dtype):
                raise ProgramError(lines(f"{name} is {tensor.shape}", f"expected {shape}"))
            given[name] = mesh.fetch(tensor, tensor.axes)
        with mesh.lock:
            began = time.perf_counter()
            out = {name: mesh.put(tensor, axes) for name, tensor, axes in self._step(given)}
            self.last_run_s = time.perf_counter() - began
        for name in out:
            if name in self._wanted:
                state[name].parts = []
        return out

    def hlo(self) -> list[str]:
        raise RunError(lines("backend 'host' has no HLO"))

    def temp_bytes(self) -> int:
        raise RunError(lines("backend 'host' has no HLO"))


def in_checkpoint(laid_out: torch.Tensor, blocks: Blocks | None) -> torch.Tensor:
    """A tensor with each block of the checkpoint's once."""
    if blocks is None:
        return laid_out
    pieces = laid_out.split(blocks.block, blocks.dim)
    places = [blocks.sources.index(source) for source in range(max(blocks.sources) + 1)]
    return torch.cat([pieces[place] for place in places], blocks.dim)


def laid_out(tensor: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """A tensor as the plan lays it out: blocks repeated, and zeros."""
    pieces = tensor.split(blocks.block, blocks.dim)
    zeros = torch.zeros_like(pieces[0])
    chosen = [zeros if source == heads.EMPTY else pieces[source] for source in blocks.sources]
    return torch.cat(chosen, blocks.dim)
