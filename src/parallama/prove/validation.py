"""Parity: a model on a mesh against transformers on one device, in fp32.

It compares logits of a text that is run at once, logits of tokens that are fed one by one through
the cache, every module's output, and on request every parameter's gradient. The verdict is about
relative L2 distances, whose tolerances `tolerance` derives; the other figures tell what they mean
for a text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..engine.row_sampling import RowSampling
from ..errors import UsageError, lines
from ..inference.llm import LLM
from ..inference.session import Session
from ..model.token_ids import check_ids
from .activations import activations
from .gradient_parity import GradientFigures, compare_gradients, torch_mesh
from .metrics import LogitFigures, compare_logits
from .module_parity import (
    MOST_POSITIONS,
    ModuleFigures,
    compare_modules,
    first_fault,
    torch_steps,
)
from .reference import FLOAT32, ReferenceOutputs, ReferenceProcess, ReferenceRequest
from .tolerance import Limits, Tolerance


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What was found.

    Attributes:
        prefill, decode: our logits against the reference's; decode is None if nothing was decoded.
        dtype_prefill, dtype_decode: transformers in the run's dtype against transformers in fp32:
            the cost of the dtype alone. None for float32.
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
        out = []
        if not self.prefill.relative_l2 <= limit:
            out.append("prefill")
        if self.decode is not None and not self.decode.relative_l2 <= limit:
            out.append("decode")
        if self.first_fault is not None:
            out.append("modules")
        if any(not gradient.ok for gradient in self.gradients or []):
            out.append("gradients")
        return out

    @property
    def passed(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: figures that are no finite numbers are null."""
        document: dict[str, Any] = _finite(asdict(self))
        return document | {"faults": self.faults, "passed": self.passed}


@dataclass(frozen=True, kw_only=True)
class _OurLogits:
    """Logits of our run; each of the mesh's `R` data rows runs the text itself.

    Attributes:
        prefill: `[R, S, V]`.
        decode: `[R, N, V]`; None if nothing was decoded.
        programs_after_warmup: compiled while decoding.
    """

    prefill: torch.Tensor
    decode: torch.Tensor | None
    programs_after_warmup: int


def request(
    llm: LLM, ids: Sequence[int], *, decode: int = 32, gradients: bool = False
) -> ReferenceRequest:
    """What to ask the reference for a text.

    Args:
        ids: the whole text; its last `decode` tokens are fed one by one.

    Raises:
        UsageError: too few tokens or too many, or one is not of the vocabulary.
        BackendError: the engine runs none of transformers' modules, which are compared.
    """
    torch_steps(llm.steps)  # said now, and not after the reference has been computed
    if gradients:
        torch_mesh(llm.mesh)
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
    return ReferenceRequest(
        model=llm.name,
        adapter=llm.adapter,
        ids=tuple(ids),
        prefill=prefill,
        traced=min(prefill, MOST_POSITIONS),
        gradients=gradients,
        dtype=str(llm.steps.dtype).removeprefix("torch."),
    )


def validate(
    llm: LLM, ids: Sequence[int], *, decode: int = 32, gradients: bool = False
) -> Validation:
    """Compare a model on its mesh with transformers on one device.

    Args:
        llm: from `parallama.load`, by the name of the checkpoint that the reference reads too.
        ids: a text, two tokens or more.
        decode: so many of its last tokens are fed one by one, with the cache.
        gradients: compare every parameter's gradient, too.

    Raises:
        UsageError: the text doesn't fit the model.
        BackendError: the engine runs none of transformers' modules, which are compared.
        RunError: the reference could not be computed.
    """
    asked = request(llm, ids, decode=decode, gradients=gradients)
    with ReferenceProcess(asked) as reference:
        ours = _our_logits(llm, asked)
        return _judge(llm, asked, reference.outputs(), ours)


def judge(llm: LLM, asked: ReferenceRequest, reference: ReferenceOutputs) -> Validation:
    """`validate`, with a reference that is computed already."""
    return _judge(llm, asked, reference, _our_logits(llm, asked))


def _our_logits(llm: LLM, asked: ReferenceRequest) -> _OurLogits:
    rows = llm.mesh.shape.data
    first, rest = list(asked.ids[: asked.prefill]), asked.ids[asked.prefill :]
    prefill = llm.logits([first] * rows)
    if not rest:
        return _OurLogits(prefill=prefill, decode=None, programs_after_warmup=0)
    session = Session(
        llm.steps,
        llm.programs,
        [RowSampling()] * rows,
        capacity=len(asked.ids),
        longest_prompt=len(first),
        scored=True,
    )
    session.prefill([first] * rows)
    decode = torch.stack([session.feed([token] * rows) for token in rest], dim=1)
    after_warmup = session.stats.programs_after_warmup
    return _OurLogits(prefill=prefill, decode=decode, programs_after_warmup=after_warmup)


def _judge(
    llm: LLM, asked: ReferenceRequest, reference: ReferenceOutputs, ours: _OurLogits
) -> Validation:
    plan, mesh = llm.plan, llm.mesh
    tolerance = Tolerance(dtype=asked.dtype, devices=mesh.shape.model)
    terms = max(activation.terms for activation in activations(plan.model))
    limits = Limits.of(tolerance, layers=plan.model.layers, terms=terms)
    after_prefill = asked.ids[1 : asked.prefill + 1]
    after_decode = asked.ids[asked.prefill + 1 :]
    decode = dtype_prefill = dtype_decode = None
    if ours.decode is not None:
        decode = _worst(ours.decode, reference.logits("decode"), after_decode)
    if asked.dtype != FLOAT32:
        dtype_prefill = _of_dtype(reference, "prefill", asked.dtype, after_prefill)
        if ours.decode is not None:
            dtype_decode = _of_dtype(reference, "decode", asked.dtype, after_decode)
    traced = asked.ids[: asked.traced]
    modules = compare_modules(llm.steps, reference, traced, tolerance)
    gradients = None
    if asked.gradients:
        gradients = compare_gradients(
            llm.source,
            plan,
            mesh,
            llm.steps.dtype,
            traced,
            reference,
            limits.gradients_relative_l2,
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
        prefill=_worst(ours.prefill, reference.logits("prefill"), after_prefill),
        decode=decode,
        dtype_prefill=dtype_prefill,
        dtype_decode=dtype_decode,
        gradients=gradients,
        modules=modules,
        first_fault=first_fault(modules),
        programs_after_warmup=ours.programs_after_warmup,
    )


def _worst(rows: torch.Tensor, wanted: torch.Tensor, targets: Sequence[int]) -> LogitFigures:
    """The figures of the data row that differs most from the reference; it stands for all.

    Args:
        rows: `[R, N, V]`.
        wanted: `[N, V]`.
    """

    def distance(figures: LogitFigures) -> float:
        return math.inf if math.isnan(figures.relative_l2) else figures.relative_l2

    return max((compare_logits(row, wanted, targets) for row in rows), key=distance)


def _of_dtype(
    reference: ReferenceOutputs, part: str, dtype: str, targets: Sequence[int]
) -> LogitFigures:
    """The reference in the run's dtype against itself in float32."""
    return compare_logits(reference.logits(part, dtype), reference.logits(part), targets)


def _finite(value: Any) -> Any:
    """A document with None for every number that is infinite or NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
