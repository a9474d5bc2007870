"""Options that several commands share: declarations, checks, and how they load a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engine.devices.plugins import OptionValue, parse_options
from ..errors import ParallamaError, UsageError, lines
from ..inference.sampling_params import SamplingParams
from ..plan.mesh_shape import MeshShape

if TYPE_CHECKING:
    from ..inference.llm import LLM
    from ..inference.sharded_model import Progress
    from ..plan.placement import Plan

MOST_ROWS = 1 << 20
"""What `parallama plan` takes at most, too."""

# -- checks, made while the command line is read: nothing is loaded before


def within(
    least: float, most: float | None = None
) -> Callable[[typer.CallbackParam, float | None], float | None]:
    """The check that an option's number is at least `least`, and at most `most` if that is given.

    Unlike typer's own `min` and `max` it refuses NaN, and reads as all of our refusals do.
    """
    expected = f"expected at least {least}" if most is None else f"expected {least} to {most}"

    def check(option: typer.CallbackParam, number: float | None) -> float | None:
        good = number is None or (number >= least and (most is None or number <= most))
        if not good:
            raise UsageError(lines(f"{max(option.opts, key=len)} is {number}", expected))
        return number

    return check


def refuse_over(most: int | None, what: str, **numbers: int | None) -> None:
    """Raise `UsageError` where the number of an option is over a limit.

    Args:
        most: the limit; None where it is not known.
        what: what sets it, for the message.
        numbers: by the option's name, with underscores; None where it was not given.
    """
    for name, number in numbers.items():
        if number is not None and most is not None and number > most:
            option = "--" + name.replace("_", "-")
            raise UsageError(lines(f"{option} is {number}", f"expected at most {most}, {what}"))


def rows(batch: int | None, shape: MeshShape, *, option: str = "--batch") -> int:
    """Rows of `option` over all devices; without it one on each device along "data".

    Raises:
        UsageError: the rows do not divide over the axis "data", or are too many.
    """
    if batch is None:
        return shape.data
    if batch > MOST_ROWS:
        raise UsageError(lines(f"{option} is {batch}", f"expected at most {MOST_ROWS}"))
    if batch < 1 or batch % shape.data:
        raise UsageError(
            lines(
                f"{option} is {batch}",
                f"expected a multiple of {shape.data}, the devices along 'data'",
            )
        )
    return batch


def mesh_shape(mesh: str | None, tensor_parallel: int | None) -> MeshShape:
    """The mesh that `--mesh` and `--tensor-parallel-size` ask for together."""
    if mesh is None:
        return MeshShape(model=tensor_parallel or 1)
    shape = MeshShape.parse(mesh)
    if tensor_parallel is not None and tensor_parallel != shape.model:
        raise UsageError(
            lines(
                f"--mesh {mesh} splits over {shape.model} devices,"
                f" --tensor-parallel-size over {tensor_parallel}",
                "expected one of the two, or the same",
            )
        )
    return shape


# -- single options

Model = Annotated[
    str, typer.Argument(help="A folder, a .gguf file, a hub id, or a shipped name (smollm2).")
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="Folder or hub id of a PEFT adapter (LoRA) of the model, merged while loading.",
        show_default="none",
    ),
]
Mesh = Annotated[
    str | None,
    typer.Option("--mesh", help="data x model, as 1x8, or data=2,model=4.", show_default="1x1"),
]
TensorParallel = Annotated[
    int | None, typer.Option("--tensor-parallel-size", "-tp", help="The same as --mesh 1xN.", min=1)
]
Devices = Annotated[
    int | None, typer.Option("--devices", help="Device count; follows from the mesh.", min=1)
]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        help="cpu, tpu, tt, the path of a PJRT plugin (.so), or an installed plugin's name.",
    ),
]
BackendOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--backend-option", help="key=value for the client that the plugin makes; several times."
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", help="YAML or JSON: parameter-name pattern to style or axes."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Load weights that hold NaN or infinity, too.")
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len", help="Most tokens of prompt and answer together.", callback=within(1)
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        help="The server's key; in the environment it stays out of the list of processes.",
        envvar="OPENAI_API_KEY",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="No progress and no figures on standard error.")
]


# -- groups


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model, and the devices that it is put on."""

    model: Model
    adapter: Adapter = None
    mesh: Mesh = None
    tensor_parallel_size: TensorParallel = None
    devices: Devices = None
    backend: BackendName = "cpu"
    backend_option: BackendOptions = None
    plan: PlanFile = None
    dtype: Dtype = "auto"
    allow_nonfinite: AllowNonfinite = False

    @property
    def shape(self) -> MeshShape:
        """The mesh, see `mesh_shape`."""
        return mesh_shape(self.mesh, self.tensor_parallel_size)

    @property
    def backend_options(self) -> dict[str, OptionValue]:
        """What `--backend-option` says, read."""
        return parse_options(self.backend_option or [])

    def positions(self) -> int | None:
        """The model's positions, read from its config alone.

        None where it cannot be read: loading then says why. None for a .gguf file, too: that takes
        transformers, before which the devices start.
        """
        if self.model.endswith(".gguf"):
            return None
        from ..files.config_json import read_config
        from ..model.spec import ModelSpec

        try:
            return ModelSpec.from_config(read_config(self.model)).max_positions
        except ParallamaError:
            return None

    def check_lengths(
        self,
        max_model_len: int | None,
        max_new_tokens: int | None = None,
        *,
        default_len: int | None = None,
    ) -> None:
        """Refuse lengths that are over the model's positions, before it is loaded.

        Args:
            default_len: most tokens together where `max_model_len` is None, if not the positions.

        Raises:
            UsageError: a length is too large.
        """
        if max_model_len is None and max_new_tokens is None:
            return
        positions = self.positions()
        if positions is None:
            return
        refuse_over(positions, "the model's positions", max_model_len=max_model_len)
        together = max_model_len or min(default_len or positions, positions)
        refuse_over(
            together - 1,
            f"one less than the {together} tokens of prompt and answer together",
            max_new_tokens=max_new_tokens,
        )

    def load(
        self,
        *,
        progress: Progress | None,
        max_model_len: int | Callable[[Plan, int], int] | None = None,
        keep_hlo: bool = False,
    ) -> LLM:
        """`parallama.load` with these options."""
        shape, backend_options = self.shape, self.backend_options
        from ..api import load

        return load(
            self.model,
            adapter=self.adapter,
            mesh=shape,
            backend=self.backend,
            backend_options=backend_options,
            devices=self.devices,
            plan=self.plan,
            dtype=self.dtype,
            max_model_len=max_model_len,
            allow_nonfinite=self.allow_nonfinite,
            progress=progress,
            keep_hlo=keep_hlo,
        )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen; what is None is the model's to say.

    Raises:
        UsageError: a value is out of its range.
    """

    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="0 is greedy.", show_default="the model's"),
    ] = None
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Sample from the so many best; 0 or -1 is all.")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Sample from the best with this probability together."),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", help="Drop tokens below this share of the best one's probability."),
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1: repeat less.")
    ] = None
    presence_penalty: Annotated[
        float | None,
        typer.Option("--presence-penalty", help="Above 0: prefer what the text doesn't have yet."),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        typer.Option("--frequency-penalty", help="The same, by how often the text has it."),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="Same seed, same text, on every mesh.", show_default="drawn anew"
        ),
    ] = None

    def __post_init__(self) -> None:
        SamplingParams(**self.arguments)  # refuses what is out of range

    @property
    def arguments(self) -> dict[str, Any]:
        """For `SamplingParams`."""
        return asdict(self)
