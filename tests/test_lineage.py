"""The lineage: complete, replayable, readable."""

import time

import pytest

from growmoe import FFN, Event, Lineage, MoE, TopK, surgery


def event(act, ids=(), parents=(), child=None, step=1, **more):
    return Event(step, "moe", act, tuple(ids), tuple(parents), child, **more)


INIT = event("init", (0, 1, 2), step=0)


def test_replay_gives_the_living_and_the_frozen():
    lineage = Lineage(
        [
            INIT,
            event("spawn", parents=(1,), child=3),
            event("spawn", child=4),
            event("freeze", (0, 3)),
            event("merge", (0, 3), (0, 3), 5),  # all frozen: the child is too
            event("merge", (5, 4), (5, 4), 6),  # not all
            event("freeze", (1,)),
            event("prune", (2,), accepted=False),
            event("freeze", (2,)),
            event("thaw", (1,)),
        ]
    )
    assert lineage.replay() == [1, 2, 6]
    assert lineage.frozen() == [2]
    assert Lineage(lineage.events[:5]).frozen() == [5]
    assert len(lineage) == 10 and next(iter(lineage)) is INIT


def test_replay_equals_the_layer_after_many_acts():
    layer = MoE(8, FFN(8), 4, TopK(1), seed=0)
    for _ in range(5):
        born = surgery.spawn(layer, next(iter(layer.experts)), admitted=True).child
        surgery.freeze(layer, [born])
        surgery.merge(layer, list(layer.experts)[:2])
        if len(layer.experts) > 3:
            surgery.prune(layer, [list(layer.experts)[1]])
    assert layer.lineage.replay() == list(layer.experts)
    assert layer.lineage.frozen() == [i for i, e in layer.experts.items() if e.frozen]


@pytest.mark.parametrize(
    "wrong",
    [
        event("prune", (7,)),
        event("merge", (0, 7), (0, 7), 3),
        event("spawn", parents=(7,), child=3),
        event("spawn", parents=(0,), child=2),
        event("freeze", (7,)),
        event("init", (2,)),
    ],
    ids=str,
)
def test_events_that_contradict_each_other_are_named(wrong):
    with pytest.raises(ValueError, match="contradicts itself at: step 1") as error:
        Lineage([INIT, event("prune", (1,)), wrong]).replay()
    assert str(wrong) in str(error.value)


def test_the_dead_are_not_born_again():
    lineage = Lineage([INIT, event("prune", (2,)), event("spawn", child=2)])
    with pytest.raises(ValueError, match="spawned 2"):
        lineage.replay()


def test_json_lines_come_back_as_they_were(tmp_path):
    lineage = Lineage(
        [
            INIT,
            event(
                "spawn",
                parents=(1,),
                child=3,
                reason='novelty "3.1" > 2,5\n\u2028é',
                signals={"z": 3.1},
            ),
            event("merge", (0, 3), (0, 3), 4, change=0.0123),
            event("prune", (1,), accepted=False, change=None),
        ]
    )
    lineage.save(tmp_path / "a.jsonl")
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 4
    back = Lineage.load(tmp_path / "a.jsonl")
    assert back.events == lineage.events
    assert back.replay() == [1, 2, 4]
    Lineage().save(tmp_path / "empty")
    assert Lineage.load(tmp_path / "empty").replay() == []


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "5",
        "{}",
        '{"step": 1, "layer": "moe", "act": "prune"}',
        '{"step": 1, "layer": "moe", "act": "explode", "ids": [], "parents": []}',
        '{"step": 1, "layer": "moe", "act": "prune", "ids": 3, "parents": []}',
        '{"step": 1, "layer": "moe", "act": "prune", "ids": [], "parents": [], "new": 1}',
    ],
)
def test_a_line_that_is_no_event_is_named_by_file_and_number(line, tmp_path):
    path = tmp_path / "a.jsonl"
    Lineage([INIT]).save(path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: "):
        Lineage.load(path)


def test_an_event_reads_as_a_sentence():
    told = event("spawn", parents=(4,), child=9, step=1200, reason="novelty 3.1 > 2.5")
    assert str(told) == "step 1200: moe spawned 9 from 4: novelty 3.1 > 2.5"
    assert str(event("merge", (1, 2), (1, 2), 3, change=0.0123)) == (
        "step 1: moe merged 1, 2 into 3 (output changed by 1.23%)"
    )
    assert str(event("prune", (1,), accepted=False)) == "step 1: moe refused to prune 1"


def test_the_tree_shows_each_expert_once_under_its_first_parent_with_its_end():
    lineage = Lineage(
        [
            INIT,
            event("spawn", parents=(0,), child=3, step=5),
            event("spawn", parents=(0,), child=4, step=6),
            event("merge", (1, 3), (1, 3), 5, step=7),
            event("prune", (2,), step=8),
            event("freeze", (4,), step=9),
        ]
    )
    assert lineage.tree().splitlines() == [
        "0 (initial, alive)",
        "├─ 3 (born at 5, merged into 5 at 7)",
        "└─ 4 (born at 6, frozen)",
        "1 (initial, merged into 5 at 7)",
        "└─ 5 (born at 7 of 1, 3, alive)",
        "2 (initial, pruned at 8)",
    ]


def test_a_descent_of_2000_generations_is_drawn_quickly_and_stays_readable():
    lineage = Lineage([event("init", (0,), step=0)])
    for id in range(1, 2001):
        lineage.add(event("spawn", parents=(id - 1,), child=id, step=id))
    began = time.perf_counter()
    lines = lineage.tree().splitlines()
    assert time.perf_counter() - began < 2
    assert len(lines) == 2001
    assert lines[1] == "└─ 1 (born at 1, alive)"
    assert lines[-1].endswith("└─ 2000 (born at 2000, alive)")
    assert "1980 levels deeper" in lines[-1]
    assert max(map(len, lines)) < 130
