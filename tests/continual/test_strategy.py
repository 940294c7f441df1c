import warnings

import pytest
import torch
from torch import nn

import growmoe
from growmoe.continual import GrowingClassifier, GrowMoE, OrganizerPlugin, RandomPatchFeatures
from growmoe.continual.streams import load
from growmoe.rules import Proposal

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from avalanche.training.supervised import Naive


@pytest.fixture(scope="module")
def stream():
    return load("split-digits", seed=1)


def test_growmoe_is_an_avalanche_strategy_like_any_other(stream):
    model = GrowingClassifier(RandomPatchFeatures.for_images(8, 8), 10)
    strategy = GrowMoE(classifier=model, train_mb_size=64, eval_mb_size=500)
    benchmark = stream.benchmark()
    for experience in benchmark.train_stream:
        strategy.train(experience)
    results = strategy.eval(benchmark.test_stream)
    (accuracy,) = (v for k, v in results.items() if k.startswith("Top1_Acc_Stream"))
    assert accuracy > 0.95
    assert len([e for e in strategy.events if e.act == "spawn"]) == 9
    for entry in strategy.load_history:
        assert sum(entry["load"].values()) == pytest.approx(1, abs=0.01)


class EveryAct:
    """Proposes each act in turn, so that all happen in the middle of experiences."""

    def __init__(self):
        self.turn = 0

    def propose(self, signals):
        ids = signals.ids
        self.turn += 1
        return [
            Proposal("spawn", (ids[0],), "turn 0"),
            Proposal("merge", tuple(ids[-2:]), "turn 1"),
            Proposal("freeze", (ids[1],), "turn 2"),
            Proposal("prune", (ids[-1],), "turn 3"),
        ][self.turn % 4 : self.turn % 4 + 1]


@pytest.mark.slow
def test_any_strategy_grows_with_the_plugin_and_avalanche_keeps_the_optimizer_state(stream):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), growmoe.MoE(64, growmoe.FFN(16), 4, warmup=5), nn.Linear(64, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    organizer = growmoe.Organizer(
        model, optimizer, [EveryAct()], every=5, cooldown=0, tolerance=1e9
    )
    plugin = OrganizerPlugin(organizer)
    strategy = Naive(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        plugins=[plugin],
    )
    ages = []
    for experience in stream.benchmark().train_stream:
        strategy.train(experience)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held)) == len(list(model.parameters()))
        assert set(held) == {id(p) for p in model.parameters()}
        ages.append(float(optimizer.state[model[2].weight]["step"]))
    assert ages == sorted(set(ages))  # never reset at the start of an experience
    done = {e.act for e in plugin.events if e.accepted}
    assert {"spawn", "merge", "freeze"} <= done
