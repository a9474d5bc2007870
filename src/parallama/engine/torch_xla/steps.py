"""The functional steps of inference, written in torch: each becomes one program a shape.

`engine.steps` says what goes into each step and what comes out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import ProgramError, lines
from ...plan.mesh_shape import DATA, MODEL
from ...plan.placement import Plan
from ..interface import Steps
from ..steps import LOGITS_AXES, SPAN, STATE_AXES, StepKey
from . import attention, cache, sampling, slot_steps
from .last_positions import LastPositions
from .linear_form import LinearForm
from .linear_products import LinearAxes, linear, shared_rows
from .mesh import DeviceMesh
from .program import Program, Step
from .rotary import FollowingRotary, following
from .scopes import name_scopes, scope
from .scoring import score
from .slot_steps import caches
from .top_tokens import top_tokens_of_places

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
        steps: dict[str, Step] = {
            "prefill": lambda given: self._prefill(given, key),
            "decode": lambda given: self._decode(given, key),
            "grow": lambda given: cache.grow(given, self.mesh, key.new),
            "slot_prefill": lambda given: slot_steps.prefill(self, given, key),
            "slot_decode": lambda given: slot_steps.decode(self, given, key),
            "slot_copy": lambda given: slot_steps.copy(self.mesh, given),
            "logits": self.logits,
            "score": self._scores,
        }
        donated: list[str] = []
        if key.kind not in ("grow", "logits", "score"):
            donated = [*caches(state), "counts"]
        return Program(name, self.mesh, steps[key.kind], state, donated)

    def hidden(
        self,
        ids: torch.Tensor,
        start: torch.Tensor,
        buffers: dict[str, torch.Tensor],
        *,
        fresh: bool,
        span: torch.Tensor | None,
        ends: torch.Tensor | None = None,
        few: range = range(0),
        first_row: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, cache.StepCache]:
        """Final hidden states `[B, S, E]` and the written cache.

        Args:
            ids: `[B, S]`.
            start: `[B]`, the position of each row's first id.
            ends: `[B, S]` bool, the only position of each row whose final state is asked for. The
                states are `[B, 1, E]` then.
            few: rows that oneDNN multiplies, see `LinearAxes`.
            first_row: see `cache.StepCache`.
            visible: `[B]`, how many places of the cache each row sees, if not all before `start`.

        Raises:
            ProgramError: `ends` was given, and the model's last layer ends another way.
        """
        weights = self.weights
        step_cache = cache.StepCache(
            self.mesh, buffers, start, fresh=fresh, first_row=first_row, visible=visible
        )
        positions = start[:, None].long() + torch.arange(ids.shape[1], device=ids.device)[None, :]
        parameters = {
            name.removeprefix("model."): tensor
            for name, tensor in weights.items()
            if name.startswith("model.")
        } | self._buffers
        if span is not None:
            parameters[f"rotary_emb.{SPAN}"] = span
        axes = {
            id(tensor): self._axes(name, few)
            for name, tensor in weights.items()
            if tensor.dim() == 2
        }
        last = weights[f"model.layers.{self.plan.model.layers - 1}.self_attn.o_proj.weight"]
        only_ends = (
            contextlib.nullcontext() if ends is None else LastPositions(self.mesh, last, ends)
        )
        given = {
            "input_ids": ids,
            "position_ids": positions,
            "past_key_values": step_cache,
            "use_cache": True,
        }
        with LinearForm(self.mesh, axes), only_ends:
            output = torch.func.functional_call(self.base, parameters, kwargs=given)
        hidden = output.last_hidden_state
        if ends is not None and hidden.shape[1] != 1:
            raise ProgramError(
                lines(
                    f"the last layer of {type(self.base).__name__} gives {hidden.shape[1]} "
                    "positions a row",
                    "expected 1: what is added to its attention has more than the last positions",
                )
            )
        return hidden, step_cache

    def _axes(self, name: str, few: range) -> LinearAxes:
        """Of a linear's weight.

        The residual stream is whole on every device: what is computed from it starts whole, what is
        added to it ends whole.
        """
        out, inner = self.plan[name].axes
        partial = self.mesh.shape.size(inner) > 1
        ends = name.endswith(("o_proj.weight", "down_proj.weight"))
        return LinearAxes(
            weight=(out, inner),
            partial=partial,
            whole=not (ends and partial),
            out=None if ends or out == DATA else out,
            shared_rows=few,
        )

    def _head(self, hidden: torch.Tensor, few: range = range(0)) -> torch.Tensor:
        """`[..., E]` -> logits `[..., V]`, split over the vocabulary."""
        name = "model.embed_tokens.weight" if self.plan.model.tied else "lm_head.weight"
        with scope("lm_head"):
            axes = self._axes(name, few)
            logits = linear(self.mesh, self.mesh.mark_rows(hidden), self.weights[name], axes)
            # Where the plan splits the head on its inputs: summed where it is made, and split only
            # then.
            return self.mesh.mark_rows(logits).clone() if axes.partial else logits

    def choose(
        self,
        last: torch.Tensor,
        given: Mapping[str, torch.Tensor],
        positions: torch.Tensor,
        few: range = range(0),
    ) -> tuple[sampling.Chosen, torch.Tensor]:
        """What rows choose, and the logits that they choose from."""
        mesh, vocab = self.mesh, self.plan.model.vocab
        logits = mesh.mark(self._head(last, few), (DATA, MODEL))
        with scope("sampling"):
            return sampling.choose(logits, mesh, vocab, given, positions), logits

    def _prefill(self, given: Mapping[str, torch.Tensor], key: StepKey) -> dict[str, torch.Tensor]:
        """Run a chunk of every row's prompt.

        Rows whose prompt ends in it (`final`) choose their first token.
        """
        ids, start, count, final = given["ids"], given["start"], given["count"], given["final"]
        ends = torch.arange(ids.shape[1], device=ids.device)[None, :] == (count[:, None].long() - 1)
        hidden, step_cache = self.hidden(
            ids, start, caches(given), fresh=key.fresh, span=given.get(SPAN), ends=ends
        )
        position = start + count
        chosen, _ = self.choose(hidden[:, 0], given, position)
        out = {
            "token": torch.where(final, chosen.token, given["token"]),
            "logprob": torch.where(final, chosen.logprob, given["logprob"]),
            "position": torch.where(final, position, given["position"]),
        }
        out["done"] = torch.where(final, self._is_end(out["token"], given["eos"]), given["done"])
        return self._with_state(out, given, step_cache, final)

    def _decode(self, given: Mapping[str, torch.Tensor], key: StepKey) -> dict[str, torch.Tensor]:
        """One more token for every row that isn't done; done rows keep their state."""
        position, done = given["position"], given["done"]
        span = given[SPAN] + 1 if self.follows_span else None
        few = shared_rows(self.mesh, self.plan.model, key.length)
        hidden, step_cache = self.hidden(
            given["token"][:, None], position, caches(given), fresh=False, span=span, few=few
        )
        following = position + 1
        chosen, logits = self.choose(hidden[:, 0], given, following, few)
        out = {
            "token": torch.where(done, given["token"], chosen.token),
            "logprob": torch.where(done, given["logprob"], chosen.logprob),
            "position": torch.where(done, position, following),
        }
        out["done"] = done | self._is_end(out["token"], given["eos"])
        if span is not None:
            out[SPAN] = span
        if key.scored:
            out["logits"] = logits.float()
        return self._with_state(out, given, step_cache, ~done)

    def _with_state(
        self,
        out: dict[str, torch.Tensor],
        given: Mapping[str, torch.Tensor],
        step_cache: cache.StepCache,
        live: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        out["counts"] = sampling.counted(given["counts"], self.mesh, out["token"], live)
        return self.marked(out) | step_cache.buffers

    def marked(self, out: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: self.mesh.mark(tensor, STATE_AXES[name]) for name, tensor in out.items()}

    @staticmethod
    def _is_end(token: torch.Tensor, eos: torch.Tensor) -> torch.Tensor:
        return (token[:, None] == eos[None, :]).any(-1)

    def logits(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Logits of every position of texts that are run at once."""
        hidden = self._at_once(given)
        return {"logits": self.mesh.mark(self._head(hidden).float(), LOGITS_AXES)}

    def _scores(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """How likely `targets` are, each behind the `ids` up to its position."""
        return self.marked(self.scored(self._at_once(given), given["targets"]))

    def scored(
        self, hidden: torch.Tensor, targets: torch.Tensor, tops: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """How likely each position's target is.

        Args:
            hidden: final states, `[B, S, E]`.
            targets: `[B, S]`.
            tops: `[B]` int32, the likeliest tokens that are asked for in each position, if any are.
        """
        mesh, vocab = self.mesh, self.plan.model.vocab
        found: dict[str, list[torch.Tensor]] = {}
        parts = zip(
            hidden.split(_SCORED_AT_ONCE, dim=1), targets.split(_SCORED_AT_ONCE, dim=1), strict=True
        )
        for states, wanted in parts:
            logits = mesh.mark(self._head(states), LOGITS_AXES)
            with scope("scoring"):
                logprobs, greedy, normaliser = score(logits, wanted, mesh, vocab)
            new = {"logprobs": logprobs, "greedy": greedy}
            if tops is not None:
                new |= top_tokens_of_places(mesh, logits, vocab, normaliser, tops)
            for name, tensor in new.items():
                found.setdefault(name, []).append(tensor)
        return {name: torch.cat(tensors, dim=1) for name, tensors in found.items()}

    def _at_once(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Final hidden states `[B, S, E]` of texts that are run without a state."""
        ids, start, span = given["ids"], given["start"], given.get(SPAN)
        hidden, _ = self.hidden(ids, start, {}, fresh=True, span=span)
        return hidden
