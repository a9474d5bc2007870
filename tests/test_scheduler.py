"""Which request gets which slot: whatever comes in whatever order, all end and no slot is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallama.errors import QueueFullError
from parallama.inference.scheduler import Admitted, Copy, Round, Scheduler
from parallama.inference.slot_shapes import SlotShapes


@dataclass
class Slots:
    """Slots without devices, which do what a round says and check that it may."""

    shapes: SlotShapes
    contents: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.contents = [[] for _ in range(self.shapes.slots)]


@dataclass
class Run:
    """Requests on slots: what each has got so far."""

    slots: Slots
    scheduler: Scheduler
    prompts: dict[int, list[int]] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)
    slot_of: dict[int, int] = field(default_factory=dict)
    got: dict[int, int] = field(default_factory=dict)
    admitted: list[Admitted] = field(default_factory=list)

    def add(self, name: int, prompt: list[int], limit: int, priority: int = 0) -> None:
        self.scheduler.add(name, prompt, priority)
        self.prompts[name], self.limits[name] = prompt, limit

    def end(self, name: int) -> None:
        slot = self.scheduler.end(name)
        assert slot == self.slot_of.pop(name, None)
        self.prompts.pop(name, None)

    def step(self) -> Round | None:
        todo = self.scheduler.next_round()
        if todo is None:
            return None
        contents, shapes = self.slots.contents, self.slots.shapes
        for move in todo.moves:
            if isinstance(move, Copy):
                assert self.scheduler.copying
                assert move.source // shapes.per_shard == move.target // shapes.per_shard
                assert move.target not in self.slot_of.values()
                contents[move.target] = list(contents[move.source])
                if move.request is not None:
                    assert self.slot_of[move.request] == move.source
                    self.slot_of[move.request] = move.target
                continue
            assert move.slot not in self.slot_of.values()
            prompt = self.prompts[move.request]
            assert contents[move.slot][: move.cached] == prompt[: move.cached]
            assert move.cached < len(prompt)
            del contents[move.slot][move.cached :]
            self.slot_of[move.request] = move.slot
            self.admitted.append(move)
        decoding = [name for name in self.slot_of if self.got.get(name)]
        assert todo.decode == bool(decoding)
        for name in decoding:
            contents[self.slot_of[name]].append(1000 + name)
            self.got[name] += 1
        shards = [self.slot_of[name] // shapes.per_shard for name in todo.prefill]
        assert len(set(shards)) == len(shards)
        for name in todo.prefill:
            held, prompt = contents[self.slot_of[name]], self.prompts[name]
            held += prompt[len(held) : len(held) + shapes.chunk(len(prompt) - len(held))]
            assert held == prompt[: len(held)]
            if len(held) == len(prompt):
                self.scheduler.began(name)
                self.got[name] = 1
        for name in [name for name in self.slot_of if self.got.get(name, 0) >= self.limits[name]]:
            self.end(name)
        return todo

    def finish(self) -> None:
        for _ in range(10_000):
            if self.step() is None:
                break
        assert not self.prompts and not self.slot_of, "a request never ended"
        assert self.scheduler.running == self.scheduler.waiting == 0
        assert self.scheduler.free == (self.scheduler.at_once or self.slots.shapes.slots)


def run_of(slots: int, shards: int = 1, positions: int = 400, **options: object) -> Run:
    shapes = SlotShapes.of(slots=slots, positions=positions, shards=shards).complete()
    made = Slots(shapes)
    return Run(made, Scheduler(made, **options))  # type: ignore[arg-type]


PREFIXES = [[7] * 40, [7] * 40 + [8] * 100, [9] * 64]
PROMPT = st.builds(
    lambda prefix, rest: prefix + rest,
    st.sampled_from([[], *PREFIXES]),
    st.lists(st.integers(0, 5), min_size=1, max_size=60),
)
EVENT = st.one_of(
    st.tuples(st.just("add"), PROMPT, st.integers(1, 30), st.integers(-1, 1)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("step"), st.integers(1, 10)),
)


@settings(max_examples=150, deadline=None)
@given(
    events=st.lists(EVENT, max_size=60),
    slots=st.integers(1, 9),
    shards=st.integers(1, 3),
    caching=st.booleans(),
    copying=st.booleans(),
)
def test_whatever_happens_all_end_and_every_slot_is_free_again(
    events: list[tuple[object, ...]], slots: int, shards: int, caching: bool, copying: bool
) -> None:
    run = run_of(slots, shards, prefix_caching=caching, copying=copying)
    names = iter(range(10_000))
    added = 0
    for kind, *rest in events:
        if kind == "add":
            prompt, limit, priority = rest
            run.add(next(names), prompt, limit, priority)  # type: ignore[arg-type]
            added += 1
        elif kind == "cancel" and rest[0] in run.prompts:
            run.end(rest[0])  # type: ignore[arg-type]
        elif kind == "step":
            for _ in range(rest[0]):  # type: ignore[call-overload]
                run.step()
    run.finish()
    assert len(run.admitted) <= added


def test_first_come_first_served_but_for_priorities() -> None:
    run = run_of(2)
    for name, priority in enumerate((0, 0, 0, -1, 0)):
        run.add(name, [name] * 3, 5, priority)
    run.finish()
    assert [move.request for move in run.admitted] == [3, 0, 1, 2, 4]


def test_a_long_prompt_holds_the_others_up_for_one_chunk_at_a_time() -> None:
    run = run_of(4, positions=4200)
    run.add(0, [1], 100)
    run.step()
    run.add(1, list(range(4000)), 2)
    chunks = 0
    while 1 in run.prompts:
        before = run.got[0]
        todo = run.step()
        assert todo is not None and run.got[0] == before + 1
        chunks += 1 in todo.prefill
    assert chunks == -(-4000 // max(run.slots.shapes.chunks))


def test_a_lone_request_runs_in_the_first_slot_of_its_shard() -> None:
    run = run_of(8)
    for name in range(5):
        run.add(name, [name], 3 + 20 * (name == 4))
    while len(run.prompts) > 1:
        run.step()
    run.step()
    assert run.slot_of == {4: 0}


def test_a_prompt_goes_on_from_what_a_slot_holds() -> None:
    run = run_of(4)
    history = list(range(100, 200))
    run.add(0, history, 10)
    run.finish()
    run.add(1, [*history, *[1000] * 9, 5, 6], 3)
    run.finish()
    assert run.admitted[-1].cached == 109


def test_what_a_slot_held_is_kept_while_there_are_others() -> None:
    run = run_of(4)
    histories = [[name] * 80 for name in range(3)]
    for name, history in enumerate(histories):
        run.add(name, history, 4)
        run.finish()
    for name, history in enumerate(histories):
        run.add(10 + name, [*history, 77], 4)
        run.finish()
    assert [move.cached for move in run.admitted[-3:]] == [80, 80, 80]


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    run = run_of(4)
    for name in range(4):
        run.add(name, list(range(200)), 5)
    run.finish()
    assert [move.cached for move in run.admitted] == [0, 199, 199, 199]


def test_what_is_overwritten_in_a_round_is_no_prompts_beginning_in_it() -> None:
    """Both are admitted at once: one has a slot kept in another, the other begins as that did."""
    run = run_of(2)
    first, second = [1] * 50, [2] * 50
    run.add(0, first, 3)
    run.finish()
    run.scheduler._used[1] = -1  # the second slot was used before the first
    run.slots.contents[1][:] = second
    run.add(1, [3] * 40, 3)
    run.add(2, [*second, 4], 3)
    run.finish()


def test_a_token_in_common_is_no_reason_for_a_shard_or_a_copy() -> None:
    run = run_of(8, 2)
    run.add(9, [1, *[9] * 60], 3)
    run.finish()
    for name in range(4):
        run.add(name, [1, *[10 + name] * 60], 3)
    run.step()
    assert all(move.cached <= 1 for move in run.admitted[1:])
    assert sorted(slot // 4 for slot in run.slot_of.values()) == [0, 0, 1, 1]
    run.finish()


def test_a_prompt_that_shares_its_beginning_waits_once_at_the_most() -> None:
    """Others that begin the same keep coming; each is computed for several rounds."""
    run = run_of(4, positions=1000)
    run.add(0, [7] * 200 + [1] * 300, 2)
    run.step()
    run.add(1, [7] * 200 + [2] * 10, 2)
    for name in range(2, 40):
        run.add(name, [7] * 200 + [name] * 300, 2)
        run.step()
        if 1 in run.got:
            break
    assert run.got.get(1) and name < 10
    run.finish()


@pytest.mark.parametrize(
    ("limits", "prompts", "taken"),
    [
        ({"max_queued_requests": 3}, [[1]] * 9, 5),
        ({"max_queued_tokens": 10}, [[1] * 4] * 9, 2),
        ({}, [[1]] * 9, 9),
    ],
)
def test_a_queue_is_bounded_by_requests_and_tokens(
    limits: dict[str, int], prompts: Sequence[list[int]], taken: int
) -> None:
    run = run_of(2, **limits)
    added = 0
    for name, prompt in enumerate(prompts):
        try:
            run.add(name, prompt, 3)
        except QueueFullError as error:
            assert "wait" in str(error)
        else:
            added += 1
    assert added == taken
    run.finish()
