"""Metrics in Avalanche's protocol: equal to its own where both exist, and what it lacks."""

import pytest
import torch
from rows import rows
from torch import nn

pytest.importorskip("avalanche")

from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive

from growmoe import MoE
from growmoe.continual.avalanche_metrics import growmoe_metrics
from growmoe.continual.baselines import mlp
from growmoe.continual.ridge import RidgeClassifier
from growmoe.continual.strategy import OnePass
from growmoe.experts.ffn import FFN
from growmoe.routers import TopK


class Flat:
    num_features, memory_bytes = 64, 0

    def fit(self, images, generator):
        return self

    def __call__(self, images):
        return images.flatten(1)


def naive(stream, model, *wanted, **how):
    torch.manual_seed(0)
    return Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-2),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        eval_mb_size=50,
        evaluator=EvaluationPlugin(*wanted, loggers=[]),
        **how,
    )


def test_prequential_accuracy_is_avalanches_running_accuracy_in_one_experience():
    stream = rows(experiences=1)
    strategy = naive(
        stream, mlp(stream, 16), accuracy_metrics(epoch_running=True), *growmoe_metrics()
    )
    (experience,) = stream.benchmark().train_stream
    found = strategy.train(experience)
    theirs = found["Top1_RunningAcc_Epoch/train_phase/train_stream/Task000"]
    assert 0.2 < theirs < 1
    assert found["PrequentialAccuracy/train_phase/train_stream"] == pytest.approx(theirs)


def test_any_time_accuracy_is_the_mean_of_avalanches_stream_accuracies():
    stream = rows(experiences=3)
    strategy = naive(
        stream, mlp(stream, 16), accuracy_metrics(stream=True), *growmoe_metrics(), train_epochs=3
    )
    benchmark, accuracies = stream.benchmark(), []
    strategy.eval(benchmark.test_stream)  # nothing was learned: no point of the curve
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        found = strategy.eval(benchmark.test_stream)
        accuracies.append(found["Top1_Acc_Stream/eval_phase/test_stream/Task000"])
    mean = sum(accuracies) / 3
    assert found["AnytimeAccuracy/eval_phase/test_stream"] == pytest.approx(mean)


def test_a_strategy_that_predicts_nothing_while_it_learns_is_asked_and_not_hurried():
    stream = rows(experiences=1, each=30)
    learner = RidgeClassifier(Flat(), stream.num_classes, ridge=1e-4, early=100)
    strategy = OnePass(
        learner=learner,
        train_mb_size=10,
        eval_mb_size=50,
        evaluator=EvaluationPlugin(*growmoe_metrics(), loggers=[]),
    )
    (experience,) = stream.benchmark().train_stream
    found = strategy.train(experience)["PrequentialAccuracy/train_phase/train_stream"]
    assert 0.3 < found <= 80 / 180  # the first hundred waited: none of them was named


def test_load_and_specialisation_of_a_mixture_are_found_by_themselves():
    stream = rows(experiences=1)
    layer = MoE(64, FFN(8, "relu"), num_experts=3, router=TopK(1), d_out=6)
    model = nn.Sequential(nn.Flatten(), layer)
    strategy = naive(stream, model, *growmoe_metrics())
    found = strategy.eval(stream.benchmark().test_stream)
    loads = [found[f"ExpertLoad/eval_phase/test_stream/1/Expert{id:03d}"] for id in range(3)]
    assert sum(loads) == pytest.approx(1)
    images = stream.test_images(stream.test_index[0])
    chosen = layer.eval().route(images.flatten(1)).assignment.dense().argmax(1)
    assert loads == pytest.approx((chosen.bincount(minlength=3) / len(chosen)).tolist())
    assert 0 <= found["Specialisation/eval_phase/test_stream/1"] <= 1
    assert not layer._forward_pre_hooks


def test_a_learner_that_tells_its_shares_is_asked_for_them():
    class ByRow(RidgeClassifier):
        def shares(self, images):
            label = images.mean(3)[:, 0, :6].argmax(1)
            return {k: (label == k).float() for k in range(6)}

    stream = rows(experiences=1)
    strategy = OnePass(
        learner=ByRow(Flat(), 6, ridge=1e-4, early=10),
        train_mb_size=10,
        eval_mb_size=50,
        evaluator=EvaluationPlugin(*growmoe_metrics(), loggers=[]),
    )
    benchmark = stream.benchmark()
    strategy.train(benchmark.train_stream[0])
    found = strategy.eval(benchmark.test_stream)
    assert found["Specialisation/eval_phase/test_stream"] == pytest.approx(1)
    assert found["ExpertLoad/eval_phase/test_stream/Expert002"] == pytest.approx(1 / 6)
