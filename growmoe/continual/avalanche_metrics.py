"""Metrics for any Avalanche strategy that Avalanche itself lacks, in its own protocol.

Give them to an evaluator beside Avalanche's::

    evaluator = EvaluationPlugin(accuracy_metrics(stream=True), *growmoe_metrics())
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.continual import metrics, require
from growmoe.continual.record import answers, mixture_shares
from growmoe.moe import MoE, moe_layers

require("avalanche.evaluation")

from avalanche.evaluation import PluginMetric  # noqa: E402
from avalanche.evaluation.metric_results import MetricValue  # noqa: E402
from avalanche.evaluation.metric_utils import phase_and_task, stream_type  # noqa: E402


def growmoe_metrics() -> list[PluginMetric]:
    """All metrics of this module."""
    return [AnytimeAccuracy(), PrequentialAccuracy(), ExpertLoad(), Specialisation()]


class _Metric(PluginMetric[float]):
    """A metric whose `result` is a number or several by name, emitted when a subclass says."""

    def result(self) -> Any:
        raise TypeError(f"{type(self).__name__} must define result")

    def reset(self) -> None:
        """Nothing is reset between epochs and experiences: these metrics are of the stream."""

    def __str__(self) -> str:
        return type(self).__name__

    def emit(self, strategy: Any, where: str) -> list[MetricValue]:
        """The result as Avalanche logs it."""
        found = self.result()
        named = found if isinstance(found, Mapping) else {"": found}
        step = strategy.clock.train_iterations
        return [
            MetricValue(self, "/".join(filter(None, (str(self), where, name))), value, step)
            for name, value in named.items()
            if value is not None
        ]

    def evaluated(self, strategy: Any) -> list[MetricValue]:
        """The result, at the end of an evaluation."""
        phase, _ = phase_and_task(strategy)
        return self.emit(strategy, f"{phase}_phase/{stream_type(strategy.experience)}_stream")


class AnytimeAccuracy(_Metric):
    """The area under the curve of accuracy on the evaluated stream over training.

    A point for every evaluation, weighted by the iterations since the one before (Caccia et al.
    2022, arXiv:2203.13307). Evaluate often: `eval_every` with `peval_mode="iteration"`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.curve: list[list[float]] = []
        self._right = self._total = 0

    def result(self) -> float | None:
        return metrics.curve_mean(self.curve) if self.curve else None

    def before_eval(self, strategy: Any) -> None:
        self._right = self._total = 0

    def after_eval_iteration(self, strategy: Any) -> None:
        self._right += int((strategy.mb_output.argmax(1) == strategy.mb_y).sum())
        self._total += len(strategy.mb_y)

    def after_eval(self, strategy: Any) -> list[MetricValue]:
        now = strategy.clock.train_iterations
        if now and self._total:
            if self.curve and self.curve[-1][0] == now:
                self.curve.pop()
            self.curve.append([float(now), self._right / self._total])
        return self.evaluated(strategy)


class PrequentialAccuracy(_Metric):
    """Accuracy on every mini-batch before it is learned, over the whole stream so far.

    Gama et al. 2013 (Machine Learning 90:317). Of a network without dropout, in one epoch of one
    experience, it is Avalanche's `RunningEpochAccuracy`; unlike that, it also works for a strategy
    that predicts nothing while it learns. Only the first epoch of each experience counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self._right = self._total = 0

    def result(self) -> float | None:
        return self._right / self._total if self._total else None

    def before_training_iteration(self, strategy: Any) -> None:
        if strategy.clock.train_exp_epochs:
            return
        self._total += len(strategy.mb_y)
        learner = getattr(strategy, "learner", strategy.model)
        if not answers(learner):
            return  # it waits, and what it does not answer is wrong
        training = strategy.model.training
        strategy.model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            scores = strategy.forward()
        strategy.model.train(training)
        self._right += int((scores.argmax(1) == strategy.mb_y).sum())

    def after_training_iteration(self, strategy: Any) -> list[MetricValue]:
        return self.emit(strategy, "train_phase/train_stream")


class _OfExperts(_Metric):
    """Counts evaluated examples by layer and expert, and by class."""

    def __init__(self) -> None:
        super().__init__()
        # of a layer: {expert id: {class: examples}}
        self.counts: dict[str, dict[Any, dict[int, float]]] = {}
        self._shares: dict[str, Mapping[Any, Tensor]] = {}
        self._hooks: list[Any] = []

    def before_eval(self, strategy: Any) -> None:
        self.counts = {}
        if isinstance(strategy.model, nn.Module) and not _own_shares(strategy):
            for name, layer in moe_layers(strategy.model).items():

                def look(layer: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                    assert isinstance(layer, MoE)
                    x = inputs[0]
                    self._shares[name] = mixture_shares(layer, x.reshape(-1, x.shape[-1]))

                self._hooks.append(layer.register_forward_pre_hook(look))

    def after_eval_iteration(self, strategy: Any) -> None:
        if own := _own_shares(strategy):
            self._shares = {"": own(strategy.mb_x) or {}}
        for name, shares in self._shares.items():
            table = self.counts.setdefault(name, {})
            for id, share in shares.items():
                labels = strategy.mb_y.repeat_interleave(len(share) // len(strategy.mb_y))
                kinds = table.setdefault(id, {})
                for kind in labels.unique().tolist():
                    kinds[kind] = kinds.get(kind, 0.0) + float(share[labels == kind].sum())
        self._shares = {}

    def after_eval(self, strategy: Any) -> list[MetricValue]:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        return self.evaluated(strategy)


def _own_shares(strategy: Any) -> Any:
    return getattr(getattr(strategy, "learner", None), "shares", None)


class ExpertLoad(_OfExperts):
    """The share of the evaluated examples that each expert of each `MoE` layer takes."""

    def result(self) -> dict[str, float]:
        loads = {}
        for name, table in self.counts.items():
            total = sum(sum(kinds.values()) for kinds in table.values())
            for id, kinds in table.items():
                label = "/".join(filter(None, (name, f"Expert{id:03d}")))
                loads[label] = sum(kinds.values()) / max(total, 1e-12)
        return loads


class Specialisation(_OfExperts):
    """What the expert says of the class of the evaluated examples, from 0 to 1, for each layer.

    Mutual information over entropy: `growmoe.continual.mutual_information`.
    """

    def result(self) -> dict[str, float]:
        found = {}
        for name, table in self.counts.items():
            classes = sorted({kind for kinds in table.values() for kind in kinds})
            rows = [[kinds.get(kind, 0.0) for kind in classes] for kinds in table.values()]
            if len(classes) > 1 and any(map(any, rows)):
                found[name] = metrics.mutual_information(rows)
        return found
