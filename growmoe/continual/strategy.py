"""growmoe in Avalanche: a strategy that grows, and a plugin that lets any other strategy grow."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from growmoe.continual import require
from growmoe.continual.classifier import GrowingClassifier
from growmoe.continual.load_history import LoadHistory
from growmoe.lineage import Event
from growmoe.organizer import Organizer

require("avalanche.training.templates")

from avalanche.evaluation.metrics import accuracy_metrics  # noqa: E402
from avalanche.logging import InteractiveLogger  # noqa: E402
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin  # noqa: E402
from avalanche.training.templates import SupervisedTemplate  # noqa: E402


class Learner(Protocol):
    """Learns a stream in one pass, without gradients."""

    def learn(self, images: Tensor, labels: Tensor) -> Any: ...

    def __call__(self, images: Tensor) -> Tensor: ...


def _evaluator() -> EvaluationPlugin:
    return EvaluationPlugin(
        accuracy_metrics(experience=True, stream=True), loggers=[InteractiveLogger()]
    )


class OnePass(SupervisedTemplate):
    """An Avalanche strategy around a learner that needs one pass and no gradients.

    Task labels and the boundaries of experiences do not reach the learner. Nothing is predicted
    while it learns, so an evaluator must ask for metrics of the evaluation alone; the default one
    does.

    Args:
        learner: takes every mini-batch once.
        kwargs: as for any Avalanche strategy (`train_mb_size`, `evaluator`, `plugins`, …).
    """

    def __init__(self, *, learner: Learner, **kwargs: Any) -> None:
        kwargs.setdefault("evaluator", _evaluator)
        model = learner if isinstance(learner, nn.Module) else nn.Identity()
        super().__init__(model=model, optimizer=None, criterion=nn.CrossEntropyLoss(), **kwargs)
        self.learner = learner

    def make_optimizer(self, **kwargs: Any) -> None:
        """Nothing here is trained by gradients."""

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Nothing here is trained by gradients."""

    def model_adaptation(self, model: nn.Module | None = None) -> nn.Module:
        """The learner adapts by itself."""
        return self.model if model is None else model

    def training_epoch(self, **kwargs: Any) -> None:
        """Learn every mini-batch once."""
        for self.mbatch in self.dataloader:  # noqa: B020 - Avalanche's own idiom
            self._unpack_minibatch()
            self._before_training_iteration(**kwargs)
            self.take_in(self.learner.learn(self.mb_x, self.mb_y))
            self._after_training_iteration(**kwargs)

    def take_in(self, result: Any) -> None:
        """What `learn` returned; a subclass may keep it."""

    def forward(self) -> Tensor:
        """Scores of the current mini-batch, [N, C]."""
        return self.learner(self.mb_x)


class GrowMoE(OnePass):
    """Continual learning by a growing mixture of experts, as an Avalanche strategy like any other.

    One pass, no replay, no task labels, no boundaries::

        model = GrowingClassifier(default_features((1, 28, 28)), num_classes=10)
        strategy = GrowMoE(classifier=model, train_mb_size=64)
        for experience in benchmark.train_stream:
            strategy.train(experience)
            strategy.eval(benchmark.test_stream)

    Args:
        classifier: grows as it learns.
        kwargs: as for any Avalanche strategy.

    Attributes:
        events: all births, mergers, freezes and deaths so far.
    """

    def __init__(self, *, classifier: GrowingClassifier, **kwargs: Any) -> None:
        super().__init__(learner=classifier, **kwargs)
        self.classifier = classifier
        self.events: list[Event] = []
        self._load = LoadHistory()

    def take_in(self, result: list[Event]) -> None:
        """Keep the events, and the load now and then."""
        self.events += result
        self._load.note(self.classifier)

    @property
    def load_history(self) -> list[dict[str, Any]]:
        """Each expert's share of the inputs (`LoadHistory.entries`)."""
        return self._load.entries


class OrganizerPlugin(SupervisedPlugin):
    """Lets a model with `MoE` layers organize itself under any Avalanche strategy::

        model = nn.Sequential(nn.Flatten(), growmoe.MoE(784, d_out=64), nn.ReLU(), head)
        organizer = growmoe.Organizer(model, optimizer, rules=[growmoe.rules.SpawnOnNovelty()])
        strategy = Naive(model=model, optimizer=optimizer, plugins=[OrganizerPlugin(organizer)])

    Avalanche finds parameters by name when an experience begins; the plugin tells it of those that
    were born or died meanwhile, so that none is added twice or reset.

    Args:
        organizer: of the strategy's model and optimizer.

    Attributes:
        events: what the organizer did and refused so far.
    """

    def __init__(self, organizer: Organizer) -> None:
        super().__init__()
        self.organizer = organizer
        self.events: list[Event] = []

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Take in the loss of the mini-batch; decide if it is time to."""
        events = self.organizer.step(strategy.loss)
        self.events += events
        if any(event.accepted for event in events):
            strategy.optimized_param_id = dict(strategy.model.named_parameters())
