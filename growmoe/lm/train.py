"""Trains a small language model: from a configuration to what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import growmoe
from growmoe import rules as rule_classes
from growmoe.lm.config import TrainConfig, TrainError
from growmoe.lm.data import windows
from growmoe.lm.domains import SPLITS, Domain, load_domains
from growmoe.lm.evaluate import expert_use, unigram_bits
from growmoe.lm.growing.model import GrowingLM
from growmoe.lm.loop import Loop
from growmoe.lm.model import build_model
from growmoe.lm.optimize import pick_device
from growmoe.lm.run import RunFolder, events_of
from growmoe.lm.sample import sample_text
from growmoe.lm.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from growmoe.models import TransformerLM
from growmoe.rules import Rule

DEFAULT_RULES = ("SpawnOnNovelty", "SpawnOnOverload", "MergeSimilar", "PruneIdle")


@dataclass
class Run:
    """What `train` gives back.

    Attributes:
        config: as it was given.
        model: as it was after `steps`.
        steps: done.
        seconds: of training, without evaluations, over all calls.
        finished: whether all steps of the configuration are done.
        history: the lines of metrics.jsonl.
        events: the lineage of all layers.
        results: the content of results.json.
        files: what was written at the end.
    """

    config: TrainConfig
    model: nn.Module
    steps: int = 0
    seconds: float = 0.0
    finished: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    events: list[growmoe.Event] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    @property
    def bits_per_byte(self) -> dict[str, float]:
        """Of each domain's test part."""
        return {name: entry["test"] for name, entry in self.results["domains"].items()}


def train(
    config: TrainConfig | None = None,
    *,
    domains: Mapping[str, Domain] | None = None,
    model: nn.Module | None = None,
    rules: Sequence[Rule] | None = None,
    tokenizer: Tokenizer | None = None,
    output: str | Path | None = None,
    command: str = "",
    progress: Callable[[float, str], None] = lambda fraction, text: None,
    say: Callable[[str], None] = lambda text: None,
    listen: Callable[[Mapping[str, Any]], None] = lambda line: None,
    happened: Callable[[growmoe.Event], None] | None = None,
) -> Run:
    """Train as `config` says; with a folder, go on where the same call was stopped.

    After a stop the losses are those of an uninterrupted run, bit for bit on the same machine:
    batches follow from seed and step alone, and the checkpoint holds all else. An interrupt (or
    SIGTERM) ends the running step, leaves a checkpoint and raises `Stopped`; a second one stops at
    once.

    Args:
        config: the defaults if left out.
        domains: instead of those that `config` names.
        model: instead of the one that `config` describes; int64 [B, S] -> logits [B, S, V].
        rules: for `config.grow`, instead of those it names.
        tokenizer: with which the domains are, or are to be, encoded; bytes if left out.
        output: a folder (see `growmoe.lm.run`); nothing is written if left out.
        command: kept in config.json.
        progress: told the fraction done and how it goes.
        say: told, in one line, of evaluations and, without `happened`, of what the organizer did.
        listen: given each line of the log as it is written, such as `report.board.Board.line`.
        happened: given each act that the organizer carried out.

    Raises:
        TrainError: the run cannot be done as asked, or has diverged.
        Stopped: it was interrupted.
    """
    config = TrainConfig() if config is None else config
    if tokenizer is None:
        tokenizer = ByteTokenizer() if config.tokenizer is None else FileTokenizer(config.tokenizer)
    device = pick_device(config.device)
    if rules is not None and not config.grow:
        raise TrainError("rules are given, but config.grow is not")
    organizer_rules = build_rules(config) if rules is None else list(rules)
    identity: dict[str, Any] = {"config": config.to_json()}
    if model is not None:
        identity["model"] = {"structure": repr(model)}
    model = (build_model(config, tokenizer.vocab_size) if model is None else model).to(device)
    if domains is None:
        progress(0.0, "reading text")
        domains = load_domains(config.domains, config.bytes_per_domain, tokenizer=tokenizer)
    check_lengths(domains, config.sequence_length)
    identity["data"] = {name: domain.digest() for name, domain in domains.items()}
    folder = None if output is None else RunFolder(output, identity, command)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        loop = Loop(
            config, model, domains, organizer_rules, device, folder, progress, say, listen, happened
        )
        loop.begin()
        if folder is not None and loop.step == config.steps and (done := folder.results()):
            say("finished before: nothing was trained")
            return _run(loop, done, folder.files())
        loop.train()
        progress(loop.step / config.steps, "testing")
        results = measure(loop)
        files = []
        if folder is not None:
            sample = None
            if config.sample_length:
                sample = sample_text(
                    model, domains, tokenizer, length=config.sample_length, seed=config.seed
                )
            folder.write_results(results, sample)
            files = folder.files()
    return _run(loop, results, files)


def _run(loop: Loop, results: dict[str, Any], files: list[Path]) -> Run:
    return Run(
        loop.config,
        loop.model,
        loop.step,
        loop.seconds,
        loop.step == loop.config.steps,
        loop.history,
        events_of(loop.model),
        results,
        files,
    )


def measure(loop: Loop) -> dict[str, Any]:
    """The content of results.json."""
    config, model = loop.config, loop.model
    test, validation = loop.bits("test"), loop.bits("validation")
    vocab_size = getattr(model, "vocab_size", 256)
    result: dict[str, Any] = {
        "finished": loop.step == config.steps,
        "steps": loop.step,
        "tokens": loop.step * config.batch_size * config.sequence_length,
        "seconds": loop.seconds,
        "domains": {
            name: {
                "test": test[name],
                "validation": validation[name],
                "unigram": unigram_bits(domain, vocab_size),
                "train_bytes": domain.num_bytes[0],
                "test_bytes": domain.num_bytes[2],
            }
            for name, domain in loop.domains.items()
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        **expert_use(model),
    }
    if isinstance(model, (TransformerLM, GrowingLM)):
        result["active_parameters"] = model.num_params(active=True)
        result["forward_flops_per_token"] = model.flops_per_token(config.sequence_length)
    return result


def build_rules(config: TrainConfig) -> list[Rule]:
    """The rules that `config` names, each with its defaults; none where it does not grow.

    Raises:
        TrainError: `growmoe.rules` has no rule of such a name.
    """
    if not config.grow:
        return []
    known = [name for name in rule_classes.__all__ if name not in ("Proposal", "Rule")]
    for name in config.rules:
        if name not in known:
            raise TrainError(f"no rule {name!r}: choose from {', '.join(known)}")
    return [getattr(rule_classes, name)() for name in config.rules or DEFAULT_RULES]


def check_lengths(domains: Mapping[str, Domain], sequence_length: int) -> None:
    """Raise TrainError for a domain with a part too short for a window."""
    for domain in domains.values():
        for split in SPLITS:
            windows(domain, split, 1, sequence_length)
