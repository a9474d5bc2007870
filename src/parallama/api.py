"""What Python users call first: `load`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .engine.interface import Engine, OptionValue, start
from .errors import UsageError, lines, shown
from .files.find import find
from .files.locate import locate
from .inference.llm import LLM
from .inference.sharded_model import Progress
from .model.config_checks import eos_ids
from .model.spec import ModelSpec
from .plan.make_plan import make_plan
from .plan.mesh_shape import MeshShape
from .plan.overrides import read_overrides
from .plan.placement import Plan
from .plan.program_shapes import MAX_NUM_SEQS
from .progress_bars import ProgressBars, is_watched
from .sharded import loading


def load(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    mesh: str | MeshShape | tuple[int, ...] | Engine = "1x1",
    backend: str = "cpu",
    backend_options: Mapping[str, OptionValue] | None = None,
    devices: int | None = None,
    plan: str | Path | Mapping[str, Any] | None = None,
    dtype: str = "auto",
    max_model_len: int | Callable[[Plan, int], int] | None = None,
    max_num_seqs: int = MAX_NUM_SEQS,
    allow_nonfinite: bool = False,
    progress: Progress | bool | None = True,
    keep_hlo: bool = False,
) -> LLM:
    """Load a model onto a mesh.

    Args:
        model: folder, `.gguf` file, hub id or shipped name (`smollm2`); or an adapter of PEFT's,
            which names its base.
        adapter: folder or hub id of an adapter of the model, merged while the weights are read.
        mesh: `1x8` (data x model), `data=2,model=4`.
        backend: `cpu` (virtual devices), `tpu`, `tt`, the path of a PJRT plugin, or an installed
            plugin's name.
        backend_options: for the client that a plugin makes.
        devices: device count, where it should be checked against the mesh.
        plan: overrides as a mapping from parameter-name pattern to style or axes, or a YAML or JSON
            file of them.
        dtype: `auto`, `float32` or `bfloat16`; `auto` is the checkpoint's, but float32 on the CPU
            backend.
        max_model_len: most tokens of prompt and answer together; the model's own maximum if None.
            Or a function of the plan and the bytes of a number, called before weights are read.
        max_num_seqs: most texts that a run continues at a time; others wait for their turn.
        allow_nonfinite: load weights that hold NaN or infinity, too.
        progress: whether loading and compiling show bars on standard error, where that is a
            terminal or a notebook; or a function that is called in their place.
        keep_hlo: keep the optimized HLO of every program, which `audit` and `inspect` read.

    Raises:
        ParallamaError: with the exit code of its kind; see `errors`.
    """
    began = time.perf_counter()
    if isinstance(progress, bool):
        progress = ProgressBars() if progress and is_watched() else None
    overrides = read_overrides(plan) if isinstance(plan, (str, Path)) else plan
    shape = mesh.shape if isinstance(mesh, Engine) else MeshShape.parse(mesh)
    locate(str(model))
    if not isinstance(mesh, Engine):
        # A mesh that doesn't fit says so before anything is read, a wrong name before that.
        mesh = start(
            shape,
            backend=backend,
            backend_options=backend_options,
            devices=devices,
            keep_hlo=keep_hlo,
        )
    loading.resolve_dtype(dtype, None, mesh.backend.name)
    source = find(str(model), None if adapter is None else str(adapter))
    spec = ModelSpec.from_config(source.config)
    made = make_plan(spec, shape, overrides)
    to = loading.resolve_dtype(dtype, source.config, mesh.backend.name)
    if callable(max_model_len):
        max_model_len = max_model_len(made, to.itemsize)
    if max_model_len is not None and not 1 <= max_model_len <= spec.max_positions:
        raise UsageError(
            lines(
                f"max_model_len is {max_model_len}",
                f"expected 1 to {spec.max_positions}, the model's maximum",
            )
        )
    if type(max_num_seqs) is not int or max_num_seqs < 1:
        raise UsageError(
            lines(f"max_num_seqs is {shown(max_num_seqs)}", "expected a whole number of at least 1")
        )
    tokenizer = source.tokenizer()
    generation = {"eos_token_id": getattr(source.config, "eos_token_id", None)} | source.generation
    eos_ids(generation["eos_token_id"], tokenizer, spec.vocab)
    report = None if progress is None else partial(progress, "loading")
    loaded = loading.to_devices(source, made, mesh, to, report, allow_nonfinite=allow_nonfinite)
    return LLM(
        name=str(model),
        adapter=None if adapter is None else str(adapter),
        skeleton=loaded.skeleton,
        weights=loaded.weights,
        dtype=to,
        tokenizer=tokenizer,
        generation=generation,
        max_model_len=max_model_len or spec.max_positions,
        max_num_seqs=max_num_seqs,
        ignored=source.ignored,
        load_s=time.perf_counter() - began,
        load_stats=loaded.stats,
        overrides=overrides,
        source=source,
        progress=progress,
    )
