"""What `test_continuous` runs in a worker."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import parallama
from parallama.inference.continuous import ContinuousEngine
from parallama.inference.requests import Request
from parallama.inference.sampling_params import SamplingParams
from parallama.inference.serving import Update


def _requests(llm: Any, chance: random.Random) -> list[Request]:
    """Greedy, drawn and penalised ones, some of which begin the same."""
    prompts = [
        [chance.randrange(3, 300) for _ in range(chance.choice((3, 20, 50, 150)))]
        for _ in range(18)
    ]
    longest = max(prompts, key=len)
    prompts += [[*longest[:100], 5, 6, 7], [*longest[:60], *[9] * 30]]
    params = [
        SamplingParams(
            temperature=place % 2,
            repetition_penalty=1.3 if place % 3 == 0 else None,
            seed=place,
            max_new_tokens=chance.randrange(1, 40),
            ignore_eos=place % 4 > 0,
        )
        for place in range(len(prompts))
    ]
    requests: list[Request] = llm.requests([(None, ids) for ids in prompts], params)
    return requests


def served(folder: str, mesh: str) -> dict[str, Any]:
    """Each request's tokens: from the model by itself, and from an engine in three orders."""
    llm = parallama.load(folder, mesh=mesh, max_model_len=256)
    chance = random.Random(1)
    requests = _requests(llm, chance)
    alone = [llm.completed([request])[0].token_ids for request in requests]
    engine = ContinuousEngine(llm, max_num_seqs=8)
    engine.start()
    compiled = llm.mesh.compilations()
    orders, cached = [], []
    for _ in range(3):
        got: list[list[int]] = [[] for _ in requests]
        over = [threading.Event() for _ in requests]

        def take(place: int, update: Update, got: Any = got, over: Any = over) -> None:
            got[place].extend(update.token_ids)
            if update.finish_reason is not None:
                cached.append(update.cached_tokens)
                over[place].set()

        order = list(range(len(requests)))
        chance.shuffle(order)
        for place in order:
            engine.submit(requests[place], lambda update, place=place: take(place, update))
            time.sleep(chance.random() * 0.005)
        assert all(event.wait(60) for event in over)
        orders.append(got)
    ends: list[str | None] = []
    done = threading.Event()
    ticket = engine.submit(
        requests[0], lambda update: (ends.append(update.finish_reason), done.set())
    )
    ticket.cancel()
    assert done.wait(60)
    engine.close(5)
    load = engine.load()
    return {
        "alone": alone,
        "orders": orders,
        "cached": sum(cached),
        "cancelled": ends[-1],
        "compiled since": llm.mesh.compilations() - compiled,
        "left": (load.running, load.waiting, engine.state()),
    }


def many(folder: str, mesh: str, numbers: list[int]) -> list[int]:
    """Programs compiled by runs of so many prompts of 5 to 300 tokens, after the first run."""
    llm, chance = parallama.load(folder, mesh=mesh), random.Random(2)
    counts = []
    for number in numbers:
        before = llm.mesh.compilations()
        lengths = [5, 300, *(chance.randrange(5, 301) for _ in range(number - 2))]
        prompts = [[chance.randrange(3, 300) for _ in range(length)] for length in lengths]
        llm.generate(prompts, max_new_tokens=8, temperature=0)
        counts.append(llm.mesh.compilations() - before)
    return counts


def penalised(folder: str, mesh: str, prompts: list[list[int]], penalty: float) -> list[list[int]]:
    """Greedy tokens under a repetition penalty."""
    llm = parallama.load(folder, mesh=mesh)
    found = llm.generate(
        prompts, temperature=0, repetition_penalty=penalty, max_new_tokens=12, ignore_eos=True
    )
    return [each.token_ids for each in found]
