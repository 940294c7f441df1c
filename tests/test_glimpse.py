"""Looking on is seldom, changes nothing, and sees who is alive and what happened."""

from __future__ import annotations

import pytest

from growmoe import glimpse
from growmoe.glimpse import Glimpse, Onlooker, alive, let_watch, told
from growmoe.lineage import Event

EVENTS = [
    Event(0, "a", "init", (0, 1, 2)),
    Event(5, "a", "spawn", (0,), (0,), 3, "novel"),
    Event(6, "a", "prune", (1,), reason="idle", accepted=False),
    Event(7, "a", "merge", (2, 3), (2, 3), 4, "alike"),
    Event(8, "b", "init", (0,)),
    Event(9, "a", "freeze", (0,), reason="settled"),
    Event(9, "a", "prune", (1,), reason="idle"),
]


def test_the_living_are_those_born_and_not_gone() -> None:
    assert alive(EVENTS) == {"a": 2, "b": 1}
    assert alive([]) == {}


def test_what_is_told_was_carried_out_and_has_its_reason() -> None:
    lines = told(EVENTS)
    assert [line.split()[3] for line in lines] == ["spawned", "merged", "froze", "pruned"]
    assert lines[-1].endswith("pruned 1: idle")
    assert len(told(EVENTS * 9)) < 10


def test_an_onlooker_looks_four_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen, looks = [0.0], [], []

    def look() -> Glimpse:
        looks.append(clock[0])
        return Glimpse(curves={"accuracy": [0.5]})

    monkeypatch.setattr(glimpse.time, "monotonic", lambda: clock[0])
    progress = Onlooker(seen.append)
    let_watch(progress, look)
    for i in range(1000):
        clock[0] = i / 1000
        progress(i / 1000, "going on")
    assert len(looks) == len(seen) == 4
    assert seen[1] == Glimpse(0.25, "going on", {"accuracy": [0.5]})


def test_a_plain_function_is_told_the_progress_alone() -> None:
    let_watch(lambda fraction, text: None, lambda: pytest.fail("nobody looks"))
