"""Teaches a `GrowingLM` a stream of text that changes without notice.

B sequences    S tokens of each
"""

from __future__ import annotations

import math
import statistics
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

_SETTLED = 16  # batches of a path before others are compared with them
_MOST_WAITING = 32
_RETURNED = 0.25  # share of the waiting sequences that a path must explain best to be back


class StreamLearner:
    """Takes in batches of text, once each, and decides what learns them.

    One path is *active*; the others are frozen. Before a batch is learned, its trigrams are
    compared with all that the active path has learned (`PathRouter.distance`). If it is as far from
    them as usual, the active path learns it. An unusual batch waits; when their sum of z-scores
    raises the alarm (see `Suspicion`), each sequence that waits is given to the path that knows its
    trigrams best. If the batches are about as far as usual from the paths so mixed, a text has
    returned: its path is thawed and goes on. Else a new path is born, of the one with the lowest
    loss, and learns them. The old path is frozen either way, so it keeps what it knows to the last
    bit. If the alarm is not raised, the batches that waited are learned late. Nothing is learned
    twice.

    What it cannot see: a text of the same trigrams, a part of a mixture that it knows, a change so
    slow that each batch is as usual, or one within about the first 80 batches of a path, before it
    is known what is usual. The active path learns it and forgets as any model does.
    Batches should be of one size, since a smaller one is less like any text.

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
        last_loss: of the last batch learned, in nats per token, before it was.

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
        self.router = cast(PathRouter, model.layer.router)
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
            or not len(token_BS1)
            or token_BS1.shape[1] < 4
            or token_BS1.is_floating_point()
        ):
            raise ValueError(
                f"a batch must be token ids [B, S + 1], S at least 3: got {token_BS1!r:.80}"
            )
        if int(token_BS1.min()) < 0 or int(token_BS1.max()) >= self.model.vocab_size:
            raise ValueError(f"token ids must lie below vocab_size={self.model.vocab_size}")
        self.model.train()
        usual, z = self._usual(self.active), 0.0
        if usual.batches >= _SETTLED and self.max_paths > 1:
            z = (self._distance(token_BS1) - usual.mean) / usual.sd
        unusual = self.suspicion.unusual(z)
        if not unusual:
            self._learn(token_BS1)  # may raise, so comes first
        self.steps += 1
        alarm = self.suspicion.observe(z)
        if unusual:
            self.waiting.append(token_BS1.detach())
            if alarm:
                return self._decide()
            if len(self.waiting) >= _MOST_WAITING:  # so weak a change is learned as it comes
                self.suspicion.clear()
        if not self.suspicion.sum:
            self._learn_waiting()
        return []

    # What is decided.

    def _decide(self) -> list[Event]:
        """Whose text is it that waits?"""
        paths, (z, share) = self.model.paths, self._explained()
        signals = {"z": z, "suspicion": self.suspicion.sum, "batches": float(len(self.waiting))}
        told = f"the trigrams of {len(self.waiting)} batches"
        events: list[Event] = []
        if z <= self.suspicion.novel:
            del share[self.active]  # it has raised the alarm
            best = max(share, key=lambda id: share[id], default=self.active)
            if share.get(best, 0.0) >= _RETURNED:  # else these were odd batches of its own text
                reason = f"its text has returned: {told} are known, z {z:.1f}"
                events += self._hand_over(best, reason, signals)
        else:
            losses = {e.id: float(self.losses(self.waiting, e.id).mean()) for e in paths}
            nearest = min(losses, key=lambda id: losses[id])
            signals["loss"] = losses[nearest]
            if len(paths) < self.max_paths:
                reason = f"novel text: {told} are unknown, z {z:.1f} > {self.suspicion.novel}"
                events += self._bear(nearest, reason, signals)
            elif nearest != self.active:
                reason = f"nearest to novel text, with {self.max_paths} paths: {told} are unknown"
                events += self._hand_over(nearest, reason, signals)
        self.suspicion.clear()
        self._learn_waiting()
        return events

    def _explained(self) -> tuple[float, dict[int, float]]:
        """How far what waits lies above the usual of the paths that know it best; their shares."""
        paths = self.model.paths
        usual = [self._usual(e.id) for e in paths]
        mean_K = torch.tensor([u.mean for u in usual], dtype=torch.float64)
        sd_K = torch.tensor([u.sd for u in usual], dtype=torch.float64)
        shares, apart = [], []
        for token_BS1 in self.waiting:
            # boundaries fall inside batches, so each sequence is given to a path of its own
            winner_B = self.router.scores(token_BS1, paths).argmax(1).cpu()
            share_K = winner_B.bincount(minlength=len(paths)).double() / len(winner_B)
            distance = self.router.distance(token_BS1, paths, share_K)
            apart.append(float((distance - share_K @ mean_K) / (share_K @ sd_K)))
            shares.append(share_K)
        mean_share = torch.stack(shares).mean(0).tolist()
        return statistics.mean(apart), {
            e.id: share for e, share in zip(paths, mean_share, strict=True)
        }

    def _bear(self, parent: int, reason: str, signals: dict[str, float]) -> list[Event]:
        """A new path is active from now on."""
        at: dict[str, Any] = {"step": self.steps, "reason": reason, "signals": signals}
        born = surgery.spawn(self.layer, parent, self.optimizer, noise=0.0, admitted=True, **at)
        child = cast(int, born.child)
        # a change of an ancestor has parameters that its parent has not
        self.layer.experts[child].body.requires_grad_(True)
        return [born, *self._hand_over(child, "", signals)]

    def _hand_over(self, id: int, reason: str, signals: dict[str, float]) -> list[Event]:
        """Another path is active from now on."""
        events, at = [], cast(dict[str, Any], {"step": self.steps, "signals": signals})
        if not self.layer.experts[self.active].frozen:
            ended = f"its text has ended: path {id} takes over"
            events.append(surgery.freeze(self.layer, [self.active], reason=ended, **at))
        self.active = id
        if self.layer.experts[id].frozen and not self._is_ancestor(id):
            events.append(surgery.thaw(self.layer, [id], self.optimizer, reason=reason, **at))
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
            self._learn(token_BS1)

    def _learn(self, token_BS1: Tensor) -> None:
        """The active path takes a step, unless other paths are changes of it."""
        expert, usual = self.layer.experts[self.active], self._usual(self.active)
        logits_BSV = self.model.path_logits(token_BS1[:, :-1], self.active)
        loss_N = nn.functional.cross_entropy(
            logits_BSV.flatten(0, 1).float(), token_BS1[:, 1:].flatten().long(), reduction="none"
        )
        loss = loss_N.mean()
        if not math.isfinite(float(loss.detach())):
            raise TrainError(f"the loss is not finite at step {self.steps}: a lower lr may help")
        self.last_loss = float(loss.detach())
        usual.observe(self._distance(token_BS1))
        self.layer.recorder.observe_loss(self.model.paths, loss_N)
        if expert.frozen:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(usual.steps)
        loss.backward()
        nn.utils.clip_grad_norm_(expert.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        usual.count_step()
        self.router.learn(expert, token_BS1)

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

    def _distance(self, token_BS1: Tensor) -> float:
        active = self.layer.experts[self.active]
        return self.router.distance(token_BS1, [active], torch.ones(1))

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
