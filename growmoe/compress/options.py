"""What the commands `growmoe prune`, `merge` and `inspect` are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from growmoe.compress.criteria import CRITERIA
from growmoe.compress.layer import CompressError
from growmoe.compress.merging import METHODS
from growmoe.compress.output import check_output
from growmoe.compress.plan import check_budget


@dataclass(frozen=True)
class Options:
    """One call of a command.

    Attributes:
        act: what to do.
        model: a growmoe run or checkpoint, or a Hugging Face folder.
        output: a new folder; None for "inspect" that only prints.
        ratio, keep, max_loss: the budget, exactly one but for "inspect".
        saliency: of "prune". method: of "merge".
        calibration: a text; None for the run's own training text.
        evaluation: domain -> a text; empty for the run's own test texts.
        recover: steps of training after the cut; router_steps: of the routers alone before them.
        control: train the whole model as long, and compare with it.
        match: fit the survivors' last matrices by least squares.
        sequence_length: S; None for the run's own. samples: sequences of calibration.
        streaming: whether a Hugging Face folder is read tensor by tensor; None: as memory allows.
        trust: write what other libraries cannot load, in growmoe's own format.
    """

    act: Literal["prune", "merge", "inspect"]
    model: Path
    output: Path | None = None
    ratio: float | None = None
    keep: int | None = None
    max_loss: float | None = None
    saliency: str = "reap"
    method: str = "hc-smoe"
    per_layer: Literal["uniform", "global", "searched"] = "uniform"
    calibration: Path | None = None
    evaluation: dict[str, Path] = field(default_factory=dict)
    reference: Path | None = None
    recover: int = 0
    router_steps: int = 0
    control: bool = True
    match: bool = False
    guard: bool = True
    sequence_length: int | None = None
    samples: int = 128
    batch_size: int = 16
    seed: int = 0
    streaming: bool | None = None
    trust: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        if self.act != "inspect":
            check_budget(self.ratio, self.keep, self.max_loss)
            if self.output is None:
                raise CompressError("say where to write the model: --output DIR")
        if self.act == "merge" and self.max_loss is not None:
            raise CompressError("merge takes --ratio or --keep")
        if self.act == "prune" and self.saliency not in CRITERIA:
            raise CompressError(f"no saliency {self.saliency!r}: choose from {', '.join(CRITERIA)}")
        if self.act == "prune" and self.saliency == "router-norm" and self.reference is None:
            raise CompressError(
                "router-norm compares with the model before fine-tuning: give --reference MODEL"
            )
        if self.act == "merge" and self.method not in METHODS:
            raise CompressError(
                f"no merging method {self.method!r}: choose from {', '.join(METHODS)}"
            )
        if self.per_layer not in ("uniform", "global", "searched"):
            raise CompressError(
                f"--per-layer must be uniform, global or searched, got {self.per_layer!r}"
            )
        for name in ("samples", "batch_size", "sequence_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CompressError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("recover", "router_steps"):
            if getattr(self, name) < 0:
                raise CompressError(f"--{name.replace('_', '-')} must not be negative")
        if not self.model.exists():
            raise CompressError(f"there is no {self.model}")
        if self.output is not None:
            source = self.model if self.model.is_dir() else self.model.parent
            check_output(self.output, source)

    def budget(self) -> dict[str, Any]:
        """ratio, keep and max_loss, as `prune` takes them."""
        return {"ratio": self.ratio, "keep": self.keep, "max_loss": self.max_loss}
