"""What `test_field_prompts` runs in a worker of two devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parallama import Chat, SamplingParams, load
from parallama.errors import ParallamaError
from parallama.inference.run_stats import Choice


def everything(folder: str) -> dict[str, Any]:
    """One model through all calls, then on another mesh."""
    llm = load(folder, mesh="1x2", progress=False)

    def ids(*arguments: Any, **names: Any) -> list[list[int]]:
        return [each.token_ids for each in llm.generate(*arguments, **names)]

    few = {"temperature": 1.0, "max_new_tokens": 8}
    prompts = ["Once upon", "A star", "Once upon"]
    seeded = few | {"seed": 7}
    clones = [ids(["Once upon"] * 3, **few) for _ in range(2)]
    together = [ids(prompts, **seeded), ids(prompts, **seeded), ids(prompts[1:2], **seeded)]
    n = [(each.index, each.token_ids) for each in llm.generate(prompts[:2], n=2, **seeded)]
    chat = _chats(llm, seeded)
    each = _each(llm)
    groups, mixed = _groups(llm), _mixed(llm)
    wrong = _wrong(llm)
    llm.reshard("2x1")
    return {
        "clones": clones,
        "seeded": [*together, ids(prompts, **seeded)],
        "n": n,
        "each": each,
        "groups": groups,
        "mixed": mixed,
        "chat": chat,
        "wrong": wrong,
        "special": _special(llm),
    }


def _special(llm: Any) -> list[str | None]:
    """How a token that starts a turn ends a text, without and with it as a stop string."""
    token = llm.tokenizer.convert_tokens_to_ids("<|im_start|>")
    params = [SamplingParams(max_new_tokens=9, stop=stop) for stop in ([], ["<|im_start|>"])]
    rows = [llm.row(request) for request in llm.requests([(None, [1])] * 2, params)]
    return [row.take(Choice(0, token, -1.0), 0.0).finish_reason for row in rows]


def _each(llm: Any) -> list[list[Any]]:
    greedy = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
    text = llm.generate("Once upon", greedy)[0].text
    params = [
        greedy,
        SamplingParams(temperature=0, max_tokens=3, ignore_eos=True),
        SamplingParams(temperature=0, max_new_tokens=12, stop=text[4:6], ignore_eos=True),
    ]
    found = llm.generate(["Once upon"] * 3, params)
    return [[each.token_ids, each.finish_reason, each.text] for each in found]


def _groups(llm: Any) -> tuple[Any, Any, int]:
    """Five requests, two rows at a time, with limits and samplers of their own."""
    params = [
        SamplingParams(temperature=1, seed=1, max_new_tokens=length, ignore_eos=length % 2 == 0)
        for length in (9, 2, 5, 7, 3)
    ]
    prompts = [(None, llm.encode("word " * (1 + place))) for place in range(5)]
    requests = llm.requests(prompts, params)
    together = [(place, each.token_ids) for place, each in enumerate(llm.completed(requests))]
    in_groups = sorted((place, each.token_ids) for place, each in llm.run(requests, max_num_seqs=2))
    for _ in llm.run(requests, max_num_seqs=2):
        pass
    return in_groups, together, llm.stats.programs_compiled + llm.stats.programs_after_warmup


def _mixed(llm: Any) -> tuple[int, int]:
    """Programs compiled when the first group has ended, and all in all; samplers differ."""
    params = [
        SamplingParams(max_new_tokens=40, ignore_eos=True, **names)
        for names in ({"temperature": 0}, {"temperature": 1, "top_k": 5}, {"top_p": 0.5})
    ]
    requests = llm.requests([(None, llm.encode("word"))] * 3, params)
    counts = [llm.stats.programs_compiled for _ in llm.run(requests, max_num_seqs=1)]
    return counts[0], counts[-1]


def _chats(llm: Any, seeded: dict[str, Any]) -> dict[str, Any]:
    hello = [{"role": "user", "content": "Hello"}]
    other = [{"role": "system", "content": "Be brief."}, *hello]
    talk = Chat(llm, messages=other[:1], max_model_len=256, **seeded)
    turns, answers = [], []
    for said in ("Hello", "And now?"):
        asked = [*talk.messages, {"role": "user", "content": said}]
        turns.append("".join(chunk.text for chunk in talk.send(said)))
        answers.append(llm.chat(asked, **seeded)[0].text)
    talk.reset()
    again = "".join(chunk.text for chunk in talk.send("Hello"))
    return {
        "one": llm.chat(hello, **seeded)[0].token_ids,
        "list": [each.token_ids for each in llm.chat([hello, other], **seeded)],
        "rendered": llm.generate(llm.render_chat(hello), **seeded)[0].token_ids,
        "turns": turns,
        "answers": answers,
        "after reset": again,
    }


def _wrong(llm: Any) -> dict[str, tuple[Any, ...]]:
    system = [{"role": "system", "content": "Be brief."}]
    calls: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
        "max_token": (lambda: llm.generate("a", max_token=5), ("max_token", "max_tokens")),
        "both": (lambda: llm.generate("a", SamplingParams(), seed=1), ("sampling_params", "seed")),
        "stream of two": (lambda: llm.stream("a", n=2), ("n is 2",)),
        "system twice": (lambda: Chat(llm, system="a", messages=system), ("system", "messages")),
    }
    found = {}
    for name, (call, words) in calls.items():
        try:
            call()
        except ParallamaError as error:
            found[name] = (type(error).__name__, error.exit_code, str(error), words)
    return found
