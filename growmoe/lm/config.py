"""What a training run of a small language model is told."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Curriculum = Literal["mixed", "phases"]
Schedule = Literal["cosine", "wsd", "constant"]
Precision = Literal["float32", "bfloat16"]

# What may differ between two calls that go on with the same run: it decides when and where.
FREE = ("save_every", "sample_length", "time_limit", "device")


class TrainError(ValueError):
    """The run cannot be done as asked; the message says why, in one line."""


@dataclass(frozen=True)
class TrainConfig:
    """All options of a run; two runs of the same configuration and data see the same batches.

    Attributes:
        domains: names from `growmoe.lm.EMBEDDED`, or "name=path" for text of one's own.
        bytes_per_domain: the most that is read of each, its validation and test parts included.
        tokenizer: path of a Hugging Face tokenizer.json; bytes if left out.
        curriculum: "mixed" draws each sequence's domain by `weights`; "phases" learns one domain
            after the other, in equal shares of the steps.
        weights: one for each domain; equal if left out.
        d_model, layers, heads: of the transformer.
        hidden: width of an expert; d_model if left out.
        experts: experts per layer; 0 makes a dense model, whose feed-forward blocks are as wide as
            `k` experts and the shared one together, so that both cost the same per token.
        router: a name from `growmoe.lm.ROUTERS`.
        k: experts per token, for routers that take one.
        shared: width of an expert that sees every token; 0 for none.
        dropout: of the transformer.
        balance_loss: coefficient of the balance loss; as for `MoE` if left out.
        z_loss: coefficient of the router z-loss.
        steps: optimizer steps.
        batch_size: B, sequences per step.
        sequence_length: S, tokens per sequence.
        lr: the highest learning rate.
        schedule: after the warm-up, "cosine" falls to a tenth of `lr`; "wsd" stays and falls
            linearly to zero over the last fifth; "constant" stays.
        warmup: steps over which the learning rate rises; a twentieth of the steps if left out.
        weight_decay: of matrices alone: not of norms, biases, embeddings and routers.
        clip: the largest norm of the gradient; 0 for no limit.
        grow: whether an organizer applies `rules`.
        rules: names of classes in `growmoe.rules`; the defaults of `growmoe.lm.train` if empty.
        paths: grow a whole path for each new kind of text instead (see `growmoe.lm.growing`), as
            large as the dense model, so that none of the old is forgotten. `experts`, `router` and
            `schedule` have no say then: the learning rate follows each path's own steps.
        max_experts: per layer, where it grows; of paths in all.
        organize_every: steps between decisions of the organizer.
        evaluate_every: steps between evaluations; a tenth of the steps if left out.
        windows: sequences per domain in an evaluation.
        log_every: steps between lines of the log.
        save_every: steps between checkpoints; as `evaluate_every` if left out.
        sample_length: tokens drawn for each domain in sample.txt; 0 for no such file.
        time_limit: seconds after which the run stops with a checkpoint; 0 for none.
        precision: "bfloat16" runs the model under autocast.
        device: "auto" takes an accelerator if there is one.
        seed: of the weights and the batches.

    Raises:
        TrainError: a value out of range.
    """

    domains: tuple[str, ...] = ("python", "cpp", "english")
    bytes_per_domain: int = 4_000_000
    tokenizer: str | None = None
    curriculum: Curriculum = "mixed"
    weights: tuple[float, ...] = ()

    d_model: int = 128
    layers: int = 2
    heads: int = 4
    hidden: int | None = None
    experts: int = 8
    router: str = "topk"
    k: int = 2
    shared: int = 0
    dropout: float = 0.0
    balance_loss: float | None = None
    z_loss: float = 0.0

    steps: int = 1200
    batch_size: int = 16
    sequence_length: int = 128
    lr: float = 3e-3
    schedule: Schedule = "cosine"
    warmup: int | None = None
    weight_decay: float = 0.1
    clip: float = 1.0

    grow: bool = False
    rules: tuple[str, ...] = ()
    paths: bool = False
    max_experts: int = 32
    organize_every: int = 50

    evaluate_every: int | None = None
    windows: int = 32
    log_every: int = 10
    save_every: int | None = None
    sample_length: int = 256
    time_limit: float = 0.0
    precision: Precision = "float32"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("domains", "weights", "rules"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, (tuple, list)):
                raise TrainError(f"{name} must be a tuple, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name, kind in (
            ("curriculum", Curriculum),
            ("schedule", Schedule),
            ("precision", Precision),
        ):
            if getattr(self, name) not in get_args(kind):
                raise TrainError(
                    f"{name} must be one of {', '.join(get_args(kind))}, "
                    f"got {getattr(self, name)!r}"
                )
        for name in (
            "bytes_per_domain", "d_model", "layers", "heads", "k", "steps", "batch_size",
            "sequence_length", "max_experts", "organize_every", "windows", "log_every",
        ):  # fmt: skip
            self._integer(name, 1)
        for name in ("experts", "shared", "seed", "sample_length"):
            self._integer(name, 0)
        for name, least in (("hidden", 1), ("evaluate_every", 1), ("save_every", 1), ("warmup", 0)):
            if getattr(self, name) is not None:
                self._integer(name, least)
        for name in (
            "balance_loss", "z_loss", "lr", "weight_decay", "clip", "dropout", "time_limit",
        ):  # fmt: skip
            if not (name == "balance_loss" and self.balance_loss is None):
                self._number(name)
        if self.dropout >= 1:
            raise TrainError(f"dropout must be below 1, got {self.dropout!r}")
        if not self.domains:
            raise TrainError("domains: there must be at least one")
        if self.weights:
            good = [isinstance(w, (int, float)) and 0 <= w < math.inf for w in self.weights]
            if len(self.weights) != len(self.domains) or not all(good) or sum(self.weights) == 0:
                raise TrainError(
                    f"weights must be one number >= 0 for each of {len(self.domains)} domains and "
                    f"not all 0, got {self.weights!r}"
                )
            if self.curriculum == "phases":
                raise TrainError("weights mix domains, which curriculum='phases' does not")
        if self.grow and not self.experts:
            raise TrainError("grow needs experts, got experts=0")
        if self.grow and self.max_experts < self.experts:
            raise TrainError(
                f"max_experts={self.max_experts}, but each layer begins with {self.experts}"
            )
        if self.paths and self.grow:
            raise TrainError("paths grow by themselves: leave out grow")
        if self.paths and (self.dropout or self.precision != "float32"):
            raise TrainError("paths take no dropout, and precision='float32'")
        if self.rules and not self.grow:
            raise TrainError("rules are given, but grow is not")

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise TrainError(f"{name} must be an integer >= {least}, got {value!r}")

    def _number(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise TrainError(f"{name} must be a number >= 0, got {value!r}")

    @property
    def evaluation_interval(self) -> int:
        return self.evaluate_every or max(1, self.steps // 10)

    @property
    def save_interval(self) -> int:
        return self.save_every or self.evaluation_interval

    def to_json(self) -> dict[str, Any]:
        """Plain values; tuples become lists."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }
