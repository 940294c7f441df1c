"""Trains a language model with its experts shared out among workers, which may die."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

import growmoe
from growmoe import distributed
from growmoe.lm.config import TrainConfig, TrainError
from growmoe.lm.data import batch, phase_weights
from growmoe.lm.domains import load_domains
from growmoe.lm.evaluate import autocast, context, cross_entropy
from growmoe.lm.follow import LogReader
from growmoe.lm.loop import Loop
from growmoe.lm.model import build_model
from growmoe.lm.optimize import learning_rate, pick_device
from growmoe.lm.run import RunFolder
from growmoe.lm.sample import sample_text
from growmoe.lm.tokenizer import ByteTokenizer, FileTokenizer
from growmoe.lm.train import Run, _run, build_rules, check_lengths, measure

_COUNTED = ("losses", "loss_seconds")


def train_on_workers(
    config: TrainConfig,
    workers: int,
    *,
    output: str | Path,
    command: str = "",
    on: Literal["ray", "processes"] = "ray",
    progress: Callable[[float, str], None] = lambda fraction, text: None,
    say: Callable[[str], None] = lambda text: None,
    listen: Callable[[Mapping[str, Any]], None] = lambda line: None,
    lived: Callable[[Sequence[growmoe.Event]], None] = lambda events: None,
) -> Run:
    """As `growmoe.lm.train`, each batch divided among workers that share the experts out.

    The folder is as there, but the checkpoint is a folder, too (`growmoe.distributed.save`;
    `growmoe.load` reads it). When a worker dies the run goes on from a snapshot.

    Args:
        workers: how many, at most the batch size.
        on: as for `growmoe.distributed.fit`.
        listen: given each line of the log, some seconds after it was written.
        lived: given the lineage whenever it was written anew, as often as a checkpoint.

    Raises:
        TrainError: the run cannot be done as asked.
    """
    if config.experts == 0:
        raise TrainError("workers share experts out, but this model has none: leave out --workers")
    if not 1 <= workers <= config.batch_size:
        raise TrainError(f"workers must be 1 to batch_size={config.batch_size}, got {workers}")
    if config.time_limit:
        raise TrainError("time_limit is not kept with workers: leave out one of them")
    if pick_device(config.device).type == "cuda" and on == "processes":
        raise TrainError("several GPUs need Ray")
    build_rules(config)
    job = {"config": config, "output": str(Path(output).absolute()), "command": command}
    # what is wrong with the data or the folder is found before anything starts
    RunFolder(output, _identity(config, job), command)

    log = LogReader(Path(output), listen, lived)

    def watch(status: dict[str, Any]) -> None:
        step = status["step"]
        progress(
            step / config.steps, f"step {step:,} of {config.steps:,} · {status['workers']} workers"
        )
        log.read()

    progress(0.0, f"{workers} workers start")
    result = distributed.fit(
        train_part,
        job,
        num_workers=workers,
        use_gpu=pick_device(config.device).type == "cuda",
        checkpoint=Path(output) / "checkpoint",
        checkpoint_every=config.save_interval,
        on=on,
        progress=False,
        watch=watch,
    )
    log.read()
    for recovery in result.recoveries:
        say(
            f"a worker died ({recovery.reason[:80]}): went on after {recovery.seconds:.1f} s, "
            f"{recovery.repeated} steps done again"
        )
    return finished(config, job, say)


def _tokenizer(config: TrainConfig) -> Any:
    return ByteTokenizer() if config.tokenizer is None else FileTokenizer(config.tokenizer)


def _identity(config: TrainConfig, job: dict[str, Any]) -> dict[str, Any]:
    domains = load_domains(config.domains, config.bytes_per_domain, tokenizer=_tokenizer(config))
    check_lengths(domains, config.sequence_length)
    job["digests"] = {name: domain.digest() for name, domain in domains.items()}
    return {"config": config.to_json(), "data": job["digests"]}


def train_part(job: dict[str, Any], run: distributed.Run) -> None:
    """The training loop of one worker."""
    config: TrainConfig = job["config"]
    tokenizer, device = _tokenizer(config), pick_device(config.device)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(config.seed)
        model = build_model(config, tokenizer.vocab_size).to(device)
        domains = load_domains(config.domains, config.bytes_per_domain, tokenizer=tokenizer)
        identity = {"config": config.to_json(), "data": job["digests"]}
        folder = RunFolder(job["output"], identity) if run.rank == 0 else None
        loop = PartLoop(config, model, domains, build_rules(config), device, folder)
        loop.train_in(run)


class PartLoop(Loop):
    """A `Loop` that trains on a part of each batch."""

    def train_in(self, run: distributed.Run) -> None:
        self.place = run
        self.parallel = run.share(self.model, self.optimizer, self.organizer)
        extra = run.extra
        self.step, self.seconds = run.step, extra.get("seconds", 0.0)
        self._losses, self._seconds = (extra.get(name, 0) for name in _COUNTED)
        self._loss = torch.tensor(extra.get("loss", 0.0), device=self.device)
        if self.folder is not None:
            self.history = self.folder.rewind(self.step if extra else -1)
        if not extra:
            self.evaluate()
        self.model.train()
        config = self.config
        for step in run.steps(config.steps):
            self.step = step
            self.one_step()
            last = self.step == config.steps
            if self.step % config.log_every == 0 or last:
                self.log()
            if self.step % config.evaluation_interval == 0 or last:
                self.evaluate()
            if self.folder is not None and (self.step % config.save_interval == 0 or last):
                self.folder.write_lineage(self.model)
            extra |= {"seconds": self.seconds, "loss": float(self._loss)}
            extra |= {"losses": self._losses, "loss_seconds": self._seconds}

    def one_step(self) -> None:
        config, optimizer, run = self.config, self.optimizer, self.place
        begin = time.perf_counter()
        weights = phase_weights(
            config.curriculum, config.weights, len(self.domains), self.step, config.steps
        )
        x_BS, y_BS, domain_B = (
            run.part(tensor).to(self.device)
            for tensor in batch(
                self.domains, weights, self.step, config.seed, config.batch_size,
                config.sequence_length,
            )
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        with autocast(self.device, config.precision):
            logits_BSV = self.model(x_BS, **context(self.model, domain_B))
            loss_T = cross_entropy(logits_BSV, y_BS)
            loss = (loss_T.mean() + growmoe.aux_loss(self.model)) * run.weight
        loss.backward()
        norm = self.parallel.clip_grad_norm(config.clip) if config.clip else None
        mean = self.parallel.workers.total(loss_T.detach().mean() * run.weight) / run.size
        self._refuse_divergence(mean, norm)  # on all workers or on none
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.organizer is not None:
            self.organizer.step(loss_T.detach())
        self._loss += mean
        self._losses += 1
        spent = time.perf_counter() - begin
        self.seconds += spent
        self._seconds += spent

    def log(self) -> None:
        loss = float(self._loss) / self._losses
        super().log()
        self.place.report(loss=loss)


def finished(config: TrainConfig, job: dict[str, Any], say: Callable[[str], None]) -> Run:
    """The results, measured in this process on the whole model."""
    tokenizer, device = _tokenizer(config), pick_device(config.device)
    domains = load_domains(config.domains, config.bytes_per_domain, tokenizer=tokenizer)
    model = build_model(config, tokenizer.vocab_size).to(device)
    folder = RunFolder(job["output"], {"config": config.to_json(), "data": job["digests"]})
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        loop = Loop(config, model, domains, build_rules(config), device, folder)
        saved = growmoe.load(
            folder.path / "checkpoint", model, loop.optimizer, loop.organizer, random_state=False
        )
        loop.step, loop.seconds = saved["step"], saved["extra"]["seconds"]
        loop.history = folder.rewind(loop.step)
        folder.write_lineage(model)
        results = measure(loop)
        sample = None
        if config.sample_length:
            sample = sample_text(
                model, domains, tokenizer, length=config.sample_length, seed=config.seed
            )
    folder.write_results(results, sample)
    return _run(loop, results, folder.files())
