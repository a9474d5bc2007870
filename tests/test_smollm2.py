"""The trained model, 9 query and 3 KV heads, on every mesh: it says what transformers says."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import prompts
import pytest
import reference
import torch
from workers import CaseError, Workers

from parallama.files.find import find
from parallama.model.spec import ModelSpec

OPTIMIZE = True  # of the workers' programs

NEAR_TIE = 1e-4
# How many of the prompts, and of each how many tokens; on every mesh all of them, which is slow.
ALL, SOME = (20, 64), (8, 24)
RUNS = [
    ("1x8", *SOME),
    *(
        pytest.param(mesh, *ALL, marks=pytest.mark.slow)
        for mesh in ("1x1", "1x2", "1x3", "1x4", "1x5", "1x8", "2x4", "4x2")
    ),
]
PLANET = "The largest planet in the solar system is"


def devices(mesh: str) -> int:
    return math.prod(int(size) for size in mesh.split("x"))


@dataclass(frozen=True)
class Greedy:
    """transformers' own continuation of one prompt.

    Attributes:
        gaps: how far each token's second best is behind, in logits.
    """

    tokens: list[int]
    logprobs: list[float]
    gaps: list[float]


class Reference:
    """transformers' model with the checkpoint's weights, in fp32, in this process, without XLA."""

    def __init__(self) -> None:
        from transformers import LlamaForCausalLM

        checkpoint = find("smollm2")
        self.tokenizer: Any = checkpoint.tokenizer()
        self.model = LlamaForCausalLM(checkpoint.config).eval()
        tensors = dict(checkpoint.tensors(ModelSpec.from_config(checkpoint.config)))
        missing, unexpected = self.model.load_state_dict(tensors, strict=False)
        assert missing == ["lm_head.weight"] and not unexpected
        self.model.tie_weights()
        assert self.model.lm_head.weight is self.model.model.embed_tokens.weight
        assert self.model.dtype == torch.float32

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def continued(self, rows: list[list[int]], steps: int) -> list[list[int]]:
        """Greedy continuations by transformers' `generate`, past the end-of-text token."""
        from transformers import GenerationConfig

        width = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        self.model.generation_config = GenerationConfig()
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=steps, use_cache=True, pad_token_id=0
        )
        out = self.model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:]
        assert out.shape == (len(rows), steps)
        return out.tolist()

    def greedy(self, rows: list[list[int]], steps: int) -> list[Greedy]:
        """The same with log-probabilities, held against every row alone."""
        found = []
        for row, tokens in zip(rows, self.continued(rows, steps), strict=True):
            alone = self.judged(row, tokens)
            assert all(
                a == b or gap < NEAR_TIE
                for a, b, gap in zip(tokens, alone.tokens, alone.gaps, strict=True)
            )
            found.append(Greedy(tokens, alone.logprobs, alone.gaps))
        return found

    def judged(self, prompt: list[int], tokens: list[int]) -> Greedy:
        """What transformers chooses at every position of a text that is already there."""
        with torch.no_grad():
            out = self.model(
                torch.tensor([prompt + tokens]), use_cache=False, logits_to_keep=len(tokens) + 1
            )
        logits = out.logits[0, :-1].float()
        chosen = logits.argmax(-1)
        best = logits.topk(2, -1).values
        logprobs = torch.log_softmax(logits, -1).gather(1, chosen[:, None])[:, 0]
        return Greedy(chosen.tolist(), logprobs.tolist(), (best[:, 0] - best[:, 1]).tolist())


@pytest.fixture(scope="module")
def hf() -> Reference:
    # One thread: two that wait for each other on a busy machine are four times slower than one.
    torch.set_num_threads(1)
    return Reference()


@pytest.fixture(scope="module")
def twenty(hf: Reference) -> list[list[int]]:
    """Twenty prompts of many lengths, as token ids."""
    rows = [hf.ids(text) for text in prompts.TEXTS]
    assert len(rows) == 20 and len({len(row) for row in rows}) >= 10
    assert min(len(row) for row in rows) == 1 and 64 < max(len(row) for row in rows) <= 128
    return rows


@pytest.fixture(scope="module")
def wanted(hf: Reference, twenty: list[list[int]]) -> Callable[[int, int], list[Greedy]]:
    """transformers' continuations of the first so many of the prompts, by so many tokens."""
    return functools.cache(lambda rows, tokens: hf.greedy(twenty[:rows], tokens))


@pytest.fixture(scope="module")
def alice(hf: Reference) -> list[int]:
    ids = hf.ids(prompts.ALICE)
    assert len(ids) >= 512
    return ids


def near_tie(what: str, tokens: list[int], logprobs: list[float], wanted: Greedy) -> int | None:
    """Hold a row against the reference; where they part in a near tie, or None if they never do."""
    part = next(
        (
            at
            for at, (got, want) in enumerate(zip(tokens, wanted.tokens, strict=True))
            if got != want
        ),
        None,
    )
    if part is not None:
        gap = wanted.gaps[part]
        assert gap < NEAR_TIE, (
            f"{what}, position {part}: token {tokens[part]}, transformers {wanted.tokens[part]}, "
            f"{gap:.2e} ahead of its second"
        )
        print(
            f"{what}: parts from transformers at position {part}, "
            f"where its two best are {gap:.2e} apart"
        )
    for at in range(len(tokens) if part is None else part):
        assert logprobs[at] == pytest.approx(wanted.logprobs[at], abs=1e-3), (
            f"{what}, log-probability at position {at}"
        )
    return part


def continued(workers: Workers, mesh: str, **call: Any) -> dict[str, Any]:
    return workers[devices(mesh)].call("smollm2_cases:generate", mesh=mesh, calls=[call])[0]


# -- parity


@pytest.mark.parametrize(("mesh", "rows", "tokens"), RUNS)
def test_greedy_tokens_are_those_of_transformers(
    workers: Workers,
    twenty: list[list[int]],
    wanted: Callable[[int, int], list[Greedy]],
    mesh: str,
    rows: int,
    tokens: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = continued(
        workers, mesh, prompts=twenty[:rows], max_new_tokens=tokens, ignore_eos=True, temperature=0
    )
    with capsys.disabled():  # near ties are shown, passed or not
        parts = [
            near_tie(f"{mesh}, prompt {row}", output["token_ids"], output["logprobs"], want)
            for row, (output, want) in enumerate(
                zip(run["outputs"], wanted(rows, tokens), strict=True)
            )
        ]
    assert sum(part is not None for part in parts) <= 2, (
        "near ties are rare: so many point to a fault"
    )
    assert run["stats"]["programs_after_warmup"] == 0
    assert all(output["finish_reason"] == "length" for output in run["outputs"])


def test_parameters_take_the_planned_bytes_on_every_device(workers: Workers) -> None:
    sizes = workers[8].call("smollm2_cases:sizes", mesh="1x8")
    assert len(sizes["measured"]) == 8
    assert sizes["measured"] == sizes["planned"]


@pytest.mark.parametrize("mesh", ["1x3", pytest.param("1x8", marks=pytest.mark.slow)])
def test_logits_of_512_tokens_are_those_of_transformers(
    workers: Workers, hf: Reference, alice: list[int], mesh: str
) -> None:
    got = workers[devices(mesh)].call("smollm2_cases:logits", mesh=mesh, ids=alice[:512])
    want = reference.logits(hf.model, torch.tensor([alice[:512]]))[0]
    assert got.shape == want.shape == (512, 49152)
    assert reference.pcc(got, want) >= 0.999999
    assert reference.relative_l2(got, want) < 1e-4
    assert float((got - want).abs().max()) < 1e-2


@pytest.mark.slow
def test_logits_in_bfloat16_are_near_those_in_fp32(
    workers: Workers, hf: Reference, alice: list[int]
) -> None:
    got = workers[8].call("smollm2_cases:logits", mesh="1x8", ids=alice[:512], dtype="bfloat16")
    want = reference.logits(hf.model, torch.tensor([alice[:512]]))[0]
    assert got.dtype == torch.float32
    assert reference.pcc(got, want) >= 0.999
    assert not torch.equal(got, want)


@pytest.mark.slow
def test_a_prompt_of_1500_tokens_goes_on_as_with_transformers(
    workers: Workers, hf: Reference, alice: list[int]
) -> None:
    prompt = (alice * 3)[:1500]
    check_long(workers, hf, "1x3", prompt)


@pytest.mark.slow
def test_a_prompt_of_6000_tokens_goes_on_as_with_transformers(
    workers: Workers, hf: Reference, alice: list[int]
) -> None:
    check_long(workers, hf, "1x2", (alice * 12)[:6000])


def check_long(workers: Workers, hf: Reference, mesh: str, prompt: list[int]) -> None:
    run = continued(
        workers, mesh, prompts=[prompt], max_new_tokens=8, ignore_eos=True, temperature=0
    )
    output = run["outputs"][0]
    near_tie(
        f"{mesh}, {len(prompt)} tokens",
        output["token_ids"],
        output["logprobs"],
        hf.greedy([prompt], 8)[0],
    )
    assert run["stats"]["prefill_tokens"] == len(prompt)
    assert run["stats"]["programs_after_warmup"] == 0


@pytest.mark.parametrize(("length", "new"), [(8193, 1), (8192, 1), (8000, 193)])
def test_a_prompt_over_the_models_maximum_is_refused_with_both_numbers(
    workers: Workers, length: int, new: int
) -> None:
    with pytest.raises(CaseError) as caught:
        continued(workers, "1x3", prompts=[[5] * length], max_new_tokens=new)
    assert caught.value.kind == "UsageError"
    assert {str(length), "8192"} <= set(re.findall(r"\d+", caught.value.message))


# -- programs and memory


@pytest.mark.slow  # tests/test_parity.py has a tiny model's cache grow
def test_300_tokens_compile_nothing_while_the_cache_grows_and_are_those_of_transformers(
    workers: Workers, hf: Reference
) -> None:
    prompt = hf.ids(PLANET)
    run = workers[3].call(
        "smollm2_cases:stream",
        mesh="1x3",
        prompt=prompt,
        take=300,
        max_new_tokens=600,
        ignore_eos=True,
        temperature=0,
    )
    tokens = [chunk["token"] for chunk in run["chunks"]]
    assert len(tokens) == 300 and len(prompt) + 300 > 256, (
        "this is to pass the first bucket of the cache"
    )
    assert run["stats"]["programs_after_warmup"] == 0
    near_tie(
        "1x3, 300 tokens",
        tokens,
        [chunk["logprob"] for chunk in run["chunks"]],
        hf.judged(prompt, tokens),
    )


def test_ten_prompts_of_different_lengths_compile_only_before_their_first_token_and_never_twice(
    workers: Workers, alice: list[int]
) -> None:
    lengths = [1, 2, 5, 9, 15, 16, 17, 30, 33, 60]
    calls = [
        {"prompts": [alice[:length]], "max_new_tokens": 4, "ignore_eos": True, "temperature": 0}
        for length in lengths
    ]
    first, again = (
        workers[3].call("smollm2_cases:generate", mesh="1x3", calls=calls) for _ in range(2)
    )
    assert [run["stats"]["programs_after_warmup"] for run in first] == [0] * 10
    assert [run["compiles"] - run["stats"]["programs_compiled"] for run in first] == [0] * 10
    assert [run["compiles"] for run in again] == [0] * 10
    assert [run["outputs"] for run in first] == [run["outputs"] for run in again]


TURNS = (
    "What is the capital of France?",
    "And of Italy?",
    "Which of the two is larger?",
    "Name a river there.",
    "Thank you. What is 2 + 2?",
    "And twice that?",
    "Write one line about the sea.",
    "Now one about the mountains.",
    "Which did you like more?",
    "Goodbye!",
)


@pytest.mark.parametrize(
    ("turns", "tokens", "longest", "again"),
    [(4, 12, 190, [1, 3]), pytest.param(10, 24, 1100, [2, 6, 9], marks=pytest.mark.slow)],
)
def test_a_chat_computes_only_what_is_new_and_compiles_nothing(
    workers: Workers, hf: Reference, turns: int, tokens: int, longest: int, again: list[int]
) -> None:
    talk = workers[3].call(
        "smollm2_cases:chat",
        mesh="1x3",
        turns=list(TURNS[:turns]),
        max_new_tokens=tokens,
        again=again,
        max_model_len=longest,
    )
    assert talk["compiled"] == 0 and talk["stats"]["programs_after_warmup"] == 0
    said = talk["said"]
    for before, now in itertools.pairwise(said):
        # The last token of an answer was chosen and never fed.
        cached = before["prompt_ids"] + before["tokens"][:-1]
        shared = next(
            (
                at
                for at, (a, b) in enumerate(zip(cached, now["prompt_ids"], strict=False))
                if a != b
            ),
            min(len(cached), len(now["prompt_ids"])),
        )
        assert shared >= len(before["prompt_ids"])
        assert now["computed"] == len(now["prompt_ids"]) - shared
    assert (
        sum(turn["computed"] for turn in said) < sum(len(turn["prompt_ids"]) for turn in said) / 2
    )
    for index in again:
        assert talk["fresh"][index] == said[index]["tokens"], (
            f"turn {index + 1} depends on how the cache was filled"
        )
    for index, turn in enumerate(said):
        near_tie(
            f"1x3, turn {index + 1}",
            turn["tokens"],
            turn["logprobs"],
            hf.judged(turn["prompt_ids"], turn["tokens"]),
        )
    assert [message["role"] for message in talk["messages"]] == [
        "system",
        *["user", "assistant"] * turns,
    ]


def test_the_cache_takes_the_planned_bytes_on_every_device(workers: Workers) -> None:
    """A run's slots have 512 positions or more; the plan's row has 256."""
    run = continued(
        workers, "1x3", prompts=[[1, 2, 3]], max_new_tokens=2, ignore_eos=True, temperature=0
    )
    row = workers[3].call("smollm2_cases:sizes", mesh="1x3")["cache_row"]
    assert run["kv"] == [2 * size for size in row]


# -- rows


@pytest.fixture(scope="module")
def question(hf: Reference) -> list[int]:
    """A question in the chat template, whose answer is short."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    return list(
        hf.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    )


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({"temperature": 0}, id="greedy"),
        pytest.param(
            {"temperature": 0.8, "top_p": 0.9, "seed": 5}, id="sampled", marks=pytest.mark.slow
        ),
    ],
)
def test_each_row_of_a_ragged_batch_says_what_it_says_alone(
    workers: Workers, question: list[int], sampling: dict[str, Any]
) -> None:
    """One row ends long before the others."""
    batch: list[Any] = [PLANET, "Once", question, [504, 3]]
    options = {"max_new_tokens": 16, **sampling}
    calls = [{"prompts": batch, **options}, *[{"prompts": [prompt], **options} for prompt in batch]]
    together, *alone = workers[3].call("smollm2_cases:generate", mesh="1x3", calls=calls)
    for output, single in zip(together["outputs"], alone, strict=True):
        single = single["outputs"][0]
        for key in ("token_ids", "text", "finish_reason", "prompt", "prompt_ids"):
            assert output[key] == single[key]
        assert output["logprobs"] == pytest.approx(single["logprobs"], abs=1e-3)
        assert len(output["logprobs"]) == len(output["token_ids"]) <= 16
    reasons = [output["finish_reason"] for output in together["outputs"]]
    assert reasons.count("length") >= 2, "the neighbours go on"
    if sampling["temperature"] == 0:
        assert reasons[2] == "stop"


@pytest.mark.parametrize(
    "meshes",
    [("1x3", "1x8"), ("1x1", "1x2", "2x4")],
    ids=" ".join,
)
@pytest.mark.slow  # tests/test_sampling.py has it of a tiny model
def test_the_same_seed_gives_the_same_text_on_every_mesh(
    workers: Workers, meshes: tuple[str, ...]
) -> None:
    call = {
        "prompts": ["Once upon a time"],
        "max_new_tokens": 32,
        "temperature": 0.8,
        "top_p": 0.9,
        "ignore_eos": True,
    }
    texts = {}
    for mesh in meshes:
        calls = [call | {"seed": 7}, call | {"seed": 8}]
        texts[mesh] = [
            run["outputs"][0]["text"]
            for run in workers[devices(mesh)].call("smollm2_cases:generate", mesh=mesh, calls=calls)
        ]
    first, *others = texts.values()
    assert all(other == first for other in others)
    assert first[0] != first[1]


def test_a_text_ends_with_its_end_token_unless_that_is_ignored(
    workers: Workers, hf: Reference, question: list[int]
) -> None:
    ended = continued(workers, "1x3", prompts=[question], max_new_tokens=40, temperature=0)[
        "outputs"
    ][0]
    went_on = continued(
        workers, "1x3", prompts=[question], max_new_tokens=40, temperature=0, ignore_eos=True
    )["outputs"][0]
    count = len(ended["token_ids"])
    assert count < 40 and ended["finish_reason"] == "stop"
    assert ended["token_ids"][-1] == hf.tokenizer.eos_token_id and "<|im_end|>" not in ended["text"]
    assert "Paris" in ended["text"]
    assert (
        went_on["finish_reason"] == "length"
        and len(went_on["token_ids"]) == len(went_on["logprobs"]) == 40
    )
    assert went_on["token_ids"][:count] == ended["token_ids"]
    assert len(ended["logprobs"]) == count


def test_a_stop_string_cuts_the_text_and_is_not_in_it(workers: Workers) -> None:
    options = {"prompts": [PLANET], "max_new_tokens": 24, "temperature": 0}
    whole = continued(workers, "1x3", **options)["outputs"][0]["text"]
    assert whole.startswith(" Jupiter, but it's not the only one.")
    for stop in ("only", "t the on", ["Saturn", " one"], "Jupiter"):
        cut = continued(workers, "1x3", **options, stop=stop)["outputs"][0]
        string = stop if isinstance(stop, str) else stop[1]
        assert cut["text"] == whole[: whole.index(string)]
        assert cut["finish_reason"] == "stop"
        assert len(cut["token_ids"]) == len(cut["logprobs"]) < 24


def test_a_stop_string_ends_only_its_own_row(workers: Workers, question: list[int]) -> None:
    batch = [PLANET, "Once", question, [504, 3]]  # as above: the same programs
    options = {"prompts": batch, "max_new_tokens": 16, "temperature": 0, "ignore_eos": True}
    free, stopped = workers[3].call(
        "smollm2_cases:generate", mesh="1x3", calls=[options, options | {"stop": ["Jupiter"]}]
    )
    assert stopped["outputs"][0]["text"] == " " and stopped["outputs"][0]["finish_reason"] == "stop"
    for before, after in zip(free["outputs"][1:], stopped["outputs"][1:], strict=True):
        if "Jupiter" not in before["text"]:
            assert before == after


def test_a_stream_is_what_generate_gives(workers: Workers) -> None:
    for options in (
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.9, "seed": 3},
        {"temperature": 0, "stop": ["only one"]},
    ):
        whole = continued(workers, "1x3", prompts=[PLANET], max_new_tokens=24, **options)[
            "outputs"
        ][0]
        chunks = workers[3].call(
            "smollm2_cases:stream", mesh="1x3", prompt=PLANET, max_new_tokens=24, **options
        )["chunks"]
        assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
        assert [chunk["token"] for chunk in chunks] == whole["token_ids"]
        assert [chunk["logprob"] for chunk in chunks] == whole["logprobs"]
        assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [
            whole["finish_reason"]
        ]
