"""What `parallama train` is told: the keys of its config, from YAML and `--key value`. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from ..errors import UsageError, cause, lines, listed, shown
from ..plan.mesh_shape import MeshShape
from . import yaml_config
from .declared import REQUIRED, Declaration, Declared, declarations, option
from .key_names import nearest
from .layout import check_batch
from .options import StepOptions
from .schedule import Kind, Schedule

T = TypeVar("T", bound=Declared)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(StepOptions):
    """A training run. Every field is a key of the config; those of `StepOptions` are, too."""

    model: str = option(REQUIRED, "folder, .gguf file, hub id or shipped name (smollm2)")
    data: str | tuple[str, ...] = option(
        REQUIRED,
        "JSONL, JSON or text file, a folder of them, shipped:chat, shipped:text, "
        "hf:NAME[:SPLIT]; or a list",
    )
    out: str = option(REQUIRED, "folder of the run: checkpoints, log.jsonl, the trained model")
    steps: int | None = option(
        None, "optimizer steps of the whole run; this or epochs must be given", least=1
    )
    epochs: float | None = option(None, "passes over the data, instead of steps", above=0)
    mesh: str = option("1x1", "data x model, as 2x4")
    backend: str = option("cpu", "cpu, tpu, tt, or the path or name of a PJRT plugin")
    plan: str | None = option(None, "YAML or JSON file of sharding overrides")
    packing: bool = option(True, "several documents a sequence, each seeing only itself")
    too_long: Literal["error", "drop", "truncate"] = option(
        "error", "what becomes of a conversation longer than seq_len"
    )
    split_answers: bool = option(
        False, "a sample for each answer of a conversation, which ends with it"
    )
    bad_rows: Literal["error", "drop"] = option(
        "error", "what becomes of rows of no known form, or with nothing to train on"
    )
    seed: int = option(0, "order of the data, adapters, dropout", least=0)
    lr: float = option(2e-5, "peak learning rate", above=0)
    schedule: Kind = option("cosine", "cosine, linear or constant, after the warm-up")
    warmup_steps: int | float = option(
        0, "steps of linear warm-up; below 1: a share of all steps", least=0
    )
    min_lr_ratio: float = option(
        0.0, "what the learning rate falls to, as a share of lr", least=0, most=1
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "what to do at a loss or gradient that is no number"
    )
    save_every: int = option(100, "steps between checkpoints; 0: only at the end", least=0)
    keep_last: int = option(2, "checkpoints that are kept", least=1)
    allow_nonfinite: bool = option(False, "load weights that hold NaN or infinity, too")
    async_save: bool = option(True, "write checkpoints while training goes on")
    resume: str = option(
        "no",
        "no, auto (the newest complete checkpoint of out), or a checkpoint's folder",
        aliases={True: "auto", False: "no", "true": "auto", "false": "no"},
    )
    resume_with_changes: bool = option(
        False, "go on although schedule, batch, data, seed or optimizer are no longer the same"
    )
    eval_data: str | tuple[str, ...] | None = option(None, "validation data, as data")
    eval_every: int = option(0, "steps between validations; 0: never", least=0)
    eval_batches: int = option(
        8, "most batches (of grad_accum x batch_size sequences) of a validation", least=1
    )
    sample_every: int = option(0, "steps between samples of generated text; 0: never", least=0)
    sample_prompts: tuple[str, ...] = option((), "what the samples continue")
    sample_tokens: int = option(48, "new tokens of a sample", least=1)
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = option(
        (),
        "where the log goes besides log.jsonl: tensorboard, wandb",
        words=True,
        aliases={"none": ()},
    )
    export: bool = option(True, "write OUT/model at the end, a folder that transformers loads")
    cache: str = option("~/.cache/parallama/tokens", "folder of tokenized data")

    @property
    def sources(self) -> list[str]:
        return _sources(self.data)

    @property
    def eval_sources(self) -> list[str]:
        return _sources(self.eval_data)

    @property
    def mesh_shape(self) -> MeshShape:
        return MeshShape.parse(self.mesh)

    def learning_rate(self, steps: int) -> Schedule:
        """The schedule of a run of so many steps.

        Raises:
            UsageError: the warm-up is longer, or no whole number of steps.
        """
        warmup = self.warmup_steps
        if warmup < 1:
            warmup = math.ceil(warmup * steps)
        if warmup != int(warmup):
            raise UsageError(
                lines(
                    f"warmup_steps is {warmup}",
                    "expected a whole number, or a share of all steps below 1",
                )
            )
        if warmup > steps:
            raise UsageError(
                lines(
                    f"warmup_steps is {warmup:g}, steps is {steps}",
                    "expected a warm-up within the run",
                )
            )
        return Schedule(
            kind=self.schedule,
            peak=self.lr,
            steps=steps,
            warmup=int(warmup),
            floor=self.min_lr_ratio,
        )

    @property
    def step_options(self) -> StepOptions:
        """How a step is done."""
        return StepOptions(
            **{each.name: getattr(self, each.name) for each in declarations(StepOptions)}
        )


def read(path: Path | None, options: Sequence[str] = ()) -> TrainSettings:
    """The settings of a config file and the options behind it, which win.

    Args:
        path: a YAML file.
        options: `--key value`, `--key=value`, or `--key` for true; `--lora.rank 8` for a key
            within a key; dashes may stand for underscores.

    Raises:
        UsageError: the file or an option cannot be read, a key is unknown or missing, or a value
            is not of its kind.
        FitError: the batch doesn't divide over the mesh.
    """
    document = yaml_config.read_file(path) if path is not None else {}
    pairs = _pairs(options)
    for key, text in pairs:
        _set(document, key, text)
    given = {key for key, _ in pairs}
    for key, other in (("steps", "epochs"), ("epochs", "steps")):
        if key in given and other not in given:
            document.pop(other, None)
    return make(document)


def make(document: Mapping[str, Any]) -> TrainSettings:
    """Settings from a mapping; see `read` for what it raises.

    Keys within a key may stand below it, or after it as `lora.rank`.
    """
    within = [key for key in document if "." in key and key.partition(".")[0] in keys()]
    nested = {key: document[key] for key in document if key not in within}
    for key in within:
        _set_within(nested, key, document[key])
    settings = _build(TrainSettings, nested)
    _check(settings)
    return settings


def dump(settings: TrainSettings) -> str:
    """The settings as YAML, defaults included, each key with what it means.

    `read` gives the same settings back.
    """
    helps = {each.name: each.help for each in declarations(TrainSettings)}
    return yaml_config.write(settings.to_dict(), helps)


def keys() -> list[str]:
    """All keys, in order."""
    return [each.name for each in declarations(TrainSettings)]


def explain() -> Iterator[tuple[str, Declaration]]:
    """What is known of every key, those within a key after it, as `lora.rank`."""
    for each in declarations(TrainSettings):
        yield each.name, each
        if each.nested is not None:
            for inner in declarations(each.nested):
                yield f"{each.name}.{inner.name}", inner


def _sources(given: str | tuple[str, ...] | None) -> list[str]:
    if given is None:
        return []
    return [given] if isinstance(given, str) else list(given)


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
    """Put an option into a document.

    Its text is read as in the file, but for keys that hold text.
    """
    if "." in key:
        _set_within(document, key, _value(key, text))
        return
    kind = next((each.kind for each in declarations(TrainSettings) if each.name == key), None)
    kinds = {kind, *get_args(kind)}
    is_text = kind is str or (str in kinds and text != "null" and not text.startswith("["))
    document[key] = text if is_text else _value(key, text)


def _set_within(document: dict[str, Any], key: str, value: Any) -> None:
    """Put a value below the first part of its key."""
    first, _, inner = key.partition(".")
    own = document.get(first)
    document[first] = (dict(own) if isinstance(own, dict) else {}) | {inner: value}


def _value(key: str, text: str) -> Any:
    try:
        return yaml_config.parse(text)
    except yaml_config.BROKEN as error:
        raise UsageError(
            lines(
                f"--{key} {shown(text)} cannot be read: {cause(error)}",
                "expected a value as in YAML",
            )
        ) from None


def _build(kind: type[T], document: Mapping[str, Any], within: str = "") -> T:
    """Options from the keys of a document; `within` is the key that they stand below."""
    known = {each.name: each for each in declarations(kind)}
    for key in document:
        if key not in known:
            raise _unknown(f"{within}{key}")
    missing = [each.name for each in known.values() if each.required and each.name not in document]
    if kind is TrainSettings and document.get("steps") is document.get("epochs") is None:
        missing.append("steps (or epochs)")
    if missing:
        raise UsageError(
            lines(
                f"config key {listed(missing)} is missing",
                "give it in the config file or as --key value",
            )
        )
    values = {}
    for key, value in document.items():
        declared = known[key]
        if declared.nested is not None and isinstance(value, bool):
            value = {} if value else None
        if declared.nested is not None and isinstance(value, Mapping):
            value = _build(declared.nested, value, f"{key}.")
        called = f"config key {f'{within}{key}'!r}"
        values[key] = declared.check(value, called, f"{key}: {declared.help}")
    return kind(**values)


def _unknown(key: str) -> UsageError:
    explained = dict(explain())
    near = nearest(key, explained)
    return UsageError(
        lines(
            f"config key {key!r} is unknown",
            f"did you mean {near!r}? {explained[near].help}"
            if near is not None
            else "expected one of those that 'parallama train --help' explains",
        )
    )


def _check(settings: TrainSettings) -> None:
    """What one key alone can't tell."""
    check_batch(settings.batch_size, settings.mesh_shape)
    if settings.steps is not None:
        if settings.epochs is not None:
            raise UsageError(
                lines(
                    f"steps is {settings.steps}, and epochs is {settings.epochs:g}",
                    "expected one of the two: each says how long the run is",
                )
            )
        settings.learning_rate(settings.steps)
    if not settings.sources or (settings.eval_data is not None and not settings.eval_sources):
        key = "eval_data" if settings.sources else "data"
        raise UsageError(
            lines(
                f"config key {key!r} is an empty list",
                "expected at least one file, folder or data set",
            )
        )
    for every, steps, what, verb, given in (
        ("eval_every", settings.eval_every, "eval_data", "is", settings.eval_data),
        ("sample_every", settings.sample_every, "sample_prompts", "are", settings.sample_prompts),
    ):
        if steps and not given:
            problem = f"{every} is {steps}, but there {verb} no {what}"
        elif given and not steps:
            problem = f"{what} {verb} given, but {every} is 0"
        else:
            continue
        raise UsageError(lines(problem, "expected both, or neither"))
    if not settings.resume:
        raise UsageError(lines("resume is empty", "expected no, auto, or a checkpoint's folder"))
