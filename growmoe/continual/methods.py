"""The methods of the bench, by name.

A method is a description, a function that runs one cell, and the settings that the function was
given. Another method takes part by being put under its name into the mapping that
`growmoe.continual.run_bench` is given::

    Method("what it does, in a line", run=my_run, settings={"learning_rate": 0.1})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from growmoe.continual.cell import Cell
from growmoe.continual.classifier import default_rules
from growmoe.continual.features import RandomPatchFeatures
from growmoe.continual.streams import Stream
from growmoe.routers import ClosedFormGate

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Method:
    """A method that learns a stream.

    Attributes:
        description: one line for the user.
        run: `run(stream, seed, progress)` trains, evaluates and gives the Cell. The generators of
            python, numpy and torch are seeded before it is called; `progress(fraction, text)` is
            told how far it is, from 0 to 1.
        settings: every number that decides the outcome, as JSON. Cells of other settings are never
            mixed with these.
    """

    description: str
    run: Callable[[Stream, int, Progress], Cell]
    settings: Mapping[str, Any] = field(default_factory=dict)


# For every method but joint, which is there to be as good as it can. The learning rate, the batch
# size and EWC's strength were chosen on split-fashion-mnist with seeds 100 and 101, by the accuracy
# on its test images, which favours these methods; the ridges on held-out train images.
_TRAINING = {"hidden": 400, "learning_rate": 3e-4, "batch_size": 32, "min_steps": 300}
_JOINT_TRAINING = {**_TRAINING, "learning_rate": 1e-3, "batch_size": 128}


def _baseline(
    description: str, function: str, training: Mapping[str, Any] = _TRAINING, **options: Any
) -> Method:
    def run(stream: Stream, seed: int, progress: Progress) -> Cell:
        # Avalanche takes seconds to import: only when a cell is run.
        from growmoe.continual import baselines

        how = baselines.Training(**training)
        return getattr(baselines, function)(stream, seed, progress, how, **options)

    return Method(description, run, {**training, **options})


def _closed_form(
    description: str, function: str, kept: Mapping[str, Any] | None = None, **options: Any
) -> Method:
    """A method on fixed features; `kept` are settings that are not options of its function."""

    def run(stream: Stream, seed: int, progress: Progress) -> Cell:
        from growmoe.continual import closed_form

        return getattr(closed_form, function)(stream, seed, progress, **options)

    settings = {
        **options,
        **(kept or {}),
        "features": RandomPatchFeatures.for_images(28, 28).settings(),
        "features_of_small_images": RandomPatchFeatures.for_images(8, 8).settings(),
    }
    return Method(description, run, settings)


_INTAKE: dict[str, Any] = {"batch_size": 64, "early": 256}

METHODS: dict[str, Method] = {
    "growmoe": _closed_form(
        "growing closed-form experts; one pass, no replay, no boundaries",
        "run_growmoe",
        **_INTAKE,
        kept={"rules": [repr(rule) for rule in default_rules()], "gate": repr(ClosedFormGate())},
    ),
    "naive": _baseline("an MLP trained on and on, nothing against forgetting", "run_naive"),
    "replay": _baseline(
        "1,000 exemplars; each step has as many per old class as per new one",
        "run_replay",
        exemplars=1000,
    ),
    "ewc": _baseline(
        "elastic weight consolidation, one penalty per experience", "run_ewc", strength=1e6
    ),
    "lwf": _baseline(
        "learning without forgetting, distillation from the last MLP",
        "run_lwf",
        alpha=1.0,
        temperature=2.0,
    ),
    "joint": _baseline(
        "the MLP's bound: anew after each experience, ten passes over all",
        "run_joint",
        training=_JOINT_TRAINING,
        passes=10,
    ),
    "ridge": _closed_form(
        "one closed-form head on growmoe's features, one pass",
        "run_ridge",
        **_INTAKE,
        ridge=1e-4,
        as_large_as_growmoe=False,
    ),
    "ridge-wide": _closed_form(
        "one closed-form head, widened to growmoe's memory, one pass",
        "run_ridge",
        **_INTAKE,
        ridge=1e-4,
        as_large_as_growmoe=True,
    ),
}
