"""What the tests run in a worker: plain Python and host tensors in, the same out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

import parallama
from parallama.engine.row_sampling import RowSampling
from parallama.engine.steps import PARAMS, StepKey
from parallama.engine.torch_xla import attention_products, block_attention, onednn, ops, sampling
from parallama.engine.torch_xla.counters import compilations
from parallama.engine.torch_xla.mesh import DeviceMesh
from parallama.engine.torch_xla.program import Program
from parallama.engine.torch_xla.steps import Steps
from parallama.errors import ProgramError
from parallama.files.checkpoint import SafetensorsFolder
from parallama.inference.programs import ProgramSet, make_programs
from parallama.inference.session import Session
from parallama.inference.state import host_params
from parallama.model.spec import ModelSpec
from parallama.plan.make_plan import make_plan
from parallama.sharded.device_weights import DeviceWeights, bytes_per_device
from parallama.sharded.loading import to_devices
from parallama.sharded.shard_model import shard_model

_loaded: dict[tuple[str, str], tuple[Steps, ProgramSet]] = {}


def from_folder(folder: str, dtype: str = "float32") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


def forward(
    folder: str, mesh: str, inputs: list[dict[str, torch.Tensor]], dtype: str = "float32"
) -> dict[str, Any]:
    """Logits of a sharded transformers model for each of `inputs`; its planned and real bytes."""
    model = shard_model(from_folder(folder, dtype), mesh)
    with torch.no_grad():
        outputs = [model(**kwargs, use_cache=False).logits.float().cpu() for kwargs in inputs]
    measured = [0] * model.parallama_mesh.shape.devices
    for parameter in model.parameters():
        for device, size in enumerate(model.parallama_mesh.local_bytes(parameter.data)):
            measured[device] += size
    plan = model.parallama_plan
    return {
        "logits": outputs,
        "measured": measured,
        "planned": plan.parameter_bytes(4 if dtype == "float32" else 2),
    }


def loaded(folder: str, mesh: str) -> tuple[Steps, ProgramSet]:
    """A model on the devices with its programs, kept for the next case."""
    if (folder, mesh) not in _loaded:
        checkpoint = SafetensorsFolder(Path(folder))
        device_mesh = DeviceMesh(mesh)
        plan = make_plan(ModelSpec.from_config(checkpoint.config), device_mesh.shape)
        model = to_devices(checkpoint, plan, device_mesh, torch.float32)
        steps = model.steps()
        _loaded[folder, mesh] = steps, make_programs(steps)
    return _loaded[folder, mesh]


def gathered(folder: str, mesh: str) -> dict[str, torch.Tensor]:
    """Every parameter as it comes back from the devices."""
    steps, _ = loaded(folder, mesh)
    weights = DeviceWeights(plan=steps.plan, mesh=steps.mesh, tensors=dict(steps.weights))
    return {name: weights.fetch(name) for name in weights.tensors}


def generate(
    folder: str,
    mesh: str,
    prompts: list[list[int]],
    steps: int,
    capacity: int = 256,
    eos: tuple[int, ...] = (),
    params: list[dict[str, Any]] | None = None,
    longest_prompt: int | None = None,
) -> dict[str, Any]:
    """Tokens and log-probabilities of every row, and the session's figures."""
    model, programs = loaded(folder, mesh)
    rows = [RowSampling(**row) for row in params] if params else [RowSampling()] * len(prompts)
    longest = longest_prompt or max(len(prompt) for prompt in prompts)
    session = Session(model, programs, rows, capacity=capacity, longest_prompt=longest, eos=eos)
    taken = [session.prefill(prompts), *session.decode(steps - 1)]
    return {
        "tokens": [[choices[row].token for choices in taken] for row in range(len(prompts))],
        "logprobs": [[choices[row].logprob for choices in taken] for row in range(len(prompts))],
        "after_warmup": session.stats.programs_after_warmup,
        "compiled": session.stats.programs_compiled,
        "buckets": list(session.shapes.buckets),
        "cached": session.cached,
        "measured": bytes_per_device(model.mesh, model.weights),
        "planned": model.plan.parameter_bytes(4),
        "cache_measured": session.cache_bytes_per_device(),
    }


def conversation(
    folder: str, mesh: str, turns: list[list[list[int]]], steps: int, capacity: int
) -> dict[str, Any]:
    """Every turn's tokens on one continued session.

    Args:
        turns: for each row what is added to the text so far; a negative int first in the row cuts
            so many tokens off before.
    """
    model, programs = loaded(folder, mesh)
    rows = len(turns[0])
    session = Session(model, programs, [RowSampling()] * rows, capacity=capacity, continued=True)
    texts: list[list[int]] = [[] for _ in range(rows)]
    answers, computed = [], []
    for turn in turns:
        for text, added in zip(texts, turn, strict=True):
            if added and added[0] < 0:
                del text[added[0] :]
                added = added[1:]
            text += added
        before = session.stats.prefill_tokens
        taken = [session.prefill(texts), *session.decode(steps - 1)]
        computed.append(session.stats.prefill_tokens - before)
        answers.append(
            (
                [text[:] for text in texts],
                [[choices[row].token for choices in taken] for row in range(rows)],
            )
        )
        for text, row in zip(texts, answers[-1][1], strict=True):
            text += row
    return {
        "answers": answers,
        "computed": computed,
        "after_warmup": session.stats.programs_after_warmup,
    }


def frozen_rows(
    folder: str,
    mesh: str,
    prompts: list[list[int]],
    eos: int,
    steps: int,
    repeats: int,
    added: list[int],
) -> dict[str, Any]:
    """A continued session whose rows meet `eos`, decode past it, and go on with the same text.

    Args:
        repeats: how often `eos` stands in it.
    """
    model, programs = loaded(folder, mesh)
    session = Session(
        model, programs, [RowSampling()] * len(prompts), capacity=256, eos=[eos], continued=True
    )
    taken = [session.prefill(prompts), *session.decode(steps - 1)]
    first = [[choices[row].token for choices in taken] for row in range(len(prompts))]
    ends = [tokens.index(eos) + repeats if eos in tokens else len(tokens) for tokens in first]
    texts = [
        prompt + tokens[:end] + added
        for prompt, tokens, end in zip(prompts, first, ends, strict=True)
    ]
    return {
        "first": first,
        "texts": texts,
        "next": [choice.token for choice in session.prefill(texts)],
    }


def logits_of(folder: str, mesh: str, texts: list[list[int]]) -> list[torch.Tensor]:
    """Logits of every position of some texts, each run at once."""
    llm = parallama.load(folder, mesh=mesh)
    return [llm.logits(text) for text in texts]


def gradients(folder: str, mesh: str, ids: torch.Tensor) -> dict[str, Any]:
    """Loss and gradients of the language-model loss, by parameter name."""
    import torch_xla

    model = shard_model(from_folder(folder), mesh)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch_xla.sync()  # one program for all gradients, not one for each that is fetched
    return {
        "loss": float(loss.cpu()),
        "gradients": {name: parameter.grad.cpu() for name, parameter in model.named_parameters()},
    }


def compile_step(
    kind: Literal["decode", "prefill"], folder: str, mesh: str, batch: int, length: int
) -> str:
    """Compile one step over a cache, and give back its optimized HLO."""
    _, programs = loaded(folder, mesh)
    new = 16 if kind == "prefill" else 1
    key = StepKey(kind=kind, batch=batch, length=length, new=new)
    programs.warm_up([key])
    (text,) = programs[key].hlo()
    return text


def attend(
    mesh: str,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: list[list[int]],
    new: int,
    window: int | None,
) -> list[list[torch.Tensor]]:
    """`block_attention.attend` in one program, for each of the `starts`.

    Each device's rows stand behind one of noise in its keys and values.

    Returns: mixture, highest score, sum of weights.
    """
    device_mesh, axes = DeviceMesh(mesh), ("data", "model", None, None)

    def step(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = [device_mesh.enter_manual(given[name], axes) for name in ("query", "keys", "values")]
        parts = block_attention.attend(
            device_mesh,
            *own,
            device_mesh.enter_manual(given["row"], (None,)).reshape(()),
            device_mesh.enter_manual(given["starts"], ("data",)),
            new=new,
            window=window,
        )
        names = ("mixed", "top", "total")
        return {
            name: device_mesh.leave_manual(part, axes, (*query.shape[:3], part.shape[3]))
            for name, part in zip(names, parts, strict=True)
        }

    def put(begins: list[int]) -> torch.Tensor:
        return device_mesh.put(torch.tensor(begins, dtype=torch.int32), ("data",))

    shards = device_mesh.shape.data

    def behind_noise(tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.reshape(shards, -1, *tensor.shape[1:])
        return torch.cat([torch.randn_like(rows[:, :1]), rows], 1).flatten(0, 1)

    arguments = {
        name: device_mesh.put(tensor, axes)
        for name, tensor in (
            ("query", query),
            ("keys", behind_noise(keys)),
            ("values", behind_noise(values)),
        )
    }
    arguments["row"] = device_mesh.put(torch.tensor([1], dtype=torch.int32), (None,))
    program = Program("attend", device_mesh, step, arguments | {"starts": put(starts[0])})
    before = compilations()
    results = [
        [
            device_mesh.fetch(part, axes)
            for part in program(arguments | {"starts": put(begins)}).values()
        ]
        for begins in starts
    ]
    assert compilations() == before
    return results


def wrong_shape(name: str, dtype: str, shape: list[int], donated: bool) -> None:
    """Call a program with another tensor than it was made for.

    It was made for `x` float32[4, 8] (read) and `state` float32[4, 8] (donated).
    """
    mesh = DeviceMesh("1x1")

    def step(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"state": given["state"] + given["x"]}

    def tensor(shape: list[int], dtype: str = "float32") -> torch.Tensor:
        return mesh.put(torch.ones(shape, dtype=getattr(torch, dtype)), (None,) * len(shape))

    program = Program(
        "add",
        mesh,
        step,
        {"x": tensor([4, 8]), "state": tensor([4, 8])},
        ["state"] if donated else [],
    )
    arguments = {"x": tensor([4, 8]), "state": tensor([4, 8])} | {name: tensor(shape, dtype)}
    mesh.fetch(program(arguments)["state"], (None, None))


def replay(mesh: str, times: int) -> list[float]:
    """Sum of a split, donated counter after each of some calls; `x` is another tensor at each."""
    device_mesh = DeviceMesh(mesh)
    axes = ("data", "model")

    def step(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            "state": device_mesh.mark(given["state"] + given["x"], axes),
            "sum": given["x"].sum(),
        }

    def tensor(value: float) -> torch.Tensor:
        return device_mesh.put(torch.full((8, 8), value), axes)

    program = Program("count", device_mesh, step, {"x": tensor(0), "state": tensor(0)}, ["state"])
    compiled = compilations()
    state, sums = tensor(0), []
    for index in range(times):
        state = program({"x": tensor(index), "state": state})["state"]
        sums.append(float(device_mesh.fetch(state, axes).sum()))
    assert compilations() == compiled
    return sums


def undeclared(folder: str, batch: int, length: int, declare: bool) -> None:
    """Ask for a decode step that was not declared."""
    steps, _ = loaded(folder, "1x1")
    programs = make_programs(steps)
    if declare:
        programs.warm_up(
            [
                StepKey(kind="decode", batch=1, length=256),
                StepKey(kind="grow", batch=1, length=256, new=512),
            ]
        )
        assert len(programs) == 2
    programs[StepKey(kind="decode", batch=batch, length=length)]


_samplers: dict[Any, Program] = {}


def choose(
    mesh: str,
    logits: torch.Tensor,
    rows: list[dict[str, Any]],
    positions: torch.Tensor,
    seen: torch.Tensor | None = None,
    vocab: int | None = None,
    kept: bool = False,
) -> Any:
    """Tokens and log-probabilities that the sampler picks from `[B, V]` logits.

    With `kept` what it picks from, `[B, V]` bool. Logits beyond `vocab` are padding; the rest up to
    a multiple of the "model" axis is filled up with zeros.
    """
    device_mesh = DeviceMesh(mesh)
    vocab = logits.shape[1] if vocab is None else vocab
    extra = -logits.shape[1] % device_mesh.shape.model
    logits = torch.nn.functional.pad(logits, (0, extra))
    params = [RowSampling(**row) for row in rows]
    host = host_params(params) | {"logits": logits, "positions": positions.to(torch.int32)}
    seen = torch.zeros_like(logits[:, :vocab]) if seen is None else seen
    host["counts"] = torch.nn.functional.pad(
        seen.to(torch.int32), (0, logits.shape[1] - seen.shape[1])
    )
    axes = {"logits": ("data", "model"), "counts": ("data", "model")}
    arguments = {
        name: device_mesh.put(value, axes.get(name, ("data",))) for name, value in host.items()
    }

    def step(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tokens, logprobs, _ = sampling.choose(
            given["logits"], device_mesh, vocab, given, given["positions"]
        )
        return {
            "tokens": device_mesh.mark(tokens, ("data",)),
            "logprobs": device_mesh.mark(logprobs, ("data",)),
        }

    def kept_step(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        split, rows = ("data", "model"), ("data",)
        scores = device_mesh.enter_manual(given["logits"], split)
        ids = sampling._ids(device_mesh, given["logits"].shape[1])
        scores = torch.where(ids < vocab, scores, torch.full((), -1e30, device=scores.device))
        params = {name: device_mesh.enter_manual(given[name], rows) for name in PARAMS}
        positions = device_mesh.enter_manual(given["positions"], rows)
        scores = sampling.perturb(scores, ids, device_mesh, params, positions)
        kept = device_mesh.leave_manual(scores > -1e20, split, given["logits"].shape)
        return {"kept": device_mesh.mark(kept, split)}

    key = (mesh, tuple(logits.shape), vocab, kept)
    if key not in _samplers:
        _samplers[key] = Program("choose", device_mesh, kept_step if kept else step, arguments)
    out = _samplers[key](arguments)
    if kept:
        return device_mesh.fetch(out["kept"], ("data", "model"))[:, :vocab]
    return device_mesh.fetch(out["tokens"], ("data",)), device_mesh.fetch(
        out["logprobs"], ("data",)
    )


def untraceable(times: int) -> list[str]:
    """What `Program` says, each time, of a step that torch-xla can only run on the host."""
    mesh = DeviceMesh("1x1")
    said = []
    for _ in range(times):
        x = mesh.put(torch.ones(4), (None,))
        try:
            program = Program(
                "bits", mesh, lambda given: {"bits": (given["x"] * 2).view(torch.int32)}, {"x": x}
            )
        except ProgramError as error:
            said.append(str(error))
        else:
            answer = program({"x": mesh.put(torch.zeros(4), (None,))})["bits"].cpu().tolist()
            said.append(f"answers {answer} for the bits of 0.0")
    return said


def two_programs(mesh: str) -> dict[str, list[float]]:
    """A program that updates `state` and one that reads it: what each gives, in turns.

    Both are made before either runs.
    """
    device_mesh = DeviceMesh(mesh)
    axes = (None, "model")
    state = device_mesh.put(torch.ones(4, 8), axes)
    update = Program(
        "update",
        device_mesh,
        lambda given: {"state": given["state"] + given["by"]},
        {"state": state, "by": device_mesh.put(torch.zeros(4, 8), axes)},
        ["state"],
    )
    read = Program(
        "read", device_mesh, lambda given: {"sum": given["state"].sum()[None] + 0}, {"state": state}
    )
    found: dict[str, list[float]] = {"updated": [], "read": []}
    for step in range(3):
        found["read"].append(float(device_mesh.fetch(read({"state": state})["sum"], (None,))[0]))
        state = update(
            {"state": state, "by": device_mesh.put(torch.full((4, 8), float(step)), axes)}
        )["state"]
        found["updated"].append(float(device_mesh.fetch(state, axes).sum()))
    return found


def paired(mesh: str, reads: dict[str, list[str]]) -> dict[str, float]:
    """A step whose donated outputs each read these arguments, in this order.

    Each is 10 times the first and then the others.

    Returns: each output after a second run.
    """
    device_mesh = DeviceMesh(mesh)
    given = {
        name: device_mesh.put(torch.full((4, 8), float(number)), (None, "model"))
        for number, name in enumerate(reads, 1)
    }

    def step(given: Any) -> dict[str, torch.Tensor]:
        out = {}
        for name, (first, *others) in reads.items():
            out[name] = given[first] * 10
            for other in others:
                out[name] = out[name] + given[other]
        return out

    program = Program("paired", device_mesh, step, given, list(reads))
    return {
        name: float(device_mesh.fetch(tensor, (None, "model"))[0, 0])
        for name, tensor in program(program(given)).items()
    }


def onednn_product(left: torch.Tensor, right: torch.Tensor) -> tuple[str, torch.Tensor]:
    """The module that `ops.onednn_product` puts into a program, and what comes of it."""
    from torch_xla.core import xla_builder as xb

    mesh = DeviceMesh("1x1")
    module = xb.computation_from_module_proto(
        "product", onednn.product(tuple(left.shape), tuple(right.shape))
    )
    given = {"left": left.to(mesh.device), "right": right.to(mesh.device)}
    # Neither operand comes as it is: the operations before and behind must not be fused with it.
    program = Program(
        "product",
        mesh,
        lambda x: {"out": 1 + ops.onednn_product(x["left"] * 2, x["right"] + 1)},
        given,
    )
    return xb.get_computation_hlo(module), program(given)["out"].cpu()


def row_maximum(rows: torch.Tensor) -> torch.Tensor:
    mesh = DeviceMesh("1x1")
    program = Program(
        "maxima",
        mesh,
        lambda given: {"out": attention_products.row_maximum(mesh, given["rows"])},
        {"rows": rows.to(mesh.device)},
    )
    return program({"rows": rows.to(mesh.device)})["out"].cpu()
