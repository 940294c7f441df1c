"""The organizer as a callback of Lightning's Trainer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from growmoe import optim
from growmoe.experts.expert import Expert
from growmoe.lineage import Event
from growmoe.live import refuse_parallel_wrappers
from growmoe.moe import moe_layers
from growmoe.organizer import Organizer
from growmoe.rules.rule import Rule

try:
    from pytorch_lightning import Callback
    from pytorch_lightning.strategies import ParallelStrategy
except ImportError:
    try:  # the same under its newer name
        from lightning.pytorch import Callback  # type: ignore[no-redef]
        from lightning.pytorch.strategies import ParallelStrategy  # type: ignore[no-redef]
    except ImportError as error:
        raise ImportError(
            "growmoe.integrations.torch_lightning needs Lightning: pip install 'growmoe[lightning]'"
        ) from error

log = logging.getLogger("growmoe")

KEY = "growmoe"


class OrganizerCallback(Callback):
    """Lets a model organize itself while Lightning's `Trainer` trains it.

        trainer = Trainer(callbacks=[OrganizerCallback([SpawnOnNovelty()], every=50)])

    The organizer follows every optimizer of the module, under automatic and manual optimization
    alike, and takes in the loss that `training_step` returned for every batch. Add
    `growmoe.aux_loss(self)` to the loss in `training_step`.

    Checkpoints of the trainer can be resumed with `trainer.fit(module, ckpt_path=…)`, the module
    being as it was at first: structure, optimizer and organizer take the saved form. A checkpoint
    of weights alone brings the structure, too.

    Args:
        rules, options: as for `growmoe.Organizer`.

    Attributes:
        organizer: from the start of fitting on.
        events: all that was done or refused in this run.

    Raises:
        ValueError: when fitting is set up: several processes or a strategy that wraps the module
            for them, an optimizer that cannot follow, no MoE layer.
    """

    def __init__(self, rules: Sequence[Rule] = (), **options: Any) -> None:
        self.rules, self.options = list(rules), options
        self.organizer: Organizer | None = None
        self.events: list[Event] = []
        self._saved: dict[str, Any] | None = None
        self._seen: dict[int, WeakKeyDictionary[Expert, int]] = {}

    # When fitting begins.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.world_size > 1 or isinstance(trainer.strategy, ParallelStrategy):
            raise ValueError(
                f"OrganizerCallback: {type(trainer.strategy).__name__} with {trainer.world_size} "
                "processes: structure cannot change under wrappers that keep their own list of the "
                "parameters; train in one process on one device"
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        layers = moe_layers(pl_module)
        for layer in layers.values():
            refuse_parallel_wrappers(layer)
        optimizers = optim.as_optimizers(trainer.optimizers)
        before, self._seen = self.organizer, {}
        self.organizer = Organizer(pl_module, optimizers, self.rules, **self.options)
        if self._saved is not None:
            self.organizer.load_state_dict(self._saved["organizer"])
            _order(optimizers, self._saved["parameters"], dict(pl_module.named_parameters()))
            self._saved = None
        elif before is not None and set(before.layers) == set(layers):  # a second call of fit
            self.organizer.load_state_dict(before.state_dict())

    # Each step.

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        # here the gradients are there; before the optimizer's own hooks Lightning's closure has
        # not run yet
        seen = self._seen.setdefault(id(optimizer), WeakKeyDictionary())
        for layer in moe_layers(pl_module).values():
            optim._restore_none(layer, seen)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.organizer is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and loss.dim() == 0:
            loss = loss.detach() * trainer.accumulate_grad_batches  # which divided it
        else:
            loss = None
        events = self.organizer.step(loss)
        if not events:
            return
        self.events += events
        for event in events:
            log.info("%s", event)
        for name, layer in self.organizer.layers.items():
            pl_module.log(f"growmoe/{name}/experts", float(len(layer.experts)))
        for act in {event.act for event in events if event.accepted}:
            count = sum(event.accepted and event.act == act for event in events)
            pl_module.log(f"growmoe/{act}", float(count))

    # Checkpoints. Lightning's own restores the structure, since it is part of the state dict.

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.organizer is None:
            return
        names = {id(p): name for name, p in pl_module.named_parameters()}
        checkpoint[KEY] = {
            "organizer": self.organizer.state_dict(),
            "parameters": [
                [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
                for optimizer in self.organizer.optimizers
            ],
        }

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get(KEY)


def _order(
    optimizers: Sequence[torch.optim.Optimizer],
    saved: list[list[list[str]]],
    parameters: dict[str, torch.nn.Parameter],
) -> None:
    """Bring the parameters into the order of the saved optimizers, whose state is by position.

    Raises:
        ValueError: other numbers of optimizers or groups, or a name that the module has not.
    """
    shapes = [len(optimizer.param_groups) for optimizer in optimizers]
    if shapes != [len(groups) for groups in saved]:
        raise ValueError(
            f"OrganizerCallback: the checkpoint is of optimizers with "
            f"{[len(groups) for groups in saved]} parameter groups, these have {shapes}"
        )
    for name in (name for groups in saved for group in groups for name in group):
        if name not in parameters:
            raise ValueError(
                f"OrganizerCallback: the checkpoint's optimizer trains {name!r}, which the module "
                "has not"
            )
    for optimizer, groups in zip(optimizers, saved, strict=True):
        for group, ordered in zip(optimizer.param_groups, groups, strict=True):
            group["params"][:] = [parameters[name] for name in ordered]
