"""From which checkpoint a run goes on, and whether it fits. No torch on import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, lines, listed, shown
from .logs import NAME as LOG
from .packing import Position
from .schedule import Schedule
from .settings import TrainSettings

if TYPE_CHECKING:
    from .checkpoints import Verified
    from .manifest import Manifest

_MEANING = (
    *("dtype", "batch_size", "grad_accum", "seq_len", "packing", "seed", "schedule", "lr"),
    *("warmup_steps", "min_lr_ratio", "optimizer", "beta1", "beta2", "eps", "momentum"),
    *("weight_decay", "max_grad_norm", "too_long", "split_answers", "bad_rows"),
)
"""Settings on which it depends what the steps of a run do. Others may change."""
_ORDER = ("seq_len", "packing", "seed")
"""Those of them that decide, with the data, which rows an epoch has."""
_STATE = ("rank", "targets")
"""Settings of adapters without which a checkpoint's state is another model's."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A checkpoint to go on from.

    Attributes:
        verified: it, and what else was verified on the way.
    """

    path: Path
    manifest: Manifest
    verified: Verified

    def check(
        self, settings: TrainSettings, *, steps: int | None, fingerprint: str | None = None
    ) -> None:
        """Check that the run is still the same, or is asked for with its changes.

        Args:
            steps: of the whole run; None where that isn't known yet.
            fingerprint: of the data, as far as it is known.

        Raises:
            UsageError: it cannot go on so, or what its steps mean has changed.
        """
        name, then = self.path.name, self.manifest.settings
        if steps is not None and self.manifest.step > steps:
            raise UsageError(
                lines(
                    f"checkpoint {name} is after {self.manifest.step} steps, and steps is {steps}",
                    "expected as many at least",
                )
            )
        now = settings.to_dict()
        _check_adapters(name, then.get("lora"), now["lora"])
        changed = [
            f"{key} is {shown(now[key], 40)}, was {shown(then[key], 40)}"
            for key in _MEANING
            if key in then and then[key] != now[key]
        ]
        if now["lora"] is not None:
            # Beside adapters the model's own weights are not in the checkpoint.
            pairs = [("model", then.get("model"), now["model"])]
            pairs += [
                (f"lora.{key}", then["lora"].get(key), now["lora"][key])
                for key in ("alpha", "dropout")
            ]
            changed += [
                f"{key} is {shown(new, 40)}, was {shown(old, 40)}"
                for key, old, new in pairs
                if old != new
            ]
        if fingerprint not in (None, self.manifest.data.fingerprint):
            changed.append(_other_data(then, now))
        if steps is not None and not self._keeps(steps):
            changed.append(f"steps is {steps}, was {self._steps}")
        if changed and not settings.resume_with_changes:
            raise UsageError(
                lines(
                    f"checkpoint {name} is of a run with other settings: {'; '.join(changed)}",
                    "expected the same: they decide what the steps of the run do",
                    "give the old ones, or --resume_with_changes to go on with the new ones",
                )
            )

    @property
    def _steps(self) -> int:
        steps: int = self.manifest.settings.get("steps") or self.manifest.schedule["steps"]
        return steps

    def _keeps(self, steps: int) -> bool:
        """Whether a run of so many steps can keep the schedule's end.

        It is longer than a run that is complete, or ends here, or its learning rate is constant.
        """
        finished = self.manifest.step == self._steps
        constant = self.manifest.schedule.get("kind") == "constant"
        return steps in (self._steps, self.manifest.step) or constant or finished

    def schedule(self, settings: TrainSettings, steps: int, say: Callable[[str], None]) -> Schedule:
        """The learning rates of the run from here on."""
        if settings.resume_with_changes:
            return settings.learning_rate(steps)
        schedule = Schedule(**self.manifest.schedule)
        if steps > schedule.steps and schedule.kind != "constant":
            say(
                f"steps is {steps}: the learning rate stays at {schedule(steps - 1):.2e}, where "
                f"its schedule over {schedule.steps} ended (--resume_with_changes: over {steps})"
            )
        return schedule

    def position(
        self, settings: TrainSettings, fingerprint: str, say: Callable[[str], None]
    ) -> Position:
        """Where in the data the run goes on."""
        data, then, now = self.manifest.data, self.manifest.settings, settings.to_dict()
        order = [key for key in _ORDER if key in then and then[key] != now[key]]
        if fingerprint == data.fingerprint and not order:
            return Position(epoch=data.epoch, row=data.row)
        say(f"the data begin anew: {listed(order) or 'they'} changed")
        return Position()


def find(settings: TrainSettings, folder: Path, say: Callable[[str], None]) -> Resumed | None:
    """The checkpoint that `settings.resume` asks for.

    Args:
        folder: of the run's own checkpoints.
        say: is told of damaged checkpoints that are passed over.

    Returns:
        None for a run from the beginning: `no`, or `auto` where there is no checkpoint yet.

    Raises:
        UsageError: the run would lose what its folder holds, or the checkpoint is of other
            settings.
        CheckpointError: the checkpoint is damaged.
    """
    from . import checkpoints

    if settings.resume == "no":
        if checkpoints.steps_in(folder) or (folder.parent / LOG).exists():
            raise UsageError(
                lines(
                    f"{settings.out!r} holds a run already",
                    "expected a new folder, or --resume auto to go on with it",
                )
            )
        return None
    verified = checkpoints.Verified()
    if settings.resume == "auto":
        path = checkpoints.newest(folder, say, verified)
        if path is None:
            say(f"there is no checkpoint in {settings.out!r} yet: the run begins")
    else:
        path = _given(Path(settings.resume).expanduser().resolve(), say, verified)
    if path is None:
        return None
    manifest = verified.manifest(path)
    if settings.resume != "auto":
        newer = checkpoints.newest(folder, say, verified)
        if newer is not None and checkpoints.step_of(newer) > manifest.step:
            raise UsageError(
                lines(
                    f"{settings.out!r} holds {newer.name}, which is newer than {path.name}",
                    "expected another --out, so that nothing is lost, or --resume auto",
                )
            )
    resumed = Resumed(path=path, manifest=manifest, verified=verified)
    resumed.check(settings, steps=settings.steps)
    return resumed


def _given(path: Path, say: Callable[[str], None], verified: Verified) -> Path:
    """A checkpoint; of a run's folder, or of that of its checkpoints, the newest."""
    from . import checkpoints

    for folder in (path, path / "checkpoints"):
        if checkpoints.steps_in(folder):
            return checkpoints.newest(folder, say, verified) or path
    return path


def _check_adapters(
    name: str, then: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> None:
    """Raise `UsageError` unless a checkpoint's adapters, or none, are those of the run."""
    if then is not None and now is not None:
        other = [key for key in _STATE if then.get(key) != now[key]]
        if not other:
            return
        what = f"lora.{other[0]} is {shown(now[other[0]])}, was {shown(then.get(other[0]))}"
    elif then is now:
        return
    else:
        what = f"lora is {shown(now)}, was {shown(then)}"
    raise UsageError(
        lines(
            f"checkpoint {name} has other adapters: {what}",
            "expected the same: it holds the state of these",
            "to train others, begin from the run's exported model",
        )
    )


def _other_data(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is said of data that are not those of the checkpoint."""
    if then.get("data") != now["data"]:
        return f"data is {shown(now['data'], 60)}, was {shown(then.get('data'), 60)}"
    return f"data {shown(now['data'], 60)} hold other rows, or the tokenizer is another"
