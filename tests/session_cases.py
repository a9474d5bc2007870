"""What `test_sessions` runs in a worker."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from device_cases import from_folder

import parallama
from parallama.engine.row_sampling import RowSampling
from parallama.engine.torch_xla.counters import compilations
from parallama.errors import ParallamaError


def _raised(action: Callable[[], Any]) -> tuple[str, int, str] | None:
    """Type, exit code and message of what an action raises."""
    try:
        action()
    except ParallamaError as error:
        return type(error).__name__, error.exit_code, str(error)
    return None


def two_answers(folder: str) -> dict[str, Any]:
    """Two answers of one chat are read in turns; the older one is asked on after the
    newer began.
    """
    talk = parallama.Chat(parallama.load(folder), max_model_len=256, temperature=0)
    older = talk.send("First", max_new_tokens=8)
    next(older)
    newer = talk.send("Second", max_new_tokens=4)
    text = next(newer).text
    stale = _raised(lambda: next(older))
    text += "".join(chunk.text for chunk in newer)
    messages = [dict(message) for message in talk.messages]
    never_read = talk.send("Third")
    talk.reset()
    return {
        "stale": stale,
        "messages": messages,
        "text": text,
        "after_reset": _raised(lambda: next(never_read)),
        "limits": {
            limit: _raised(partial(talk.send, "?", max_new_tokens=limit)) for limit in (0, -5)
        },
    }


def two_streams(folder: str, prompt: list[int]) -> dict[str, Any]:
    """Two streams on one session: the older one goes on after the newer began, or after
    a prefill.
    """
    llm = parallama.load(folder)
    session = llm.session([RowSampling()], capacity=64, longest_prompt=len(prompt))
    session.prefill([prompt])
    older = session.decode(8)
    first = next(older)[0].token
    newer = session.decode(8)
    second = next(newer)[0].token
    found = {"stale": _raised(lambda: next(older)), "tokens": [first, second]}
    session.prefill([prompt])
    return found | {"after_prefill": _raised(lambda: next(newer)), "cached": session.cached}


def threads(folder: str, mesh: str, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """Each prompt alone, and then each in a thread of its own, all at once, on programs
    of its own.
    """
    llm = parallama.load(folder, mesh=mesh)
    alone = [llm.generate(prompt, max_new_tokens=steps)[0].token_ids for prompt in prompts]
    llm = parallama.load(folder, mesh=mesh)
    together: list[Any] = [None] * len(prompts)
    before = compilations()

    def run(row: int) -> None:
        tokens = llm.generate([prompts[row]] * (row + 1), max_new_tokens=steps)[0].token_ids
        together[row] = tokens, llm.stats.programs_compiled, llm.stats.programs_after_warmup

    running = [threading.Thread(target=run, args=(row,)) for row in range(len(prompts))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return {
        "alone": alone,
        "together": together,
        "compiled": compilations() - before,
        "stats_here": llm.stats.decode_steps,
    }


def pending(folder: str, prompt: list[int]) -> tuple[list[float], list[int]]:
    """The user has traced something and not run it when programs are compiled."""
    llm = parallama.load(folder)
    mine = llm.mesh.put(torch.arange(4.0), (None,)) * 3 + 1
    tokens = llm.generate(prompt, max_new_tokens=4)[0].token_ids
    return mine.cpu().tolist(), tokens


def inputs(folder: str, mesh: str, rows: int) -> dict[str, torch.Tensor]:
    """Logits of a sharded model, with and without inputs that have no rows."""
    model, plain = from_folder(folder), from_folder(folder)
    ids = torch.arange(rows * 3).reshape(rows, 3)
    with torch.no_grad():
        wanted = plain(ids, use_cache=False).logits
        sharded = parallama.shard_model(model, mesh)
        given = {"cache_position": torch.arange(3), "position_ids": torch.arange(3)[None]}
        found = sharded(ids, use_cache=False, **given).logits.cpu()
        embedded = torch.nn.functional.embedding(ids, plain.model.embed_tokens.weight)
        by_embeds = sharded(inputs_embeds=embedded, use_cache=False, **given).logits.cpu()
    return {"wanted": wanted, "found": found, "embedded": by_embeds}


def shared_config(folder: str) -> list[str]:
    """The attention that another model of the same config names, before and after one is
    sharded.
    """
    from transformers import AutoModelForCausalLM

    first = from_folder(folder)
    second = AutoModelForCausalLM.from_config(first.config)
    before = second.config._attn_implementation
    parallama.shard_model(first, "1x1")
    return [before, second.config._attn_implementation, first.config._attn_implementation]


def checkpoint_config(folder: str) -> list[str]:
    """The attention that a checkpoint's config names, before and after a model is made of it."""
    from parallama.files.find import find
    from parallama.files.skeleton import make_skeleton

    checkpoint = find(folder)
    before = checkpoint.config._attn_implementation
    llm = parallama.load(folder)
    made = make_skeleton(checkpoint.config)
    made.config._attn_implementation = "changed"
    return [before, checkpoint.config._attn_implementation, llm.source.config._attn_implementation]
