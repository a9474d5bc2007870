"""A training run: steps, validation, log and checkpoints, from the start or from a checkpoint."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..engine.devices.versions import version_of
from ..errors import RunError, lines
from ..files.disk import Disk, RunLock, unwritable
from ..files.find import find
from . import resume
from . import settings as settings_of
from .batch import PADDING
from .logs import NAME as LOG
from .logs import JsonLog, Sink, TensorBoard, WandB, closing
from .options import slots
from .packing import Position, Rows, make_batch
from .settings import TrainSettings
from .signals import caught_signals
from .watch import Watch

CHECKPOINTS, CONFIG = "checkpoints", "config.yaml"
_PACKAGES = ("parallama", "torch", "torch_xla", "transformers")


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
        ParallamaError: settings, data, model or checkpoint don't fit, before anything is compiled;
            or the run broke: a loss that is no number, a checkpoint that can't be saved.
    """
    lock = RunLock(Path(settings.out).expanduser())
    run: _Run | None = None
    try:
        run = _Run(settings, watch or Watch(), disk or Disk())
        return run.go()
    finally:
        if run is None or not run.begun:
            lock.withdraw(*(() if run is None else run.made))
        lock.release()


class _Run:
    """What a run is made of, and the loop over it.

    Attributes:
        begun: there is something of it to go on from, or of a run before.
        made: files of its folder that it has made by then.
    """

    def __init__(self, settings: TrainSettings, watch: Watch, disk: Disk) -> None:
        from ..engine.interface import start
        from ..model.spec import ModelSpec
        from ..plan.make_plan import make_plan
        from ..plan.overrides import read_overrides
        from . import checkpoints
        from .layout import check_fit, training_plan
        from .run_data import prepare_data
        from .saver import Saver
        from .speed import Speed
        from .trainer import make_trainer

        self.settings, self.watch, self.disk = settings, watch, disk
        self.sequences = settings.grad_accum * settings.batch_size
        self.begun, self.made = False, list[str]()
        self.folder = Path(settings.out).expanduser()
        saved = self.folder / CHECKPOINTS
        checkpoints.clean(saved)
        resumed = resume.find(settings, saved, watch.say)
        overrides = read_overrides(settings.plan) if settings.plan is not None else None
        self.mesh = start(settings.mesh_shape, backend=settings.backend)
        self.model = find(settings.model)
        self.tokenizer = self.model.tokenizer()
        spec = ModelSpec.from_config(self.model.config)
        plan, how = make_plan(spec, self.mesh.shape, overrides), settings.step_options
        check_fit(how, training_plan(plan, fsdp=how.fsdp, lora=how.lora))
        self.data = prepare_data(settings, self.tokenizer, spec.vocab, watch)
        self.rows = self._rows(Position())
        self.steps = settings.steps or self._steps_of(settings.epochs)
        self.schedule = settings.learning_rate(self.steps)
        if resumed is not None:
            fingerprint = self.data.corpus.fingerprint
            resumed.check(settings, steps=self.steps, fingerprint=fingerprint)
            self.schedule = resumed.schedule(settings, self.steps, watch.say)
            self.rows = self._rows(resumed.position(settings, fingerprint, watch.say))
        self.trainer = make_trainer(
            self.model,
            self.mesh,
            how,
            plan=plan,
            seed=settings.seed,
            progress=watch.of("loading"),
            allow_nonfinite=settings.allow_nonfinite,
        )
        self.done, self.tokens, self.last_save = 0, 0, -1
        if resumed is not None:
            self._restore(resumed)
        held = self.trainer.bytes_per_device()
        self.bytes_per_device = [sum(each) for each in zip(*held.values(), strict=True)]
        self.speed = Speed.of(spec, self.sequences, settings.seq_len, self.mesh.backend.name)
        self.saver = Saver(
            saved,
            keep_last=settings.keep_last,
            asynchronous=settings.async_save,
            disk=disk,
            verified=None if resumed is None else resumed.verified,
        )

    def _rows(self, position: Position) -> Rows:
        settings = self.settings
        return Rows(
            self.data.corpus,
            settings.seq_len,
            seed=settings.seed,
            packing=settings.packing,
            position=position,
        )

    def _steps_of(self, epochs: float | None) -> int:
        """Optimizer steps that so many passes over the data take, the last one filled up."""
        assert epochs is not None, "settings have steps or epochs"
        rows = self.rows.count(epochs)
        steps = math.ceil(rows / self.sequences)
        self.watch.say(
            f"{epochs:g} epochs are {rows:,} sequences: {steps:,} steps of {self.sequences}"
        )
        return steps

    def _restore(self, resumed: resume.Resumed) -> None:
        """Put a checkpoint's state on the devices."""
        from . import checkpoints

        manifest = resumed.manifest
        self.trainer.load(
            checkpoints.read_tensors(resumed.path, manifest),
            other_optimizer=self.settings.resume_with_changes
            and self.trainer.optimizer_differs(manifest.tensors),
        )
        self.done, self.tokens = manifest.step, manifest.tokens
        self.begun = True
        self.watch.say(
            f"resumed from {resumed.path} after {self.done} steps on mesh {manifest.mesh}"
        )

    def go(self) -> Outcome:
        """Train to the end, or to a signal."""
        settings = self.settings
        self.made += [name for name in (CONFIG, LOG) if not (self.folder / name).exists()]
        # A change is asked for once; what goes on from here has these settings.
        kept = replace(settings, resume_with_changes=False)
        try:
            (self.folder / CONFIG).write_text(settings_of.dump(kept), encoding="utf-8")
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
            if self.done < self.steps:
                self._warm_up()
            compiled = self.mesh.compilations()
            with caught_signals() as caught:
                while self.done < self.steps and not caught:
                    loss = self._step(sinks)
                    last = self.done == self.steps
                    if last or (settings.save_every and self.done % settings.save_every == 0):
                        self._save(log)
                # The last save of a complete run may have left the link or old checkpoints undone.
                if self.done != self.last_save:
                    self._save(log)
                self.saver.wait()
            late = self.mesh.compilations() - compiled
        stopped = caught[0] if caught and self.done < self.steps else None
        return Outcome(
            steps=self.done,
            signal=stopped,
            checkpoint=self.saver.path(self.done),
            model=self._export() if settings.export and stopped is None else None,
            loss=loss,
            programs_after_warmup=late,
        )

    def _warm_up(self) -> None:
        """Make every program of the run before its first step."""
        began = time.perf_counter()
        self.trainer.compile(evaluate=bool(self.data.eval_rows))
        self.watch.say(f"compiled in {time.perf_counter() - began:.1f} s; {self._predicted()}")
        if self.settings.sample_every:
            for sample in self._samples():
                self.watch.say(f"before step {self.done + 1}: {sample['prompt']}{sample['text']}")

    def _predicted(self) -> str:
        """What a step takes on each device, in words."""
        from ..plan.cost import shown_bytes
        from ..plan.train_cost import train_memory
        from .layout import train_step

        options, plan = self.trainer.options, self.trainer.plan
        step = train_step(options, plan.model.layers, self.mesh.traits.sum_bytes)
        memory = train_memory(plan, step, optimizer_slots=len(slots(options)))
        return (
            f"predicted on each device: {shown_bytes(memory.activations)} of activations, "
            f"{shown_bytes(memory.total)} in all"
        )

    def _step(self, sinks: list[Sink]) -> float:
        """One optimizer step, with all that comes with it; its loss."""
        settings = self.settings
        self.saver.check()
        began = time.perf_counter()
        batch = make_batch(self.rows.take(self.sequences), settings.grad_accum)
        rate = self.schedule(self.done)
        result = self.trainer.step(batch, rate)
        seconds = time.perf_counter() - began
        tokens = int((batch.documents != PADDING).sum())
        self.begun = True
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
        self.watch.step(entry, self.steps)
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
        rows = self.data.eval_rows
        for at in range(0, len(rows), self.sequences):
            batch = make_batch(rows[at : at + self.sequences], self.settings.grad_accum)
            loss, tokens = self.trainer.evaluate(batch)
            total, count = total + loss, count + tokens
        mean = total / count
        return {
            "eval_loss": mean,
            "eval_perplexity": math.exp(min(mean, 700.0)),
            "eval_tokens": count,
        }

    def _samples(self) -> list[dict[str, str]]:
        from .samples import write_samples

        return write_samples(self.trainer, self.settings, self.model, self.tokenizer)

    def _save(self, log: JsonLog) -> None:
        """Begin a checkpoint of the state as it is, after the log up to here is on the disk."""
        from . import snapshot

        settings, position, trainer = self.settings, self.rows.position, self.trainer
        self.begun = True
        self.saver.wait()
        log.sync()
        self.saver.save(
            snapshot.take(
                {name: trainer.state[name] for name in trainer.changing()},
                lambda name: (trainer.layout(name).axes, trainer.blocks(name)),
                self.mesh,
                step=self.done,
                tokens=self.tokens,
                data={
                    "epoch": position.epoch,
                    "row": position.row,
                    "fingerprint": self.data.corpus.fingerprint,
                },
                rng={"seed": settings.seed, "step": self.done},
                schedule=asdict(self.schedule),
                settings=settings.to_dict() | {"steps": self.steps},
                plan=json.loads(trainer.plan.to_json()),
                versions={package: version_of(package) or "" for package in _PACKAGES},
            )
        )
        self.last_save = self.done

    def _export(self) -> Path:
        from .trained_model import export_model

        return export_model(
            self.trainer, self.model, self.settings.model, self.folder, self.saver.state()
        )
