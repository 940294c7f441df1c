"""Controls differ from growmoe in what they say, and in nothing else."""

import json

import pytest
import torch
from rows import rows

from growmoe.continual import controls as room
from growmoe.continual.classifier import GrowingClassifier
from growmoe.continual.methods import METHODS, controls
from growmoe.continual.rivals.learner import Budget, run_learner
from growmoe.continual.scenarios import permuted
from growmoe.rules import FreezeSettled, MergeOverlapping, PruneIdle, SpawnOnNovelty, ThawOnNovelty

grows_domains = pytest.mark.skipif(
    not hasattr(GrowingClassifier, "enter"), reason="needs domains of its own"
)


def silent(fraction, text):
    assert 0 <= fraction <= 1


def two_domains(**how):
    return rows(experiences=2, family=permuted, scenario="domain", each=60, **how)


def test_every_control_is_described_and_keeps_growmoes_settings():
    mine = METHODS["growmoe"].settings
    for name, method in controls().items():
        assert len(f"{name:<15}{method.description}") <= 80
        assert mine.items() <= json.loads(json.dumps(dict(method.settings))).items()
        assert method.again(batch_size=10).settings["batch_size"] == 10
    assert not set(controls()) & set(METHODS)
    assert {"no-spawn", *(f"with-{act}" for act in room.FURTHER)} <= set(controls())
    assert [name for name, m in controls().items() if m.needs] == ["oracle-growth"]


def test_an_act_that_is_switched_on_has_its_rules_beside_growmoes(monkeypatch):
    monkeypatch.setattr(room, "run_grown", lambda stream, progress, learner, size: learner)
    for act, (rules, label_rules) in {
        "merge": ([SpawnOnNovelty, MergeOverlapping], []),
        "prune": ([SpawnOnNovelty, PruneIdle], []),
        "freeze": ([SpawnOnNovelty], [FreezeSettled, ThawOnNovelty]),
    }.items():
        model = controls()[f"with-{act}"].run(two_domains(), 0, silent).classifier
        assert [type(rule) for rule in model.rules] == rules
        assert [type(rule) for rule in model.label_rules] == label_rules


@pytest.mark.slow
@grows_domains
@pytest.mark.parametrize("drift", ["sharp", "fuzzy", "recurring"])
def test_the_oracle_grows_one_domain_for_each_and_finds_it_again(drift):
    stream = two_domains(drift=drift)
    learner = room.AtBoundaries(stream, early=32, seed=0)
    cell = run_learner(stream, silent, learner, Budget(16))
    assert cell.extras["domains"] == stream.num_domains == len(learner.ids)


@pytest.mark.slow
@grows_domains
def test_random_growth_has_as_many_births_at_other_times():
    stream = two_domains()
    times = []
    for seed in range(2):
        learner = room.AtRandom(stream, early=32, seed=seed, births=3, batch_size=16)
        run_learner(stream, silent, learner, Budget(16))
        assert len(learner.classifier.domains) - 1 == len(learner.times) == 3
        times.append(learner.times)
    assert times[0] != times[1]


@pytest.mark.slow
@grows_domains
@pytest.mark.parametrize("name", list(controls()))
def test_every_control_fills_its_cell(name):
    torch.manual_seed(0)
    stream = two_domains()
    cell = controls()[name].again(batch_size=16, early=32).run(stream, 0, silent)
    assert len(cell.accuracy_matrix) == 2 and cell.memory_bytes > 0 and cell.parameters > 0
    if name == "fixed-mixture":
        assert not any(e["act"] == "spawn" and e["layer"] == "domains" for e in cell.lineage)
    if name == "no-spawn":
        assert cell.extras["domains"] == 1


@pytest.mark.slow
@grows_domains
def test_the_dense_head_has_the_memory_that_growmoe_ends_with():
    stream = two_domains()
    grown = room.grow(stream, 0, 16, 32)
    cell = room.run_dense(stream, 0, silent, 16, 32, 1e-4)
    mine = grown.memory(stream.bytes_per_example)
    assert cell.memory.statistics == pytest.approx(mine.statistics, rel=0.25)
