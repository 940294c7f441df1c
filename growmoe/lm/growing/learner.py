"""Teaches a `GrowingLM` a stream of text that changes without notice.

B sequences    S tokens of each
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any, cast

import torch
from torch import Tensor, nn

import growmoe
from growmoe import surgery
from growmoe.lineage import Event
from growmoe.lm.config import TrainError
from growmoe.lm.growing.model import GrowingLM
from growmoe.lm.growing.novelty import Suspicion
from growmoe.lm.growing.path import LowRankPath, Path, Usual
from growmoe.lm.growing.router import PathRouter
from growmoe.lm.optimize import parameter_groups

_SETTLED = 16  # batches of a path before its losses are judged
_MOST_WAITING = 32
_RETURNED = 0.25  # share of the waiting sequences that a path must explain best to be back


class StreamLearner:
    """Takes in batches of text, once each, and decides what learns them.

    One path is *active*; the others are frozen. Each batch is measured before it is learned, which
    costs nothing, since training needs the forward. While its loss is usual for the active path,
    that learns it. An unusual batch waits; when their sum of z-scores raises the alarm (see
    `Suspicion`), all paths are asked about the sequences that wait. If the loss of each one's best
    path is usual for that path, a text has returned: its path is thawed and goes on. Else a new
    path is born of the nearest and learns them. The old path is frozen either way, so it keeps
    what it knows to the last bit. If the alarm is not raised, the batches that waited are learned
    late. Nothing is learned twice.

    What it cannot see: a text that the active path finds no harder than its own. It is learned by
    that path, which then forgets its own text as any model does.

    The learning rate follows each path's own steps, since nobody knows how long a text will go on:
    a linear warm-up, then lr · sqrt(settle / step).

    Args:
        model: what learns; a new one begins with one path.
        lr: the highest learning rate.
        warmup: steps over which it rises.
        settle: steps at the highest rate, the warm-up included, before it falls.
        weight_decay: of matrices.
        clip: the largest norm of the gradient; infinity for no limit.
        max_paths: where it is reached, the nearest path learns what is novel.
        suspicion: how much it takes to raise the alarm.

    Attributes:
        active: the id of the path that learns.
        steps: batches taken in.
        waiting: unusual batches, not learned yet; at most 32.
        last_loss: of the last batch taken in, in nats per token, before anything learned it.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        model: GrowingLM,
        *,
        lr: float = 3e-3,
        warmup: int = 20,
        settle: int = 100,
        weight_decay: float = 0.1,
        clip: float = 1.0,
        max_paths: int = 16,
        suspicion: Suspicion | None = None,
    ) -> None:
        if not isinstance(model, GrowingLM):
            raise ValueError(f"model must be a GrowingLM, got {type(model).__name__}")
        for name, value in (("lr", lr), ("warmup", warmup), ("settle", settle), ("clip", clip)):
            if not value > 0 or (value == math.inf and name != "clip"):
                raise ValueError(f"{name} must be positive, got {value!r}")
        if not isinstance(max_paths, int) or max_paths < 1:
            raise ValueError(f"max_paths must be a positive integer, got {max_paths!r}")
        self.model, self.layer = model, model.layer
        self.lr, self.warmup, self.settle, self.clip = lr, warmup, max(settle, warmup), clip
        self.max_paths = max_paths
        self.suspicion = Suspicion() if suspicion is None else suspicion
        example = next(model.parameters())
        fused = example.device.type in ("cpu", "cuda") and example.is_floating_point()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, weight_decay), lr=lr, betas=(0.9, 0.95), fused=fused
        )
        self.active = max(e.id for e in model.paths)
        self.steps = 0
        self.waiting: list[Tensor] = []
        self.last_loss = math.nan

    def step(self, token_BS1: Tensor) -> list[Event]:
        """Take in a batch: int [B, S + 1], of which the first S tokens predict the last S.

        Returns:
            What was born, frozen and thawed.

        Raises:
            ValueError: not token ids of that shape.
            TrainError: the loss is not finite; nothing was learned.
        """
        if (
            not isinstance(token_BS1, Tensor)
            or token_BS1.dim() != 2
            or token_BS1.shape[1] < 4
            or token_BS1.is_floating_point()
        ):
            raise ValueError(
                f"a batch must be token ids [B, S + 1], S at least 3, got {token_BS1!r:.80}"
            )
        self.model.train()
        loss_N, loss = self._loss(token_BS1)
        value, usual = float(loss.detach()), self._usual(self.active)
        if not math.isfinite(value):
            raise TrainError(f"the loss is not finite at step {self.steps}: a lower lr may help")
        self.steps += 1
        self.last_loss = value
        z = usual.z(value) if usual.batches >= _SETTLED else 0.0
        full = self.max_paths == 1
        alarm = self.suspicion.observe(z) and not full
        if self.suspicion.unusual(z) and not full:
            self.waiting.append(token_BS1.detach())
            if alarm:
                return self._decide()
            if len(self.waiting) >= _MOST_WAITING:  # so weak a change is learned as it comes
                self.suspicion.clear()
                self._learn_waiting()
            return []
        usual.observe(value)
        self._learn(token_BS1, loss_N, loss)
        if not self.suspicion.sum and self.waiting:
            self._learn_waiting()
        return []

    # What is decided.

    def _decide(self) -> list[Event]:
        """Ask all paths about what waits: whose text is it?"""
        paths = self.model.paths
        loss_KN = torch.stack([self.losses(self.waiting, e.id) for e in paths]).double()
        # boundaries fall inside batches, so each sequence is judged by the path that explains it
        # best; in the unit of z, the spread of that path's loss per batch
        lowest_N, winner_N = loss_KN.min(0)
        usual = [self._usual(e.id) for e in paths]
        mean_K = torch.tensor([u.mean for u in usual], dtype=torch.float64)
        sd_K = torch.tensor([u.sd for u in usual], dtype=torch.float64)
        z = float(((lowest_N - mean_K[winner_N]) / sd_K[winner_N]).mean())
        nearest = paths[int(loss_KN.mean(1).argmin())].id
        signals = {
            "loss": float(lowest_N.mean()),
            "z": z,
            "suspicion": self.suspicion.sum,
            "batches": float(len(self.waiting)),
        }
        told = f"loss {signals['loss']:.3g} of {len(self.waiting)} batches"
        events: list[Event] = []
        if not self.suspicion.unusual(z):
            share = {e.id: float((winner_N == k).double().mean()) for k, e in enumerate(paths)}
            del share[self.active]  # it has raised the alarm
            best = max(share, key=lambda id: share[id], default=self.active)
            if share.get(best, 0.0) >= _RETURNED:  # else these were odd batches of its own text
                reason = f"its text has returned: {told} is usual, z {z:.1f}"
                events += self._hand_over(best, reason, signals)
        elif len(paths) < self.max_paths:
            reason = f"novel text: {told}, z {z:.1f} > {self.suspicion.slack}"
            born = surgery.spawn(
                self.layer,
                nearest,
                self.optimizer,
                noise=0.0,
                admitted=True,
                step=self.steps,
                reason=reason,
                signals=signals,
            )
            child = cast(int, born.child)
            # a change of an ancestor has parameters that its parent has not
            self.layer.experts[child].body.requires_grad_(True)
            events += [born, *self._hand_over(child, "", signals)]
        elif nearest != self.active:
            reason = f"nearest to novel text, with {self.max_paths} paths: {told}"
            events += self._hand_over(nearest, reason, signals)
        self.suspicion.clear()
        self._learn_waiting()
        return events

    def _hand_over(self, id: int, reason: str, signals: dict[str, float]) -> list[Event]:
        """Another path is active from now on."""
        events = []
        if not self.layer.experts[self.active].frozen:
            ended = f"its text has ended: path {id} takes over"
            events.append(
                surgery.freeze(
                    self.layer, [self.active], step=self.steps, reason=ended, signals=signals
                )
            )
        self.active = id
        if self.layer.experts[id].frozen and not self._is_ancestor(id):
            events.append(
                surgery.thaw(
                    self.layer,
                    [id],
                    self.optimizer,
                    step=self.steps,
                    reason=reason,
                    signals=signals,
                )
            )
        return events

    def _is_ancestor(self, id: int) -> bool:
        """Whether other paths are changes of this one, so that it must stand still."""
        body = self.layer.experts[id].body
        return any(
            isinstance(e.body, LowRankPath) and e.body.base is body for e in self.model.paths
        )

    # What is learned.

    def _learn_waiting(self) -> None:
        waiting, self.waiting = self.waiting, []
        for token_BS1 in waiting:
            loss_N, loss = self._loss(token_BS1)
            self._usual(self.active).observe(float(loss.detach()))
            self._learn(token_BS1, loss_N, loss)

    def _loss(self, token_BS1: Tensor) -> tuple[Tensor, Tensor]:
        """The active path's loss of each token and its mean, with its graph."""
        logits_BSV = self.model.path_logits(token_BS1[:, :-1], self.active)
        loss_N = nn.functional.cross_entropy(
            logits_BSV.flatten(0, 1).float(), token_BS1[:, 1:].flatten().long(), reduction="none"
        )
        return loss_N, loss_N.mean()

    def _learn(self, token_BS1: Tensor, loss_N: Tensor, loss: Tensor) -> None:
        experts = self.model.paths
        self.layer.recorder.observe_loss(experts, loss_N)
        expert = self.layer.experts[self.active]
        if expert.frozen:
            return  # an ancestor, whose text has returned
        usual = self._usual(self.active)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(usual.steps)
        loss.backward()
        nn.utils.clip_grad_norm_(expert.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        usual.count_step()
        cast(PathRouter, self.layer.router).learn(expert, token_BS1)

    def learning_rate(self, step: int) -> float:
        """The rate of a path's step, counted from 0."""
        return self.lr * min(1.0, (step + 1) / self.warmup, (self.settle / (step + 1)) ** 0.5)

    @torch.no_grad()
    def losses(self, batches: Sequence[Tensor], path: int) -> Tensor:
        """A path's mean loss on each sequence of the batches, in nats per token: float [N].

        Nothing is recorded.
        """
        self.model.eval()
        try:
            found = []
            for token_BS1 in batches:
                logits_BSV = self.model.path_logits(token_BS1[:, :-1], path)
                target_BS = token_BS1[:, 1:].long()
                loss_BS = nn.functional.cross_entropy(
                    logits_BSV.float().transpose(1, 2), target_BS, reduction="none"
                )
                found.append(loss_BS.mean(1))
            return torch.cat(found)
        finally:
            self.model.train()

    def _usual(self, id: int) -> Usual:
        return cast(Path | LowRankPath, self.layer.experts[id].body).usual

    # What survives a stop.

    def state_dict(self) -> dict[str, Any]:
        """What goes on needs besides model and optimizer: plain values and tensors."""
        return {
            "active": self.active,
            "steps": self.steps,
            "suspicion": self.suspicion.sum,
            "waiting": list(self.waiting),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.active, self.steps = state["active"], state["steps"]
        self.suspicion.sum, self.waiting = state["suspicion"], list(state["waiting"])

    def save(self, path: str | FilePath) -> None:
        """Write model, optimizer and this learner's state into one file (see `growmoe.save`)."""
        growmoe.save(path, self.model, self.optimizer, extra=self.state_dict())

    def load(self, path: str | FilePath) -> None:
        """Go on from what `save` wrote; the model may hold any number of paths.

        Raises:
            ValueError, FileNotFoundError: see `growmoe.load`; nothing has changed then.
        """
        state = growmoe.load(path, self.model, self.optimizer, experts=self.model.kinds())
        self.load_state_dict(state)
