"""XLA's flags: ours stand behind the user's, and never against them."""

from __future__ import annotations

import pytest

from parallama.flags import FLAGS, NOT_MEASURED, VARIABLES, with_defaults


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
