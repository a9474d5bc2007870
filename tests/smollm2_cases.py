"""What the acceptance tests run in a worker, on the trained model."""

from __future__ import annotations

import functools
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch

import parallama

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@functools.cache
def model(mesh: str, dtype: str = "float32") -> parallama.LLM:
    """The model on a mesh, kept for the next case of this worker."""
    return parallama.load("smollm2", mesh=mesh, dtype=dtype)


def compiles() -> int:
    """torch-xla's own count, not parallama's."""
    from torch_xla.debug import metrics

    data = metrics.metric_data("CompileTime")
    return data[0] if data else 0


def generate(mesh: str, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each call (the arguments of `LLM.generate`) its completions, figures and compilations."""
    llm, done = model(mesh), []
    for call in calls:
        before = compiles()
        outputs = [asdict(output) for output in llm.generate(**call)]
        done.append(
            {
                "outputs": outputs,
                "stats": asdict(llm.stats),
                "compiles": compiles() - before,
                "kv": llm.kv_bytes_per_device,
            }
        )
    return done


def stream(mesh: str, prompt: Any, take: int | None = None, **options: Any) -> dict[str, Any]:
    """The chunks of a stream, or the first `take` of them."""
    llm = model(mesh)
    chunks = [asdict(chunk) for chunk in islice(llm.stream(prompt, **options), take)]
    return {"chunks": chunks, "stats": asdict(llm.stats)}


def logits(mesh: str, ids: list[int], dtype: str = "float32") -> torch.Tensor:
    return model(mesh, dtype).logits(ids)


def sizes(mesh: str) -> dict[str, Any]:
    """Bytes of parameters, measured and planned, and of one row of 256 positions of cache."""
    llm = model(mesh)
    return {
        "measured": llm.param_bytes_per_device(),
        "planned": llm.plan.parameter_bytes(4),
        "cache_row": llm.plan.cache_bytes(llm.mesh.shape.data, 256, 4),
    }


def chat(
    mesh: str, turns: list[str], max_new_tokens: int, again: list[int], max_model_len: int
) -> dict[str, Any]:
    """A conversation, and the turns `again` once more.

    Each of those is in a new Chat that is told what was said before.
    """
    llm = model(mesh)
    talk = parallama.Chat(llm, system=SYSTEM, max_model_len=max_model_len, temperature=0)
    said, before = [], compiles()
    for turn in turns:
        history = [*talk.messages]
        computed = talk.stats.prefill_tokens
        chunks = list(talk.send(turn, max_new_tokens=max_new_tokens))
        said.append(
            {
                "history": history,
                "prompt_ids": llm.render_chat([*history, {"role": "user", "content": turn}]),
                "tokens": [chunk.token for chunk in chunks],
                "logprobs": [chunk.logprob for chunk in chunks],
                "text": "".join(chunk.text for chunk in chunks),
                "computed": talk.stats.prefill_tokens - computed,
            }
        )
    compiled = compiles() - before
    fresh = {}
    for index in again:
        alone = parallama.Chat(llm, max_model_len=max_model_len, temperature=0)
        alone.messages = said[index]["history"]
        fresh[index] = [
            chunk.token for chunk in alone.send(turns[index], max_new_tokens=max_new_tokens)
        ]
    return {
        "said": said,
        "fresh": fresh,
        "compiled": compiled,
        "stats": asdict(talk.stats),
        "messages": talk.messages,
    }


def refused(folder: str, calls: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """What `LLM.generate` raises on bad arguments: type, exit code, message."""
    llm, raised = parallama.load(folder), []
    for call in calls:
        try:
            llm.generate(**call)
            raised.append(("nothing", 0, ""))
        except Exception as error:
            raised.append((type(error).__name__, getattr(error, "exit_code", 0), str(error)))
    return raised
