"""XLA's flags: ours stand behind the user's, and never against them."""

from __future__ import annotations

import pytest

from parallama.engine.torch_xla.flags import (
    FLAGS,
    NOT_MEASURED,
    VARIABLES,
    cpu_threads,
    with_defaults,
)


@pytest.mark.parametrize("backend", sorted(FLAGS))
def test_without_flags_of_the_user_all_of_ours_are_set(backend: str) -> None:
    assert with_defaults(backend, "").split() == [str(flag) for flag in FLAGS[backend]]


@pytest.mark.parametrize("backend", sorted(FLAGS))
def test_a_flag_that_the_user_sets_stays_as_it_is_and_the_others_are_added(backend: str) -> None:
    first, *rest = FLAGS[backend]
    given = f"--xla_dump_to=/tmp/x --{first.name}=mine"
    assert with_defaults(backend, given) == " ".join([given, *map(str, rest)])


@pytest.mark.parametrize("backend", sorted(FLAGS))
def test_every_flag_says_what_it_does_and_whether_that_was_measured_here(backend: str) -> None:
    assert backend in VARIABLES
    for flag in FLAGS[backend]:
        assert len(flag.effect) > 20 and not flag.name.startswith("-")
        assert (NOT_MEASURED in flag.effect) == (backend != "cpu")


@pytest.mark.parametrize(
    ("devices", "cores", "given", "wanted"),
    [
        (1, 2, {}, None),
        (2, 2, {}, "3"),
        (8, 2, {}, "9"),
        (8, 9, {}, None),
        (2, 1, {}, None),  # on one core XLA splits no loop
        (2, 2, {"PJRT_NPROC": "3"}, None),
        (2, 16, {"PJRT_NPROC": "2"}, "3"),
        (2, 16, {"NPROC": "1"}, "3"),
        (2, 16, {"PJRT_NPROC": "4", "NPROC": "1"}, None),
        (2, 16, {"NPROC": "all"}, None),  # no number: XLA passes over it
    ],
)
def test_xla_gets_a_thread_more_than_there_are_devices(
    devices: int, cores: int, given: dict[str, str], wanted: str | None
) -> None:
    assert cpu_threads(devices, cores, given) == ({} if wanted is None else {"PJRT_NPROC": wanted})
