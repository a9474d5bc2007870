"""Parity: a model on a mesh against transformers on one device, in fp32.

Logits of a text taken in at once, logits of tokens fed one by one through the cache, every module's output, and on request every parameter's gradient.
The verdict is about relative L2 distances, whose tolerances `tolerance` derives; the other figures tell what they mean for a text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..engine.sampling_params import SamplingParams
from ..errors import UsageError, lines
from ..inference.llm import LLM
from ..inference.session import Session
from ..model.token_ids import check_ids
from .activations import points
from .gradient_parity import GradientFigures, compare_gradients
from .metrics import LogitFigures, compare_logits
from .module_parity import MOST_POSITIONS, ModuleFigures, compare_modules, first_fault
from .reference import FLOAT32, Answers, Reference, Request
from .tolerance import Limits, Tolerance


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What was found.

    Attributes:
        prefill, decode: our logits against the reference's; decode is None if nothing was decoded.
        dtype_prefill, dtype_decode: transformers in the run's dtype against transformers in fp32: what the dtype alone costs. None for float32.
        gradients: None if not asked for.
        first_fault: the first module out of its tolerance.
        programs_after_warmup: compiled while decoding.
    """

    model: str
    backend: str
    mesh: dict[str, int]
    dtype: str
    prefill_tokens: int
    decode_tokens: int
    module_tokens: int
    tolerances: Limits
    prefill: LogitFigures
    decode: LogitFigures | None
    dtype_prefill: LogitFigures | None
    dtype_decode: LogitFigures | None
    gradients: list[GradientFigures] | None
    modules: list[ModuleFigures]
    first_fault: str | None
    programs_after_warmup: int

    @property
    def faults(self) -> list[str]:
        """Which parts are out of tolerance: of `prefill`, `decode`, `modules`, `gradients`."""
        limit = self.tolerances.logits_relative_l2
        out = [
            name
            for name, part in (("prefill", self.prefill), ("decode", self.decode))
            if part and not part.relative_l2 <= limit
        ]
        if self.first_fault is not None:
            out.append("modules")
        return out + (
            ["gradients"] if any(not gradient.ok for gradient in self.gradients or []) else []
        )

    @property
    def passed(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: figures that are no finite numbers are null."""
        document: dict[str, Any] = _finite(asdict(self))
        return document | {"faults": self.faults, "passed": self.passed}


def request(llm: LLM, ids: Sequence[int], *, decode: int = 32, gradients: bool = False) -> Request:
    """What to ask the reference for a text.

    Args:
        ids: the whole text; its last `decode` tokens are fed one by one.

    Raises:
        UsageError: too few tokens or too many, or one is not of the vocabulary.
    """
    if decode < 0:
        raise UsageError(lines(f"{decode} tokens to decode", "expected 0 or more"))
    if len(ids) - decode < 2:
        raise UsageError(
            lines(
                f"a text of {len(ids)} tokens, {decode} of which are decoded",
                "expected at least 2 before them",
            )
        )
    if len(ids) > llm.max_model_len:
        raise UsageError(
            lines(
                f"a text of {len(ids)} tokens is over the limit of {llm.max_model_len}",
                "expected no more than the limit",
            )
        )
    check_ids(ids, llm.plan.model.vocab)
    prefill = len(ids) - decode
    return Request(
        model=llm.name,
        ids=tuple(ids),
        prefill=prefill,
        traced=min(prefill, MOST_POSITIONS),
        gradients=gradients,
        dtype=str(llm.steps.dtype).removeprefix("torch."),
    )


def validate(
    llm: LLM, ids: Sequence[int], *, decode: int = 32, gradients: bool = False
) -> Validation:
    """Hold a model on its mesh against transformers on one device.

    Args:
        llm: from `parallama.load`, by the name of the checkpoint that the reference reads too.
        ids: a text, two tokens or more.
        decode: so many of its last tokens are fed one by one, with the cache.
        gradients: hold every parameter's gradient against the reference's too.

    Raises:
        UsageError: the text doesn't fit the model.
        RunError: the reference could not be computed.
    """
    asked = request(llm, ids, decode=decode, gradients=gradients)
    with Reference(asked) as reference:
        ours, after_warmup = _our_logits(llm, asked)
        return _judge(llm, asked, reference.answers(), ours, after_warmup)


def judge(llm: LLM, asked: Request, answers: Answers) -> Validation:
    """`validate`, with answers that are there already."""
    return _judge(llm, asked, answers, *_our_logits(llm, asked))


def _our_logits(llm: LLM, asked: Request) -> tuple[dict[str, torch.Tensor], int]:
    """`prefill` `[R, S, V]` and `decode` `[R, N, V]`, each of the mesh's `R` data rows running the text itself; and programs compiled after warm-up."""
    rows = llm.mesh.shape.data
    first, rest = list(asked.ids[: asked.prefill]), asked.ids[asked.prefill :]
    found = {"prefill": llm.logits([first] * rows)}
    if not rest:
        return found, 0
    params = [SamplingParams()] * rows
    session = Session(
        llm.steps,
        llm.programs,
        params,
        capacity=len(asked.ids),
        longest_prompt=len(first),
        scored=True,
    )
    session.prefill([first] * rows)
    found["decode"] = torch.stack([session.feed([token] * rows) for token in rest], dim=1)
    return found, session.stats.programs_after_warmup


def _judge(
    llm: LLM, asked: Request, answers: Answers, ours: dict[str, torch.Tensor], after_warmup: int
) -> Validation:
    plan, mesh = llm.plan, llm.mesh
    tolerance = Tolerance(dtype=asked.dtype, devices=mesh.shape.model)
    limits = Limits.of(
        tolerance, layers=plan.model.layers, terms=max(point.terms for point in points(plan.model))
    )
    targets = {
        "prefill": asked.ids[1 : asked.prefill + 1],
        "decode": asked.ids[asked.prefill + 1 :],
    }

    def logits(part: str) -> LogitFigures | None:
        if part not in ours:
            return None
        rows, wanted = ours[part], answers.logits(part)
        # The worst of the mesh's data rows stands for all.
        figures = [compare_logits(row, wanted, targets[part]) for row in rows]
        return max(
            figures, key=lambda row: math.inf if math.isnan(row.relative_l2) else row.relative_l2
        )

    def of_dtype(part: str) -> LogitFigures | None:
        if asked.dtype == FLOAT32 or part not in ours:
            return None
        return compare_logits(
            answers.logits(part, asked.dtype), answers.logits(part), targets[part]
        )

    prefill = logits("prefill")
    assert prefill is not None
    traced = asked.ids[: asked.traced]
    modules = compare_modules(llm.steps, answers, traced, tolerance)
    gradients = None
    if asked.gradients:
        gradients = compare_gradients(
            asked.model, plan, mesh, llm.steps.dtype, traced, answers, limits.gradients_relative_l2
        )
    return Validation(
        model=llm.name,
        backend=mesh.backend.name,
        mesh=dict(mesh.shape),
        dtype=asked.dtype,
        prefill_tokens=asked.prefill,
        decode_tokens=len(asked.ids) - asked.prefill,
        module_tokens=asked.traced,
        tolerances=limits,
        prefill=prefill,
        decode=logits("decode"),
        dtype_prefill=of_dtype("prefill"),
        dtype_decode=of_dtype("decode"),
        gradients=gradients,
        modules=modules,
        first_fault=first_fault(modules),
        programs_after_warmup=after_warmup,
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
