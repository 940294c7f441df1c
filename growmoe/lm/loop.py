"""The steps of a run, with what must survive a stop between two of them."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import growmoe
from growmoe.lineage import Event
from growmoe.lm.config import TrainConfig, TrainError
from growmoe.lm.data import batch, phase_weights
from growmoe.lm.domains import Domain, Split
from growmoe.lm.evaluate import autocast, context, cross_entropy, evaluate, expert_use
from growmoe.lm.growing.learner import StreamLearner
from growmoe.lm.growing.model import GrowingLM
from growmoe.lm.optimize import build_optimizer, learning_rate
from growmoe.lm.routing import RoutingCounts
from growmoe.lm.run import RunFolder
from growmoe.rules import Rule


class Stopped(KeyboardInterrupt):
    """An interrupt that left a checkpoint, if the run has a folder."""


class Loop:
    """The state of a run between its steps.

    Attributes:
        step: how many are done.
        seconds: spent on them, in all calls.
        history: the lines of the log.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        domains: Mapping[str, Domain],
        rules: Sequence[Rule],
        device: torch.device,
        folder: RunFolder | None = None,
        progress: Callable[[float, str], None] = lambda fraction, text: None,
        say: Callable[[str], None] = lambda text: None,
        listen: Callable[[Mapping[str, Any]], None] = lambda line: None,
        happened: Callable[[Event], None] | None = None,
    ) -> None:
        self.config, self.model, self.domains = config, model, domains
        self.device, self.folder = device, folder
        self.progress, self.say, self.listen = progress, say, listen
        self.happened = (lambda event: say(str(event))) if happened is None else happened
        torch.manual_seed(config.seed)
        self.learner = None
        self.organizer = None
        if isinstance(model, GrowingLM):
            self.learner = StreamLearner(
                model,
                lr=config.lr,
                warmup=config.warmup or 20,
                weight_decay=config.weight_decay,
                clip=config.clip or math.inf,
                max_paths=config.max_experts,
            )
        learner = self.learner
        self.optimizer = build_optimizer(model, config) if learner is None else learner.optimizer
        if config.grow:
            try:
                self.organizer = growmoe.Organizer(
                    model,
                    self.optimizer,
                    rules,
                    max_experts=config.max_experts,
                    every=config.organize_every,
                )
            except ValueError as error:
                raise TrainError(str(error)) from error
        else:
            for name, layer in growmoe.moe_layers(model).items():
                layer.name = name
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self._loss = torch.zeros((), device=device)  # summed since the last line of the log
        self._losses = 0
        self._seconds = 0.0

    def begin(self) -> None:
        """Load the checkpoint, if the folder has one, and forget the log after it."""
        if self.folder is None:
            return
        if self.folder.checkpoint.exists():
            try:
                kinds = self.model.kinds() if isinstance(self.model, GrowingLM) else None
                extra = growmoe.load(
                    self.folder.checkpoint,
                    self.model,
                    self.optimizer,
                    self.organizer,
                    experts=kinds,
                )
            except ValueError as error:
                raise TrainError(f"{error}; delete it to begin anew") from error
            self.step, self.seconds = extra["step"], extra["seconds"]
            if self.learner is not None:
                self.learner.load_state_dict(extra["learner"])
            self._loss = extra["loss"].to(self.device)
            self._losses, self._seconds = extra["losses"], extra["loss_seconds"]
            if self.step < self.config.steps:
                self.say(f"goes on after step {self.step} of {self.config.steps}")
        self.history = self.folder.rewind(self.step if self.folder.checkpoint.exists() else -1)

    def train(self) -> None:
        config = self.config
        begin = time.monotonic()
        if self.step == 0 and not self.history:
            self.evaluate()
        self.model.train()
        with _interrupts() as interrupted:
            while self.step < config.steps:
                self.one_step()
                last = self.step == config.steps
                late = 0 < config.time_limit <= time.monotonic() - begin
                if self.step % config.log_every == 0 or last:
                    self.log()
                if self.step % config.evaluation_interval == 0 or last:
                    self.evaluate()
                if self.step % config.save_interval == 0 or last or late or interrupted():
                    self.save()
                if interrupted():
                    raise Stopped
                if late and not last:
                    self.say(f"stopped after {config.time_limit:g} s, at step {self.step}")
                    return

    def one_step(self) -> None:
        config, optimizer = self.config, self.optimizer
        begin = time.perf_counter()
        weights = phase_weights(
            config.curriculum, config.weights, len(self.domains), self.step, config.steps
        )
        x_BS, y_BS, domain_B = (
            tensor.to(self.device, non_blocking=True)
            for tensor in batch(
                self.domains,
                weights,
                self.step,
                config.seed,
                config.batch_size,
                config.sequence_length,
            )
        )
        if self.learner is not None:
            for event in self.learner.step(torch.cat([x_BS[:, :1], y_BS], 1)):
                self.happened(event)
            self._count(self.learner.last_loss, begin)
            return
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        with autocast(self.device, config.precision):
            logits_BSV = self.model(x_BS, **context(self.model, domain_B))
            loss_T = cross_entropy(logits_BSV, y_BS)
            loss = loss_T.mean() + growmoe.aux_loss(self.model)
        loss.backward()
        norm = None
        if config.clip:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self._refuse_divergence(loss, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.organizer is not None:
            for event in self.organizer.step(loss_T.detach()):
                if event.accepted:
                    self.happened(event)
        self._count(loss_T.detach().mean(), begin)

    def _count(self, loss: Tensor | float, begin: float) -> None:
        self.step += 1
        self._loss += loss
        self._losses += 1
        spent = time.perf_counter() - begin
        self.seconds += spent
        self._seconds += spent

    def _refuse_divergence(self, loss: Tensor, norm: Tensor | None) -> None:
        if self.device.type != "cpu":
            return  # looked at in `log`: an accelerator would wait here
        if not bool(loss.isfinite()) or (norm is not None and not bool(norm.isfinite())):
            raise self._diverged()

    def _diverged(self) -> TrainError:
        return TrainError(
            f"the loss or its gradient is not finite at step {self.step}: a lower lr "
            f"(now {self.config.lr:g}) or a longer warmup may help"
        )

    def log(self) -> None:
        config = self.config
        loss = float(self._loss) / self._losses
        if loss != loss:
            raise self._diverged()
        rate = self._losses * config.batch_size * config.sequence_length / self._seconds
        use = expert_use(self.model)
        self._write(
            {
                "kind": "train",
                "step": self.step,
                "loss": loss,
                "lr": self.optimizer.param_groups[0]["lr"],
                "tokens_per_second": round(rate),
                **use,
            }
        )
        self._loss.zero_()
        self._losses, self._seconds = 0, 0.0
        self.progress(
            self.step / config.steps,
            f"step {self.step:,} of {config.steps:,} · {rate:,.0f} tokens/s",
        )

    def evaluate(self) -> None:
        config = self.config
        counts = RoutingCounts(self.model)
        bits = self.bits("validation", counts)
        if self.folder is not None:
            self.folder.write_routing(counts.maps(), self.step)
        use = expert_use(self.model)
        self._write({"kind": "evaluation", "step": self.step, "bits_per_byte": bits, **use})
        uneven = max(use["imbalance"].values(), default=None)
        self.say(
            f"step {self.step}/{config.steps}: "
            + ", ".join(f"{name} {value:.3f}" for name, value in bits.items())
            + " bits per byte"
            + (f", {sum(use['experts'].values())} experts" if use["experts"] else "")
            + (f", largest load {uneven:.2f} × mean" if uneven and self.step else "")
        )

    def bits(self, split: Split, counts: RoutingCounts | None = None) -> dict[str, float]:
        config = self.config
        return evaluate(
            self.model,
            self.domains,
            split,
            config.windows * (4 if split == "test" else 1),
            sequence_length=config.sequence_length,
            batch_size=config.batch_size,
            precision=config.precision,
            counts=counts,
        )

    def _write(self, line: dict[str, Any]) -> None:
        self.history.append(line)
        if self.folder is not None:
            self.folder.log(line)
        self.listen(line)

    def save(self) -> None:
        if self.folder is None:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "loss": self._loss,
            "losses": self._losses,
            "loss_seconds": self._seconds,
            "learner": None if self.learner is None else self.learner.state_dict(),
        }
        growmoe.save(
            self.folder.checkpoint, self.model, self.optimizer, self.organizer, extra=state
        )
        self.folder.write_lineage(self.model)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came; the first waits until it is asked for, the second does not.

    Only the main thread may handle signals; elsewhere they do what they did.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
