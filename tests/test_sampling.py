"""The sampler on devices against transformers' own logits processors on the same logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference
import torch
from messages import check_raised
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from parallama.engine.row_sampling import RowSampling
from parallama.errors import UsageError

OPTIMIZE = True  # of the workers' programs

VOCAB = 101
MESHES = ["1x1", "1x2", "1x3", "1x8", "2x4"]
ROWS = 48


def devices(mesh: str) -> int:
    return math.prod(int(size) for size in mesh.split("x"))


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def random_seen(rows: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.rand(rows, vocab, generator=torch.Generator().manual_seed(9)) < 0.3


def processed(
    logits: torch.Tensor, params: dict[str, Any], seen: torch.Tensor | None = None
) -> torch.Tensor:
    """What transformers makes of one row `[V]`, in the order of its `generate`."""
    chain = LogitsProcessorList()
    if params.get("repetition_penalty", 1.0) != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    chain.append(TemperatureLogitsWarper(float(params["temperature"])))
    if params.get("top_k", 0):
        chain.append(TopKLogitsWarper(params["top_k"]))
    if params.get("top_p", 1.0) < 1.0:
        chain.append(TopPLogitsWarper(params["top_p"]))
    if params.get("min_p", 0.0) > 0.0:
        chain.append(MinPLogitsWarper(params["min_p"]))
    ids = torch.tensor([[0]]) if seen is None else seen.nonzero().flatten()[None]
    return chain(ids, logits[None].clone())[0]


def mixed_params(rows: int) -> list[dict[str, Any]]:
    """Different truncations in one batch, each alone and all together."""
    kinds: list[dict[str, Any]] = [
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 40},  # more than one shard of the vocabulary holds
        {"top_k": VOCAB + 7},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 30, "top_p": 0.8},
        {"top_k": 12, "top_p": 0.95, "min_p": 0.02},
        {},
    ]
    temperatures = (0.3, 1.0, 2.5)
    return [
        {"temperature": temperatures[row % 3], "seed": row, **kinds[row % len(kinds)]}
        for row in range(rows)
    ]


@pytest.mark.parametrize("mesh", ["1x1", "1x8"])
def test_the_kept_tokens_are_those_of_transformers(workers: Any, mesh: str) -> None:
    rows = mixed_params(ROWS)
    for seed in range(6):
        logits = random_logits(ROWS, seed)
        kept = workers[devices(mesh)].call(
            "device_cases:choose",
            mesh=mesh,
            logits=logits,
            rows=rows,
            positions=torch.arange(ROWS),
            kept=True,
        )
        for row, params in enumerate(rows):
            wanted = processed(logits[row], params).isfinite()
            assert torch.equal(kept[row], wanted), (params, kept[row].sum(), wanted.sum())


ALL_AT_ONCE = {
    "temperature": 1.2,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 0.8,
}


@pytest.mark.parametrize(
    ("mesh", "params"),
    [
        ("1x1", {"temperature": 0.7}),
        ("1x1", {"temperature": 1.0, "top_k": 7}),
        ("1x1", {"temperature": 1.5, "top_p": 0.8}),
        ("1x1", {"temperature": 1.0, "min_p": 0.1}),
        ("1x1", {"temperature": 1.0, "repetition_penalty": 1.7}),
        ("1x1", ALL_AT_ONCE),
        ("1x8", {"temperature": 0.7}),
        ("1x8", ALL_AT_ONCE),
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution_of_transformers(
    workers: Any, mesh: str, params: dict[str, Any]
) -> None:
    """Chi-square of 8192 draws, half of them over seeds and half over positions."""
    draws = 4096
    logits, seen = random_logits(1, seed=3), random_seen(1)
    penalised = "repetition_penalty" in params
    wanted = torch.softmax(processed(logits[0], params, seen[0] if penalised else None), -1)
    counts = torch.zeros(VOCAB)
    for rows, positions in (
        ([{**params, "seed": seed} for seed in range(draws)], torch.full((draws,), 17)),
        ([{**params, "seed": 5}] * draws, torch.arange(draws)),
    ):
        tokens, logprobs = workers[devices(mesh)].call(
            "device_cases:choose",
            mesh=mesh,
            logits=logits.expand(draws, -1).contiguous(),
            rows=rows,
            positions=positions,
            seen=seen.expand(draws, -1).contiguous() if penalised else None,
        )
        assert torch.allclose(logprobs, torch.log_softmax(logits[0], -1)[tokens], atol=1e-5)
        counts += torch.bincount(tokens, minlength=VOCAB)
    assert not counts[wanted == 0].any()
    expected = wanted * 2 * draws
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 8


def test_an_improbable_token_is_never_drawn(workers: Any) -> None:
    """2^26 random numbers, and every token but one with a probability of e^-60."""
    rows, vocab = 4096, 4096
    logits = torch.full((rows, vocab), -60.0)
    logits[:, 77] = 0
    for run in range(4):
        params = [{"temperature": 1.0, "seed": run * rows + row} for row in range(rows)]
        tokens, _ = workers[1].call(
            "device_cases:choose",
            mesh="1x1",
            logits=logits,
            rows=params,
            positions=torch.full((rows,), 3),
        )
        assert tokens.unique().tolist() == [77]


def test_the_same_seed_gives_the_same_tokens_on_every_mesh_and_in_any_row(workers: Any) -> None:
    logits, seen = random_logits(ROWS, seed=11), random_seen(ROWS)
    rows = [
        {**params, "repetition_penalty": 1.3 if row % 2 else 1.0}
        for row, params in enumerate(mixed_params(ROWS))
    ]
    positions = torch.arange(ROWS) * 37
    by_mesh = {
        mesh: workers[devices(mesh)].call(
            "device_cases:choose",
            mesh=mesh,
            logits=logits,
            rows=rows,
            positions=positions,
            seen=seen,
        )[0]
        for mesh in MESHES
    }
    for tokens in by_mesh.values():
        assert torch.equal(tokens, by_mesh["1x1"])
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    shuffled, _ = workers[2].call(
        "device_cases:choose",
        mesh="1x2",
        logits=logits[order],
        rows=[rows[index] for index in order.tolist()],
        positions=positions[order],
        seen=seen[order],
    )
    assert torch.equal(shuffled, by_mesh["1x1"][order])


def test_other_seeds_and_other_positions_give_other_tokens(workers: Any) -> None:
    logits = torch.zeros(64, VOCAB)
    for rows, positions in (
        ([{"temperature": 1.0, "seed": seed} for seed in range(64)], torch.zeros(64)),
        # Seeds that differ only beyond 32 bits are different seeds.
        ([{"temperature": 1.0, "seed": seed << 32} for seed in range(64)], torch.zeros(64)),
        ([{"temperature": 1.0, "seed": 0}] * 64, torch.arange(64)),
    ):
        tokens, _ = workers[1].call(
            "device_cases:choose", mesh="1x1", logits=logits, rows=rows, positions=positions
        )
        assert len(tokens.unique()) > 30  # 47 of 101 are expected of 64 draws


@pytest.mark.parametrize("mesh", MESHES)
def test_greedy_rows_take_the_best_token_beside_sampled_ones(workers: Any, mesh: str) -> None:
    logits, seen = random_logits(ROWS, seed=4), random_seen(ROWS)
    rows = [
        {"temperature": 0.0} if row % 2 == 0 else params
        for row, params in enumerate(mixed_params(ROWS))
    ]
    rows[2] = {"temperature": 0.0, "repetition_penalty": 3.0}
    tokens, logprobs = workers[devices(mesh)].call(
        "device_cases:choose",
        mesh=mesh,
        logits=logits,
        rows=rows,
        positions=torch.arange(ROWS),
        seen=seen,
    )
    assert tokens[4::2].tolist() == logits[4::2].argmax(-1).tolist()
    penalised = RepetitionPenaltyLogitsProcessor(3.0)(
        seen[2].nonzero().flatten()[None], logits[2][None].clone()
    )
    assert int(tokens[2]) == int(penalised.argmax())
    wanted = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs, wanted, atol=1e-5)


@pytest.mark.parametrize("mesh", ["1x2", "1x8", "2x4"])
@pytest.mark.parametrize("level", [-1e4, -1e9])
@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 100.0}, {"temperature": 1.0, "top_k": 200, "top_p": 0.99}],
    ids=repr,
)
def test_padded_vocabulary_never_wins(
    workers: Any, mesh: str, level: float, params: dict[str, Any]
) -> None:
    """A padded id has logit 0, far above all others here."""
    logits = torch.full((ROWS, VOCAB), level)
    rows = [{**params, "seed": row} for row in range(ROWS)]
    tokens, logprobs = workers[devices(mesh)].call(
        "device_cases:choose",
        mesh=mesh,
        logits=logits,
        rows=rows,
        positions=torch.arange(ROWS),
        vocab=VOCAB,
    )
    assert int(tokens.max()) < VOCAB
    assert torch.allclose(logprobs, torch.full((ROWS,), -math.log(VOCAB)), atol=1e-3)


def test_a_best_token_that_stands_twice_is_taken_at_its_first_place(workers: Any) -> None:
    logits = torch.zeros(8, VOCAB)
    for mesh in MESHES:
        tokens, _ = workers[devices(mesh)].call(
            "device_cases:choose",
            mesh=mesh,
            logits=logits,
            rows=[{}] * 8,
            positions=torch.arange(8),
        )
        assert tokens.tolist() == [0] * 8


def test_sampled_text_is_the_same_on_every_mesh_and_in_every_batch(
    workers: Any, models: Any
) -> None:
    tiny = models(heads=9, kv_heads=3, tied=True, layers=1)
    prompts = reference.random_prompts([3, 20, 1, 16], tiny.vocab)
    params = [
        {
            "temperature": 0.8,
            "top_k": 20,
            "top_p": 0.9,
            "repetition_penalty": 1.2,
            "seed": seed,
            "min_p": 0.01,
        }
        for seed in (1, 2, 3, 2**40)
    ]

    def tokens(mesh: str, rows: list[int]) -> list[list[int]]:
        return workers[devices(mesh)].call(
            "device_cases:generate",
            folder=tiny.folder,
            mesh=mesh,
            prompts=[prompts[row] for row in rows],
            params=[params[row] for row in rows],
            steps=12,
            longest_prompt=20,
        )["tokens"]

    one = tokens("1x1", [0, 1, 2, 3])
    assert len({tuple(row) for row in one}) == 4
    for mesh in ("1x3", "2x4"):
        assert tokens(mesh, [0, 1, 2, 3]) == one
    assert tokens("1x3", [3, 1, 0, 2]) == [one[3], one[1], one[0], one[2]]
    assert tokens("1x1", [2]) == [one[2]]


def test_a_penalised_greedy_continuation_is_that_of_transformers(workers: Any, models: Any) -> None:
    tiny = models(heads=9, kv_heads=3, tied=True)
    prompts = reference.random_prompts([3, 20, 1, 16], tiny.vocab)
    for mesh in ("1x1", "2x4"):
        got = workers[devices(mesh)].call(
            "device_cases:generate",
            folder=tiny.folder,
            mesh=mesh,
            prompts=prompts,
            params=[{"repetition_penalty": 1.0 + row / 2} for row in range(4)],
            steps=12,
        )
        for row, prompt in enumerate(prompts):
            wanted = tiny.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=12,
                repetition_penalty=1.0 + row / 2,
            )
            assert got["tokens"][row] == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("temperature", -0.1, ("0 ", "100")),
        ("temperature", float("nan"), ("0 ", "100")),
        ("temperature", "hot", ("0 ", "100")),
        ("top_k", -1, ("at least 0",)),
        ("top_k", 1.5, ("at least 0",)),
        ("top_k", True, ("at least 0",)),
        ("top_p", 0, ("above 0", "at most 1")),
        ("top_p", 1.01, ("above 0", "at most 1")),
        ("min_p", -0.1, ("0 to 1",)),
        ("min_p", 2, ("0 to 1",)),
        ("repetition_penalty", 0, ("above 0",)),
        ("repetition_penalty", float("inf"), ("above 0",)),
        ("seed", -1, ("0 to 2^64 - 1",)),
        ("seed", 2**64, ("0 to 2^64 - 1",)),
    ],
)
def test_a_parameter_out_of_range_is_named_with_its_value_and_limits(
    name: str, value: Any, limits: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        RowSampling(**{name: value})
    check_raised(caught.value, 2, f"{name} is {value!r}", *limits)
