"""Rotary embedding whose frequencies follow the length of what is run, within a compiled step.

transformers looks at the largest position of every forward, on the host: `dynamic` then computes
its base anew (NTK scaling, as posted by u/bloc97 and u/emozilla), `longrope` (Ding et al., 2024)
takes one list of factors or the other. A step has that value only on the devices, as `span`, so
here the program computes the frequencies from it.
"""

# What is cached keeps the rotation that it was written with, as in transformers. Only the history
# differs: a transformers module that has run a long text keeps that text's frequencies for somewhat
# shorter ones that come later. Here they follow from `span` alone.

from __future__ import annotations

from typing import Any

import torch

from ...model.rope import LENGTH_DEPENDENT
from ..steps import SPAN


class FollowingRotary(torch.nn.Module):
    """In place of a transformers rotary embedding of type `dynamic` or `longrope`.

    Args:
        original: transformers' module, on the host.

    Attributes:
        span: `[1]` int32, positions of the longest row, or `[B]`, of each row; set for each run.
        inv_freq: `[D / 2]` fp32, for what is not longer than the model was trained on.
        long_inv_freq: the same for what is; `longrope` only.
    """

    span: torch.Tensor
    inv_freq: torch.Tensor

    def __init__(self, original: Any) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        super().__init__()
        self._config = original.config
        self._compute = ROPE_INIT_FUNCTIONS[original.rope_type]
        self.attention_scaling = float(original.attention_scaling)
        self.register_buffer(SPAN, torch.ones(1, dtype=torch.int32), persistent=False)
        self.register_buffer("inv_freq", self._compute(self._config)[0], persistent=False)
        self.threshold: int | None = None
        if original.rope_type == "longrope":
            self.threshold = int(self._config.rope_parameters["original_max_position_embeddings"])
            long, _ = self._compute(self._config, seq_len=self.threshold + 1)
            self.register_buffer("long_inv_freq", long, persistent=False)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for positions `[B, S]`, each `[B, S, D]` in the dtype of `x`."""
        angles = position_ids[..., None].float() * self._frequencies(x.device)[..., None, :]
        table = torch.cat((angles, angles), dim=-1)
        cosines = table.cos() * self.attention_scaling
        sines = table.sin() * self.attention_scaling
        return cosines.to(x.dtype), sines.to(x.dtype)

    def _frequencies(self, device: torch.device) -> torch.Tensor:
        span = self.span[:, None]
        if self.threshold is not None:
            long = self.get_buffer("long_inv_freq")
            return torch.where(span > self.threshold, long, self.inv_freq)
        scaled: torch.Tensor = self._compute(self._config, device, seq_len=span)[0]
        longer = span > self._config.max_position_embeddings
        return torch.where(longer, scaled, self.inv_freq)


def following(rotary: Any) -> Any:
    """A model's rotary embedding, replaced if its frequencies follow the length."""
    return FollowingRotary(rotary) if rotary.rope_type in LENGTH_DEPENDENT else rotary
