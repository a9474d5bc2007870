"""Any query and KV heads lie on any number of devices, exactly, and at the lowest cost."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import check_raised, says

from parallama.errors import UsageError
from parallama.plan.heads import EMPTY, HeadLayout, check_heads, choose, layout_for_group, padded

MOST_QUERY_HEADS = 160
DEVICES = st.integers(1, 16)


@st.composite
def head_counts(draw, most_kv=40, most_query=MOST_QUERY_HEADS):
    kv = draw(st.integers(1, most_kv))
    return kv * draw(st.integers(1, max(1, most_query // kv))), kv


def every_layout(query: int, kv: int, devices: int) -> list[HeadLayout]:
    return [layout_for_group(query, kv, devices, group) for group in range(1, query // kv + 1)]


def cost(layout: HeadLayout) -> tuple[int, int]:
    """Attention weights in units of one head, then cache in units of one KV head."""
    return layout.slots * layout.group + layout.slots, layout.slots


@settings(deadline=None)
@given(counts=head_counts(), devices=DEVICES)
def test_every_query_head_stands_exactly_once_beside_its_kv_head(counts, devices):
    query, kv = counts
    for layout in every_layout(query, kv, devices):
        assert len(layout.query_sources) == layout.slots * layout.group
        held = Counter(source for source in layout.query_sources if source != EMPTY)
        assert held == Counter(range(query))
        for slot, kv_source in enumerate(layout.kv_sources):
            members = layout.query_sources[slot * layout.group : (slot + 1) * layout.group]
            owners = {source // (query // kv) for source in members if source != EMPTY}
            assert owners == (set() if kv_source == EMPTY else {kv_source})


@settings(deadline=None)
@given(counts=head_counts(), devices=DEVICES)
def test_every_device_holds_as_many_slots_and_every_kv_head_stands_somewhere(counts, devices):
    query, kv = counts
    for layout in every_layout(query, kv, devices):
        assert layout.slots % devices == 0
        assert set(layout.kv_sources) - {EMPTY} == set(range(kv))
        assert layout.kv_sources.count(EMPTY) < devices


@settings(deadline=None)
@given(counts=head_counts(), devices=DEVICES)
def test_the_cheapest_of_all_group_sizes_is_chosen(counts, devices):
    query, kv = counts
    chosen = choose(query, kv, devices)
    assert chosen in every_layout(query, kv, devices)
    assert cost(chosen) == min(cost(layout) for layout in every_layout(query, kv, devices))


@settings(deadline=None)
@given(counts=head_counts(), devices=DEVICES)
def test_the_kind_says_what_was_done_and_division_costs_nothing(counts, devices):
    query, kv = counts
    chosen = choose(query, kv, devices)
    if kv % devices == 0:
        assert chosen.kind == "divide"
        assert (chosen.query_sources, chosen.kv_sources) == (tuple(range(query)), tuple(range(kv)))
    real_kv = [source for source in chosen.kv_sources if source != EMPTY]
    assert ("repeat" in chosen.kind) == (len(set(real_kv)) < len(real_kv))
    assert ("pad" in chosen.kind) == (EMPTY in chosen.query_sources + chosen.kv_sources)
    extras = (chosen.extra_weight_percent, chosen.extra_score_percent, chosen.extra_cache_percent)
    assert (extras == (0, 0, 0)) == (chosen.kind == "divide")
    assert min(extras) >= 0


def blocks(weight: np.ndarray, sources: tuple[int, ...], dim: int) -> np.ndarray:
    """Lay the heads of `dim` out by `sources`, zeros for `EMPTY`: `kv [K, D, E]`, `o [E, H, D]`."""
    laid_out = np.take(weight, [max(source, 0) for source in sources], axis=dim)
    empty = [index for index, source in enumerate(sources) if source == EMPTY]
    laid_out[(slice(None),) * dim + (empty,)] = 0
    return laid_out


def heads_out(x: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, group: int) -> np.ndarray:
    """Causal grouped-query attention by its definition, `[S, H, D]`.

    Args:
        x: `[S, E]`.
        q: `[H, D, E]`.
        k, v: `[K, D, E]`.
    """
    length = len(x)
    queries, keys, values = (np.einsum("se,hde->hsd", x, weight) for weight in (q, k, v))
    outputs = []
    for head, query in enumerate(queries):
        scores = query @ keys[head // group].T / np.sqrt(q.shape[1])
        scores[np.triu_indices(length, 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        outputs.append(weights / weights.sum(-1, keepdims=True) @ values[head // group])
    return np.stack(outputs, axis=1)


def assert_exact(query: int, kv: int, layout: HeadLayout, seed: int) -> None:
    random = np.random.default_rng(seed)
    hidden, head_dim, length = 5, 4, 6
    x = random.standard_normal((length, hidden))
    q = random.standard_normal((query, head_dim, hidden))
    k, v = random.standard_normal((2, kv, head_dim, hidden))
    o = random.standard_normal((hidden, query, head_dim))
    expected = np.einsum("shd,ehd->se", heads_out(x, q, k, v, query // kv), o)

    q, k, v = (
        blocks(q, layout.query_sources, 0),
        blocks(k, layout.kv_sources, 0),
        blocks(v, layout.kv_sources, 0),
    )
    o = blocks(o, layout.query_sources, 1)
    slots, empty = (
        layout.slots // layout.devices,
        [source == EMPTY for source in layout.query_sources],
    )
    assert not o[:, empty].any()
    partial_sums = []
    for device in range(layout.devices):
        own_kv = slice(device * slots, (device + 1) * slots)
        own_q = slice(own_kv.start * layout.group, own_kv.stop * layout.group)
        out = heads_out(x, q[own_q], k[own_kv], v[own_kv], layout.group)
        own_o = o[:, own_q]
        assert not np.einsum("shd,ehd->she", out, own_o)[:, empty[own_q]].any()
        partial_sums.append(np.einsum("shd,ehd->se", out, own_o))
    np.testing.assert_allclose(np.sum(partial_sums, axis=0), expected, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=40)
@given(
    counts=head_counts(most_kv=12, most_query=36), devices=DEVICES, seed=st.integers(0, 2**32 - 1)
)
def test_every_layout_computes_the_same_attention_and_its_zero_heads_add_nothing(
    counts, devices, seed
):
    for layout in every_layout(*counts, devices):
        assert_exact(*counts, layout, seed)


@pytest.mark.parametrize(
    ("query", "kv", "devices"),
    [(9, 3, 8), (32, 8, 16), (32, 8, 3), (40, 40, 3), (64, 8, 16), (160, 10, 7)],
)
def test_the_layouts_of_real_models_compute_the_same_attention(query, kv, devices):
    assert_exact(query, kv, choose(query, kv, devices), seed=0)


# Worked by hand. Group g needs ceil(G / g) slots a KV head, rounded up to the devices;
# its cost is slots * (g + 1) heads.
# query, KV, devices: kind, laid-out query heads, laid-out KV heads, extra % of weights, scores
# and cache.
KNOWN = [
    (9, 3, 1, "divide", 9, 3, 0, 0, 0),
    (9, 3, 2, "pad", 12, 4, 100 / 3, 100 / 3, 100 / 3),
    (9, 3, 3, "divide", 9, 3, 0, 0, 0),
    (9, 3, 4, "pad", 12, 4, 100 / 3, 100 / 3, 100 / 3),
    (
        9,
        3,
        5,
        "pad",
        15,
        5,
        200 / 3,
        200 / 3,
        200 / 3,
    ),  # as dear as ten single heads, with half the cache
    (9, 3, 6, "repeat+pad", 12, 6, 50, 100 / 3, 100),
    (9, 3, 7, "repeat+pad", 14, 7, 75, 500 / 9, 400 / 3),
    (9, 3, 8, "repeat+pad", 16, 8, 100, 700 / 9, 500 / 3),
    (9, 3, 9, "repeat", 9, 9, 50, 0, 200),
    (9, 3, 10, "repeat+pad", 10, 10, 200 / 3, 100 / 9, 700 / 3),
    (9, 3, 11, "repeat+pad", 11, 11, 250 / 3, 200 / 9, 800 / 3),
    (9, 3, 12, "repeat+pad", 12, 12, 100, 300 / 9, 300),
    (9, 3, 13, "repeat+pad", 13, 13, 350 / 3, 400 / 9, 1000 / 3),
    (9, 3, 14, "repeat+pad", 14, 14, 400 / 3, 500 / 9, 1100 / 3),
    (9, 3, 15, "repeat+pad", 15, 15, 150, 600 / 9, 400),
    (9, 3, 16, "repeat+pad", 16, 16, 500 / 3, 700 / 9, 1300 / 3),
    (32, 8, 8, "divide", 32, 8, 0, 0, 0),
    (32, 8, 16, "repeat", 32, 16, 20, 0, 100),
    (32, 8, 3, "pad", 36, 9, 12.5, 12.5, 12.5),
    (40, 40, 3, "pad", 42, 42, 5, 5, 5),
    (64, 8, 16, "repeat", 64, 16, 100 / 9, 0, 100),
]


@pytest.mark.parametrize(
    ("query", "kv", "devices", "kind", "laid_query", "laid_kv", "weight", "score", "cache"), KNOWN
)
def test_known_models_lie_as_worked_out_by_hand(
    query, kv, devices, kind, laid_query, laid_kv, weight, score, cache
):
    layout = choose(query, kv, devices)
    assert (layout.kind, len(layout.query_sources), layout.slots) == (kind, laid_query, laid_kv)
    assert layout.extra_weight_percent == pytest.approx(weight)
    assert layout.extra_score_percent == pytest.approx(score)
    assert layout.extra_cache_percent == pytest.approx(cache)


def test_smollm2_on_eight_devices_is_laid_out_as_written_here():
    layout = choose(9, 3, 8)
    assert layout.query_sources == (
        0,
        1,
        2,
        EMPTY,
        3,
        4,
        5,
        EMPTY,
        6,
        7,
        8,
        EMPTY,
        EMPTY,
        EMPTY,
        EMPTY,
        EMPTY,
    )
    assert layout.kv_sources == (0, 0, 1, 1, 2, 2, EMPTY, EMPTY)


@pytest.mark.parametrize(
    ("query", "kv", "devices", "parts"),
    [
        (32, 8, 8, ("32 query / 8 KV", "8 devices")),
        (32, 8, 3, ("32 query / 8 KV", "3 devices", "36 / 9", "+12%")),
        (32, 8, 16, ("32 query / 8 KV", "16 devices", "32 / 16", "+20%", "+100%")),
        (9, 3, 8, ("9 query / 3 KV", "8 devices", "16 / 8", "+100%", "+167%")),
    ],
)
def test_the_reason_names_the_heads_the_devices_and_the_price(query, kv, devices, parts):
    assert says(choose(query, kv, devices).reason, *parts)


@pytest.mark.parametrize(
    ("query", "kv", "devices", "parts"),
    [
        (9, 2, 4, ("9 query heads", "2 KV heads", "multiple")),
        (2, 4, 4, ("2 query heads", "4 KV heads", "multiple")),
        (0, 1, 4, ("0 query heads", "at least 1")),
        (-9, 3, 4, ("-9 query heads", "at least 1")),
        (9, 0, 4, ("0 KV heads", "at least 1")),
        (9, -3, 4, ("-3 KV heads", "at least 1")),
        (9, 3, 0, ("0 devices", "at least 1")),
        (9, 3, -1, ("-1 devices", "at least 1")),
    ],
)
def test_counts_that_cannot_be_laid_out_are_errors(query, kv, devices, parts):
    with pytest.raises(UsageError) as caught:
        choose(query, kv, devices)
    check_raised(caught.value, 2, *parts)


def test_check_heads_accepts_every_multiple():
    for kv in range(1, 41):
        for group in range(1, 9):
            check_heads(kv * group, kv)


@settings(deadline=None)
@given(size=st.integers(1, 1 << 26), devices=DEVICES)
def test_a_padded_size_is_the_next_multiple(size, devices):
    assert padded(size, devices) % devices == 0
    assert 0 <= padded(size, devices) - size < devices
