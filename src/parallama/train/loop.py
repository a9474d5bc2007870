"""A training run: data, steps, validation, log and checkpoints, from the first step or from where a run ended."""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..engine.devices.versions import version_of
from ..errors import RunError, cause, lines
from ..files.disk import Disk, RunLock, unwritable
from ..files.find import find
from . import resume
from . import settings as settings_of
from .batch import PADDING
from .logs import JsonLog, Sink, TensorBoard, WandB, closing
from .packing import Position, Row, Rows, empty_row, make_batch
from .settings import TrainSettings

if TYPE_CHECKING:
    from .tokens import Corpus

CHECKPOINTS, MODEL, ADAPTER, CONFIG = "checkpoints", "model", "adapter", "config.yaml"


@dataclass(kw_only=True)
class Watch:
    """What a run tells while it goes on; every field may be left out.

    Attributes:
        say: a line for people.
        progress: what is being done, how much of it is, and of how much.
        step: the log entry of a step, and how many steps there are.
    """

    say: Callable[[str], None] = field(default=lambda _line: None)
    progress: Callable[[str, int, int], None] | None = None
    step: Callable[[dict[str, Any], int], None] = field(default=lambda _entry, _steps: None)

    def of(self, what: str) -> Callable[[int, int], None] | None:
        """`progress` for one thing."""
        report = self.progress
        return None if report is None else lambda done, total: report(what, done, total)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        steps: optimizer steps that are done, those of earlier runs included.
        signal: the signal that ended it, after a checkpoint; None if it is complete.
        checkpoint: the last one.
        model: the exported folder, if there is one.
        loss: of the last step; None if there was none left to do.
        programs_after_warmup: programs that were compiled after those of the run were made; 0.
    """

    steps: int
    signal: int | None
    checkpoint: Path
    model: Path | None
    loss: float | None
    programs_after_warmup: int


def train(
    settings: TrainSettings, *, watch: Watch | None = None, disk: Disk | None = None
) -> Outcome:
    """Train, and leave checkpoints, a log and the trained model in `settings.out`.

    SIGTERM and SIGINT end the run at the next step, with a checkpoint.

    Args:
        disk: what checkpoints are written with.

    Raises:
        ParallamaError: settings, data, model or checkpoint that don't fit, before anything is compiled; or a run that broke: a loss that is no number, a checkpoint that can't be saved.
    """
    lock = RunLock(Path(settings.out).expanduser())
    try:
        return _Run(settings, watch or Watch(), disk).go()
    finally:
        lock.release()


class _Run:
    """What a run is made of, and the loop over it."""

    def __init__(self, settings: TrainSettings, watch: Watch, disk: Disk | None) -> None:
        from ..engine.interface import start
        from ..model.spec import ModelSpec
        from ..plan.placement import make_plan, read_overrides
        from . import checkpoints
        from .layout import check_fit, training_plan
        from .speed import Speed
        from .trainer import make_trainer

        self.settings, self.watch, self.disk = settings, watch, disk or Disk()
        self.sequences = settings.grad_accum * settings.batch_size
        self.folder = Path(settings.out).expanduser()
        saved = self.folder / CHECKPOINTS
        checkpoints.clean(saved)
        resumed = resume.find(settings, saved, watch.say)
        overrides = read_overrides(settings.plan) if settings.plan is not None else None
        self.mesh = start(settings.mesh_shape, backend=settings.backend)
        self.model = find(settings.model)
        self.tokenizer = self.model.tokenizer()
        spec = ModelSpec.from_config(self.model.config)
        self.vocab = spec.vocab
        plan, how = make_plan(spec, self.mesh.shape, overrides), settings.step_options
        check_fit(how, training_plan(plan, fsdp=how.fsdp, lora=how.lora))
        self.corpus, self.eval_rows = self._data()
        if resumed is not None:
            resume.check_data(resumed, self.corpus.fingerprint)
        self.trainer = make_trainer(
            self.model,
            self.mesh,
            how,
            plan=plan,
            seed=settings.seed,
            progress=watch.of("loading"),
            allow_nonfinite=settings.allow_nonfinite,
        )
        self.done, self.tokens, position, self.last_save = 0, 0, Position(), -1
        if resumed is not None:
            manifest = resumed.manifest
            self.trainer.load(checkpoints.read_tensors(resumed.path, manifest))
            self.done, self.tokens = manifest.step, manifest.tokens
            position = Position(epoch=manifest.data.epoch, row=manifest.data.row)
            watch.say(
                f"resumed from {resumed.path} after {self.done} steps on mesh {manifest.mesh.shape}"
            )
        held = self.trainer.bytes_per_device()
        self.bytes_per_device = [sum(each) for each in zip(*held.values(), strict=True)]
        self.rows = Rows(
            self.corpus,
            settings.seq_len,
            seed=settings.seed,
            packing=settings.packing,
            position=position,
        )
        self.speed = Speed.of(spec, self.sequences, settings.seq_len, self.mesh.backend.name)
        self.saver = checkpoints.Saver(
            saved, keep_last=settings.keep_last, asynchronous=settings.async_save, disk=self.disk
        )

    def _data(self) -> tuple[Corpus, list[Row]]:
        """Tokenized data, and the rows of a validation: the first of its data, in whole batches, the same every time."""
        from . import tokens

        settings = self.settings
        found = {}
        for what, sources in (("data", settings.sources), ("eval_data", settings.eval_sources)):
            if not sources:
                continue
            corpus = found[what] = tokens.prepare(
                sources,
                self.tokenizer,
                seq_len=settings.seq_len,
                too_long=settings.too_long,
                cache=Path(settings.cache),
                progress=self.watch.of(f"tokenizing {what}"),
            )
            corpus.check(self.vocab)
            lost = [
                f", {count} {how}"
                for count, how in (
                    (corpus.dropped, "dropped as too long"),
                    (corpus.truncated, "truncated"),
                )
                if count
            ]
            self.watch.say(
                f"{what}: {len(corpus.lengths):,} documents, {corpus.token_count:,} tokens, {corpus.trained_count:,} of them trained on{''.join(lost)}"
            )
        if "eval_data" not in found:
            return found["data"], []
        rows = Rows(found["eval_data"], settings.seq_len, packing=settings.packing, shuffle=False)
        taken = rows.take(min(len(rows), settings.eval_batches * self.sequences))
        return found["data"], taken + [empty_row(settings.seq_len)] * (-len(taken) % self.sequences)

    def go(self) -> Outcome:
        """Train to the end, or to a signal."""

        settings = self.settings
        try:
            (self.folder / CONFIG).write_text(settings_of.dump(settings), encoding="utf-8")
        except OSError as error:
            raise unwritable("the config", self.folder / CONFIG, error) from None
        log = JsonLog(self.folder, self.done, self.disk)
        sinks: list[Sink] = [log]
        loss: float | None = None
        with self.saver, closing(sinks):
            if "tensorboard" in settings.report_to:
                sinks.append(TensorBoard(self.folder, self.done))
            if "wandb" in settings.report_to:
                sinks.append(WandB(self.folder, settings.to_dict()))
            if self.done < settings.steps:
                began = time.perf_counter()
                self.trainer.compile(evaluate=bool(self.eval_rows))
                self.watch.say(
                    f"compiled in {time.perf_counter() - began:.1f} s; {self._predicted()}"
                )
                if settings.sample_every:  # its programs, too, are made before the first step
                    for sample in self._samples():
                        self.watch.say(
                            f"before step {self.done + 1}: {sample['prompt']}{sample['text']}"
                        )
            compiled = self.mesh.compilations()
            with _signals() as caught:
                while self.done < settings.steps and not caught:
                    loss = self._step(sinks)
                    if self.done == settings.steps or (
                        settings.save_every and self.done % settings.save_every == 0
                    ):
                        self._save(log)
                # Of a run that was complete, what its last save left undone: the link, older ones to remove.
                if self.done != self.last_save:
                    self._save(log)
                self.saver.wait()
            late = self.mesh.compilations() - compiled
        stopped = caught[0] if caught and self.done < settings.steps else None
        return Outcome(
            steps=self.done,
            signal=stopped,
            checkpoint=self.saver.path(self.done),
            model=self._export() if settings.export and stopped is None else None,
            loss=loss,
            programs_after_warmup=late,
        )

    def _predicted(self) -> str:
        """What a step takes on each device, in words."""
        from ..plan.cost import shown_bytes
        from ..plan.train_cost import train_memory
        from .layout import train_step
        from .options import slots

        options, plan = self.trainer.options, self.trainer.plan
        memory = train_memory(
            plan,
            train_step(options, plan.model.layers, self.mesh.traits.sum_bytes),
            slots=len(slots(options)),
        )
        return f"predicted on each device: {shown_bytes(memory.activations)} of activations, {shown_bytes(memory.total)} in all"

    def _step(self, sinks: list[Sink]) -> float:
        """One optimizer step, with all that comes with it; its loss."""
        settings = self.settings
        self.saver.check()
        began = time.perf_counter()
        batch = make_batch(self.rows.take(self.sequences), settings.grad_accum)
        rate = settings.learning_rate(self.done)
        result = self.trainer.step(batch, rate)
        seconds = time.perf_counter() - began
        tokens = int((batch.documents != PADDING).sum())
        self.done += 1
        self.tokens += tokens
        entry: dict[str, Any] = {
            "step": self.done,
            "loss": result.loss,
            "lr": rate,
            "grad_norm": result.grad_norm,
            "tokens_per_s": tokens / seconds,
            "step_time_s": seconds,
            "mfu": self.speed.mfu(seconds),
            "tokens": tokens,
            "target_tokens": result.tokens,
            "epoch": self.rows.position.epoch,
            "bytes_per_device": self.bytes_per_device,
        }
        if not result.finite:
            entry["skipped"] = True
        elif settings.eval_every and self.done % settings.eval_every == 0:
            entry |= self._validate()
        if settings.sample_every and self.done % settings.sample_every == 0:
            entry["samples"] = self._samples()
        for sink in sinks:
            sink.write(entry)
        self.watch.step(entry, settings.steps)
        if not result.finite and settings.on_nonfinite == "stop":
            self.saver.wait()
            raise RunError(
                lines(
                    f"step {self.done}: loss {result.loss}, gradient norm {result.grad_norm}",
                    f"expected numbers; the weights are as before, and {self.saver.state()}",
                    "lower lr, look at the data, or set on_nonfinite to skip",
                )
            )
        return result.loss

    def _validate(self) -> dict[str, float]:
        """Loss and perplexity of the validation rows, each token weighing the same."""
        total, count = 0.0, 0
        for at in range(0, len(self.eval_rows), self.sequences):
            loss, tokens = self.trainer.evaluate(
                make_batch(self.eval_rows[at : at + self.sequences], self.settings.grad_accum)
            )
            total, count = total + loss, count + tokens
        mean = total / count
        return {
            "eval_loss": mean,
            "eval_perplexity": math.exp(min(mean, 700.0)),
            "eval_tokens": count,
        }

    def _samples(self) -> list[dict[str, str]]:
        """What the model as it is makes of the prompts, greedily. The weights are laid out for generation, beside those in training, and dropped again."""
        import torch

        from ..files.skeleton import make_skeleton
        from ..inference.llm import LLM
        from ..plan.placement import make_plan
        from ..sharded.device_weights import DeviceWeights, put_parameter
        from ..sharded.stream import StreamStats

        settings, config = (
            self.settings,
            copy.deepcopy(self.model.config),
        )  # generation has its own attention, which the config names
        plan = make_plan(self.trainer.plan.model, self.mesh.shape)
        tensors = {
            name: put_parameter(tensor, plan, self.mesh, name, torch.float32)
            for name, tensor in self.trainer.host_parameters()
        }
        weights = DeviceWeights(plan=plan, mesh=self.mesh, tensors=tensors)
        llm = LLM(
            name=settings.model,
            skeleton=make_skeleton(config),
            weights=weights,
            dtype=torch.float32,
            tokenizer=self.tokenizer,
            generation={"eos_token_id": getattr(config, "eos_token_id", None)},
            max_model_len=plan.model.max_positions,
            load_s=0.0,
            load_stats=StreamStats(
                seconds=0.0,
                bytes_read=0,
                largest_tensor_bytes=0,
                baseline_rss_bytes=0,
                peak_rss_bytes=0,
            ),
            source=self.model,
        )
        written = llm.generate(
            settings.sample_prompts, max_new_tokens=settings.sample_tokens, temperature=0.0
        )
        return [
            {"prompt": prompt, "text": each.text}
            for prompt, each in zip(settings.sample_prompts, written, strict=True)
        ]

    def _save(self, log: JsonLog) -> None:
        """Begin a checkpoint of the state as it is; the log up to here is on the disk before."""
        from . import checkpoints

        settings, position = self.settings, self.rows.position
        self.saver.wait()
        log.sync()
        self.saver.save(
            checkpoints.take(
                {name: self.trainer.state[name] for name in self.trainer.changing()},
                lambda name: (self.trainer.layout(name).axes, self.trainer.blocks(name)),
                self.mesh,
                step=self.done,
                tokens=self.tokens,
                data={
                    "epoch": position.epoch,
                    "row": position.row,
                    "fingerprint": self.corpus.fingerprint,
                },
                rng={"seed": settings.seed, "step": self.done},
                schedule=asdict(settings.learning_rate),
                settings=settings.to_dict(),
                plan=json.loads(self.trainer.plan.to_json()),
                versions={
                    package: version_of(package) or ""
                    for package in ("parallama", "torch", "torch_xla", "transformers")
                },
            )
        )
        self.last_save = self.done

    def _export(self) -> Path:
        """The trained model as a folder that transformers loads, in float32, as it was trained; adapters merged, and also by themselves, for PEFT."""
        import torch
        from safetensors import SafetensorError

        from ..files.export import export_weights
        from .torch_xla.lora import save_adapter

        lora, folder = self.trainer.options.lora, self.folder / MODEL
        try:
            if lora is not None:
                save_adapter(
                    self.folder / ADAPTER, self.trainer.adapters(), lora, self.settings.model
                )
            if not folder.exists():  # a run that is complete already may be resumed once more
                export_weights(
                    self.trainer.host_parameters(), self.model, folder, dtype=torch.float32
                )
        except (OSError, SafetensorError, RunError) as error:
            what = (
                str(error).splitlines()[0]
                if isinstance(error, RunError)
                else f"the adapter cannot be written: {cause(error)}"
            )
            raise RunError(
                lines(
                    what,
                    self.saver.state(),
                    "make room in a folder that is writable, then run again with --resume auto",
                )
            ) from None
        return folder


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of ending the process at once; a second one of the same kind does."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before: dict[int, Any] = {}

    def take(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    for each in (signal.SIGTERM, signal.SIGINT):
        before[each] = signal.signal(each, take)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
