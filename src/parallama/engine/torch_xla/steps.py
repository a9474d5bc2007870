"""The functional steps of inference: prefill, decode, and growing the cache. Each becomes one program a shape.

A step maps named device tensors to named device tensors. The state of a batch goes in and comes out under the same names:

- `token` `[B]` int64, the last chosen token; `logprob` `[B]` fp32;
- `position` `[B]` int32, where the next token will be written; `done` `[B]` bool;
- `cache.key.L`, `cache.value.L`, see `cache`;
- `seen` `[B, V]` bool, only where a repetition penalty is used;
- `span` `[1]` int32, positions of the longest row, only where rotary frequencies follow it (`rotary`);
- `logits` `[B, V]` fp32, of a decode step, only where they are asked for.

Texts that are there already are run at once, without a state: for their logits, or for how likely their tokens are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from ...plan.mesh_shape import DATA, MODEL
from ...plan.placement import Plan
from ..interface import Steps
from ..sampling_params import Mode
from ..steps import PARAMS, SPAN, STATE_AXES, TEXT_LOGITS_AXES, StepKey
from . import attention, cache, sampling
from .last_positions import LastPositions
from .mesh import DeviceMesh
from .ops import name_scopes, scope
from .products import LinearAxes, LinearForm, linear, shared_rows
from .program import Program
from .rotary import FollowingRotary, following
from .scoring import score

_SCORED_AT_ONCE = 128
"""Positions whose logits are there at one time where tokens are scored."""


class TorchXlaSteps(Steps):
    """The steps of one model on one mesh; see `interface.Steps`.

    Args:
        skeleton: the transformers causal LM, without weights: on the meta device, but with a real
            rotary table.
        mesh: the devices.
        plan: how the weights are placed.
        weights: its parameters on the devices.
        dtype: of the cache and the activations.

    Attributes:
        base: the transformers model that every step runs, the causal LM without its head.
    """

    mesh: DeviceMesh
    weights: Mapping[str, torch.Tensor]

    def __init__(
        self,
        skeleton: Any,
        mesh: DeviceMesh,
        plan: Plan,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
    ) -> None:
        attention.register()
        self.mesh, self.plan, self.weights = mesh, plan, weights
        self.dtype = dtype
        self.base = skeleton.model
        self.base.config._attn_implementation = attention.CACHED
        rotary = self.base.rotary_emb = following(self.base.rotary_emb)
        self.follows_span = isinstance(rotary, FollowingRotary)
        name_scopes(self.base, "model")
        self._buffers = {
            f"rotary_emb.{name}": self.mesh.put(buffer, (None,) * buffer.dim())
            for name, buffer in rotary.named_buffers()
            if name.endswith("inv_freq") and name != "original_inv_freq"
        }

    def compile(self, key: StepKey, state: Mapping[str, torch.Tensor]) -> Program:
        """See `interface.Steps`."""
        name = f"{key.kind}(batch={key.batch}, new={key.new}, length={key.length})"
        buffers = [each for each in state if each.startswith("cache.")]
        if key.kind == "grow":
            return Program(
                name, self.mesh, lambda given: cache.grow(given, self.mesh, key.new), state
            )
        if key.kind in ("logits", "score"):
            return Program(
                name, self.mesh, self.logits if key.kind == "logits" else self.scores, state
            )
        donated = [*buffers, *(["seen"] if key.mode.penalty else [])]
        step = self._prefill if key.kind == "prefill" else self._decode
        return Program(name, self.mesh, lambda given: step(given, key), state, donated)

    def _hidden(
        self,
        ids: torch.Tensor,
        start: torch.Tensor,
        buffers: dict[str, torch.Tensor],
        *,
        fresh: bool,
        span: torch.Tensor | None,
        ends: torch.Tensor | None = None,
        few: range = range(0),
    ) -> tuple[torch.Tensor, cache.StepCache]:
        """`[B, S]` ids at positions from `start` `[B]` -> final hidden states `[B, S, E]` and the written cache.

        Args:
            ends: `[B, S]` bool, the only position of each row whose final state is asked for; `[B, 1, E]` then.
            few: rows of which oneDNN multiplies, see `LinearAxes`.
        """
        weights = self.weights
        step_cache = cache.StepCache(self.mesh, buffers, start, fresh=fresh)
        positions = start[:, None].long() + torch.arange(ids.shape[1], device=ids.device)[None, :]
        inner = {
            name.removeprefix("model."): tensor
            for name, tensor in weights.items()
            if name.startswith("model.")
        } | self._buffers
        if span is not None:
            inner[f"rotary_emb.{SPAN}"] = span
        axes = {
            id(tensor): self._axes(name, few)
            for name, tensor in weights.items()
            if tensor.dim() == 2
        }
        last = weights[f"model.layers.{self.plan.model.layers - 1}.self_attn.o_proj.weight"]
        with (
            LinearForm(self.mesh, axes),
            contextlib.nullcontext() if ends is None else LastPositions(self.mesh, last, ends),
        ):
            output = torch.func.functional_call(
                self.base,
                inner,
                kwargs={
                    "input_ids": ids,
                    "position_ids": positions,
                    "past_key_values": step_cache,
                    "use_cache": True,
                },
            )
        return output.last_hidden_state, step_cache

    def _axes(self, name: str, few: range) -> LinearAxes:
        """Of a linear's weight. The residual stream lies whole on every device: what is computed from it starts whole, what is added to it ends whole."""
        out, inner = self.plan[name].axes
        partial, ends = (
            self.mesh.shape.size(inner) > 1,
            name.endswith(("o_proj.weight", "down_proj.weight")),
        )
        result = None if ends or out == DATA else out
        return LinearAxes(
            weight=(out, inner),
            partial=partial,
            whole=not (ends and partial),
            out=result,
            shared_rows=few,
        )

    def _head(self, hidden: torch.Tensor, few: range = range(0)) -> torch.Tensor:
        """`[..., E]` -> logits `[..., V]`, split over the vocabulary."""
        name = "model.embed_tokens.weight" if self.plan.model.tied else "lm_head.weight"
        whole = (DATA, *(None,) * (hidden.dim() - 1))
        with scope("lm_head"):
            axes = self._axes(name, few)
            logits = linear(self.mesh, self.mesh.mark(hidden, whole), self.weights[name], axes)
            # Where the plan splits the head on its inputs: summed where it is made, and split only then.
            return self.mesh.mark(logits, whole).clone() if axes.partial else logits

    def _choose(
        self,
        last: torch.Tensor,
        given: Mapping[str, torch.Tensor],
        positions: torch.Tensor,
        mode: Mode,
        few: range = range(0),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, their log-probabilities, and the logits that they were chosen from."""
        logits = self.mesh.mark(self._head(last, few), (DATA, MODEL))
        params = {name: given[name] for name in PARAMS if name in given}
        with scope("sampling"):
            return *sampling.choose(
                logits, self.mesh, self.plan.model.vocab, mode, params, positions, given.get("seen")
            ), logits

    def _prefill(self, given: Mapping[str, torch.Tensor], key: StepKey) -> dict[str, torch.Tensor]:
        """Run a chunk of every row's prompt; rows whose prompt ends in it (`final`) choose their first token."""
        ids, start, count, final = given["ids"], given["start"], given["count"], given["final"]
        buffers = {name: tensor for name, tensor in given.items() if name.startswith("cache.")}
        ends = torch.arange(ids.shape[1], device=ids.device)[None, :] == (count[:, None].long() - 1)
        hidden, step_cache = self._hidden(
            ids, start, buffers, fresh=key.fresh, span=given.get(SPAN), ends=ends
        )
        assert hidden.shape[1] == 1, (
            "what is added to the last layer's attention has more than the last positions"
        )
        position = start + count
        token, logprob, _ = self._choose(hidden[:, 0], given, position, key.mode)
        out = {
            "token": torch.where(final, token, given["token"]),
            "logprob": torch.where(final, logprob, given["logprob"]),
            "position": torch.where(final, position, given["position"]),
        }
        out["done"] = torch.where(final, self._is_end(out["token"], given["eos"]), given["done"])
        return self._with_state(out, given, step_cache, final, key)

    def _decode(self, given: Mapping[str, torch.Tensor], key: StepKey) -> dict[str, torch.Tensor]:
        """One more token for every row that isn't done; done rows keep their state."""
        buffers = {name: tensor for name, tensor in given.items() if name.startswith("cache.")}
        position, done = given["position"], given["done"]
        span = given[SPAN] + 1 if self.follows_span else None
        few = shared_rows(self.mesh, self.plan.model, key.length)
        hidden, step_cache = self._hidden(
            given["token"][:, None], position, buffers, fresh=False, span=span, few=few
        )
        following = position + 1
        token, logprob, logits = self._choose(hidden[:, 0], given, following, key.mode, few)
        out = {
            "token": torch.where(done, given["token"], token),
            "logprob": torch.where(done, given["logprob"], logprob),
            "position": torch.where(done, position, following),
        }
        out["done"] = done | self._is_end(out["token"], given["eos"])
        if span is not None:
            out[SPAN] = span
        if key.scored:
            out["logits"] = logits.float()
        return self._with_state(out, given, step_cache, ~done, key)

    def _with_state(
        self,
        out: dict[str, torch.Tensor],
        given: Mapping[str, torch.Tensor],
        step_cache: cache.StepCache,
        live: torch.Tensor,
        key: StepKey,
    ) -> dict[str, torch.Tensor]:
        if key.mode.penalty:
            ids = torch.arange(given["seen"].shape[1], device=live.device)
            out["seen"] = given["seen"] | ((ids[None, :] == out["token"][:, None]) & live[:, None])
        return {
            name: self.mesh.mark(tensor, STATE_AXES[name]) for name, tensor in out.items()
        } | step_cache.buffers

    @staticmethod
    def _is_end(token: torch.Tensor, eos: torch.Tensor) -> torch.Tensor:
        return (token[:, None] == eos[None, :]).any(-1)

    def logits(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Logits of every position of a sequence that is run at once, `[B, S, V]` fp32."""
        buffers = {name: tensor for name, tensor in given.items() if name.startswith("cache.")}
        hidden, _ = self._hidden(
            given["ids"], given["start"], buffers, fresh=True, span=given.get(SPAN)
        )
        return {"logits": self.mesh.mark(self._head(hidden).float(), TEXT_LOGITS_AXES)}

    def scores(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """How likely `targets` `[B, S]` are, each behind the `ids` up to its position: `logprobs` `[B, S]` fp32, and whether each is the best (`greedy`)."""
        hidden, _ = self._hidden(given["ids"], given["start"], {}, fresh=True, span=given.get(SPAN))
        found = []
        for rows, targets in zip(
            hidden.split(_SCORED_AT_ONCE, dim=1),
            given["targets"].split(_SCORED_AT_ONCE, dim=1),
            strict=True,
        ):
            logits = self.mesh.mark(self._head(rows), (DATA, None, MODEL))
            with scope("scoring"):
                found.append(score(logits, targets, self.mesh, self.plan.model.vocab))
        out = {
            "logprobs": torch.cat([part for part, _ in found], dim=1),
            "greedy": torch.cat([part for _, part in found], dim=1),
        }
        return {name: self.mesh.mark(tensor, STATE_AXES[name]) for name, tensor in out.items()}
