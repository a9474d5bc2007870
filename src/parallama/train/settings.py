"""What `parallama train` is told: the keys of its config, read from YAML and `--key value`, checked, and written back. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import FitError, UsageError, cause, lines, listed, shown
from ..plan.mesh_shape import MeshShape
from .options import LoraOptions, StepOptions
from .schedule import Kind, Schedule

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


class LoraSettings(BaseModel):
    """Low-rank adapters in place of full weights (Hu et al., 2021)."""

    model_config = _STRICT

    rank: Count = Field(8, description="rank of the two factors")
    alpha: Positive = Field(16.0, description="the product is scaled by alpha / rank")
    targets: list[str] = Field(
        ["q_proj", "v_proj"], description="modules that get an adapter, by their last name"
    )
    dropout: Share = Field(0.0, description="share of an adapter's inputs that is dropped")


class TrainSettings(BaseModel):
    """A training run. Every field is a key of the config."""

    model_config = _STRICT

    model: str = Field(description="folder, .gguf file, hub id or shipped name (smollm2)")
    data: str | list[str] = Field(
        description="JSONL or .txt file, a folder of them, shipped:chat, shipped:text, hf:NAME[:SPLIT]; or a list"
    )
    out: str = Field(description="folder of the run: checkpoints, log.jsonl, the trained model")
    steps: Count = Field(description="optimizer steps of the whole run")
    mesh: str = Field("1x1", description="data x model, as 2x4")
    backend: str = Field("cpu", description="cpu, tpu, tt, or the path or name of a PJRT plugin")
    plan: str | None = Field(None, description="YAML or JSON file of sharding overrides")
    batch_size: Count = Field(4, description="sequences of one micro-step, over all devices")
    grad_accum: Count = Field(1, description="micro-steps of one optimizer step")
    seq_len: Annotated[int, Field(ge=2)] = Field(512, description="tokens of a sequence")
    packing: bool = Field(True, description="several documents a sequence, each seeing only itself")
    too_long: Literal["error", "drop", "truncate"] = Field(
        "error", description="what becomes of a conversation longer than seq_len"
    )
    seed: Whole = Field(0, description="order of the data, adapters, dropout")
    lr: Positive = Field(2e-5, description="peak learning rate")
    schedule: Kind = Field("cosine", description="cosine, linear or constant, after the warm-up")
    warmup_steps: Whole = Field(0, description="steps of linear warm-up")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="what the learning rate falls to, as a share of lr"
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="adamw or sgd")
    beta1: Share = Field(0.9, description="AdamW's decay of the gradient's mean")
    beta2: Share = Field(0.999, description="AdamW's decay of its square's mean")
    eps: Positive = Field(1e-8, description="AdamW's epsilon")
    momentum: Share = Field(0.0, description="SGD's momentum")
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="decoupled; none on norms and biases"
    )
    max_grad_norm: Positive | None = Field(
        1.0, description="gradients are scaled down to this global norm; null: never"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="what to do at a loss or gradient that is no number"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of products and activations; weights are kept in float32"
    )
    remat: Literal["none", "full"] | Count = Field(
        "none",
        description="recompute activations in the backward pass: none, full, or of every n-th layer",
    )
    fsdp: bool = Field(
        False, description='weights, gradients and optimizer state are split over "data" too'
    )
    sequence_parallel: bool = Field(
        False, description="norms and the residual stream are split along the sequence"
    )
    lora: LoraSettings | None = Field(
        None, description="rank, alpha, targets, dropout; null trains every weight"
    )
    save_every: Whole = Field(100, description="steps between checkpoints; 0: only at the end")
    keep_last: Count = Field(2, description="checkpoints that are kept")
    allow_nonfinite: bool = Field(False, description="load weights that hold NaN or infinity, too")
    async_save: bool = Field(True, description="write checkpoints while training goes on")
    resume: str = Field(
        "no",
        description="no, auto (the newest complete checkpoint of out), or a checkpoint's folder",
    )
    eval_data: str | list[str] | None = Field(None, description="validation data, as data")
    eval_every: Whole = Field(0, description="steps between validations; 0: never")
    eval_batches: Count = Field(
        8, description="most batches (of grad_accum x batch_size sequences) of a validation"
    )
    sample_every: Whole = Field(0, description="steps between samples of generated text; 0: never")
    sample_prompts: list[str] = Field([], description="what the samples continue")
    sample_tokens: Count = Field(48, description="new tokens of a sample")
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        [], description="where the log goes besides log.jsonl"
    )
    export: bool = Field(
        True, description="write OUT/model at the end, a folder that transformers loads"
    )
    cache: str = Field("~/.cache/parallama/tokens", description="folder of tokenized data")

    @property
    def sources(self) -> list[str]:
        return [self.data] if isinstance(self.data, str) else self.data

    @property
    def eval_sources(self) -> list[str]:
        return (
            []
            if self.eval_data is None
            else [self.eval_data]
            if isinstance(self.eval_data, str)
            else self.eval_data
        )

    @property
    def mesh_shape(self) -> MeshShape:
        return MeshShape.parse(self.mesh)

    @property
    def learning_rate(self) -> Schedule:
        return Schedule(
            kind=self.schedule,
            peak=self.lr,
            steps=self.steps,
            warmup=self.warmup_steps,
            floor=self.min_lr_ratio,
        )

    @property
    def step_options(self) -> StepOptions:
        """How a step is done."""
        asked = self.lora
        lora = None
        if asked is not None:
            lora = LoraOptions(
                rank=asked.rank,
                alpha=asked.alpha,
                targets=tuple(asked.targets),
                dropout=asked.dropout,
            )
        return StepOptions(
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            grad_accum=self.grad_accum,
            remat=self.remat,
            fsdp=self.fsdp,
            sequence_parallel=self.sequence_parallel,
            dtype=self.dtype,
            optimizer=self.optimizer,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            lora=lora,
        )


def read(path: Path | None, options: Sequence[str] = ()) -> TrainSettings:
    """The settings of a config file and the options behind it, which win.

    Args:
        path: a YAML file.
        options: `--key value`, `--key=value`, or `--key` for true; `--lora.rank 8` for a key within a key; dashes may stand for underscores.

    Raises:
        UsageError: the file or an option cannot be read, a key is unknown or missing, or a value is not of its kind.
        FitError: the batch doesn't divide over the mesh.
    """
    document = _document(path) if path is not None else {}
    for key, text in _pairs(options):
        _set(document, key, text)
    return make(document)


def make(document: Mapping[str, Any]) -> TrainSettings:
    """Settings from a mapping; see `read` for what it raises."""
    try:
        settings = TrainSettings.model_validate(dict(document))
    except ValidationError as error:
        raise _complaint(error) from None
    _check(settings)
    return settings


def dump(settings: TrainSettings) -> str:
    """The settings as YAML, defaults included, each key with what it means; `read` gives the same settings back."""
    document = settings.model_dump()
    parts = []
    for name, field in TrainSettings.model_fields.items():
        text = yaml.dump(
            {name: document[name]}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000
        )
        parts.append(f"# {field.description}\n{text}")
    return "".join(parts)


def keys() -> list[str]:
    """All keys, in order."""
    return list(TrainSettings.model_fields)


class _Loader(yaml.SafeLoader):
    """YAML with version 1.2's numbers and truth values (1e-4 is a number, `no` is a word), in which a key may stand only once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands there twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in found
        if tag
        not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"true|false|True|False|TRUE|FALSE"), list("tfTF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d+(?:[eE][-+]?\d+)?|\.(?:inf|nan))"
    ),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would take for something else."""


_Dumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
    + _Loader.yaml_implicit_resolvers.get(first, [])
    for first in {**yaml.SafeDumper.yaml_implicit_resolvers, **_Loader.yaml_implicit_resolvers}
}


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _document(path: Path) -> dict[str, Any]:
    try:
        document = _load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            lines(f"config {str(path)!r} cannot be read: {error.strerror}", "expected a YAML file")
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UsageError(
            lines(
                f"config {str(path)!r} is no YAML: {cause(error)}",
                "expected lines such as lr: 1e-4",
            )
        ) from None
    document = {} if document is None else document
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise UsageError(
            lines(
                f"config {str(path)!r} holds {shown(document)}",
                "expected keys with values, as lr: 1e-4",
            )
        )
    return document


def _pairs(options: Sequence[str]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    waiting = list(options)
    while waiting:
        option = waiting.pop(0)
        if not option.startswith("--") or len(option) == 2:
            raise UsageError(lines(f"{shown(option)} is no option", "expected --key value"))
        name, given, value = option[2:].partition("=")
        if not given:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        key = name.replace("-", "_")
        if key in (known for known, _ in pairs):
            raise UsageError(lines(f"--{name} was given twice", "expected it once"))
        pairs.append((key, value))
    return pairs


def _set(document: dict[str, Any], key: str, text: str) -> None:
    """Put an option into a document; its text is read as in the file, but for keys that hold text."""
    first, _, inner = key.partition(".")
    field = TrainSettings.model_fields.get(first)
    if inner:
        own = document.get(first)
        document[first] = dict(own) if isinstance(own, dict) else {}
        document[first][inner] = _value(key, text)
    else:
        kind = None if field is None else field.annotation
        is_text = kind is str or (kind == str | None and text != "null")
        document[key] = text if is_text else _value(key, text)


def _value(key: str, text: str) -> Any:
    try:
        return _load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(
            lines(
                f"--{key} {shown(text)} cannot be read: {cause(error)}",
                "expected a value as in YAML",
            )
        ) from None


def _complaint(error: ValidationError) -> UsageError:
    """The first complaint of pydantic's, in our words."""
    # An unknown key first: a misspelt one is often missing, too.
    found = sorted(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
    path = ".".join(
        str(part)
        for part in found[0]["loc"]
        if part in keys() or part in LoraSettings.model_fields or isinstance(part, int)
    )
    first = found[0]
    name = str(first["loc"][-1])
    if first["type"] == "extra_forbidden":
        inside = [*found[0]["loc"][:-1]]
        known = list(LoraSettings.model_fields) if inside else keys()
        near = difflib.get_close_matches(name, known, 1)
        full = ".".join([*(str(part) for part in inside if part in keys()), name])
        return UsageError(
            lines(
                f"config key {full!r} is unknown",
                f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}",
            )
        )
    if first["type"] == "missing":
        names = [str(entry["loc"][-1]) for entry in found if entry["type"] == "missing"]
        return UsageError(
            lines(
                f"config key {listed(names)} is missing",
                "give it in the config file or as --key value",
            )
        )
    key = str(first["loc"][0])
    expected = " or ".join(
        dict.fromkeys(
            entry["msg"].removeprefix("Input should be ")
            for entry in found
            if entry["loc"][0] == key
        )
    )
    description = (
        TrainSettings.model_fields[key].description if key in TrainSettings.model_fields else ""
    )
    return UsageError(
        lines(
            f"config key {path or key!r} is {shown(first['input'])}",
            f"expected {expected}",
            f"{key}: {description}",
        )
    )


def _check(settings: TrainSettings) -> None:
    """What one key alone can't tell."""
    shape, _ = settings.mesh_shape, settings.step_options
    if settings.batch_size % shape.data:
        raise FitError(
            lines(
                f"batch_size {settings.batch_size} does not divide over {shape.data} devices along 'data' (mesh {shape})",
                f"expected a multiple of {shape.data}; batch_size counts the sequences of one micro-step over all devices",
            )
        )
    if settings.warmup_steps > settings.steps:
        raise UsageError(
            lines(
                f"warmup_steps is {settings.warmup_steps}, steps is {settings.steps}",
                "expected a warm-up within the run",
            )
        )
    if not settings.sources or (settings.eval_data is not None and not settings.eval_sources):
        raise UsageError(
            lines(
                "config key 'data' is an empty list",
                "expected at least one file, folder or data set",
            )
        )
    if settings.eval_every and settings.eval_data is None:
        raise UsageError(
            lines(
                f"eval_every is {settings.eval_every}, but there is no eval_data",
                "expected both, or neither",
            )
        )
    if settings.eval_data is not None and not settings.eval_every:
        raise UsageError(
            lines("eval_data is given, but eval_every is 0", "expected both, or neither")
        )
    if settings.sample_every and not settings.sample_prompts:
        raise UsageError(
            lines(
                f"sample_every is {settings.sample_every}, but there are no sample_prompts",
                "expected both, or neither",
            )
        )
    if not settings.resume:
        raise UsageError(lines("resume is empty", "expected no, auto, or a checkpoint's folder"))
