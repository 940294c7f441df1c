"""The methods of the bench, by name.

A method is a description, a function that runs one cell, and the settings that the function was
given. Another method takes part by being put under its name into the mapping that
`growmoe.continual.run_bench` is given::

    Method("what it does, in a line", run=my_run, settings={"learning_rate": 0.1})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from growmoe.continual.cell import Cell
from growmoe.continual.classifier import default_rules
from growmoe.continual.domain_gate import DomainGate
from growmoe.continual.features import default_features
from growmoe.continual.rivals import build
from growmoe.continual.rivals.learner import (
    BOUNDARIES,
    EXAMPLES,
    ORACLE,
    TASK_LABELS,
    Budget,
    Learner,
    run_learner,
)
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
        needs: what it is given beyond labelled images as they come: "boundaries" (told when an
            experience begins and ends), "task labels" (told at test time which experience an image
            is of), "examples" (keeps some).
        again: builds the method anew with other settings, for `online`.
    """

    description: str
    run: Callable[[Stream, int, Progress], Cell]
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    again: Callable[..., Method] | None = field(default=None, repr=False, compare=False)


# For every method but joint, which is there to be as good as it can. The learning rate, the batch
# size and EWC's strength were chosen on split-fashion-mnist with seeds 100 and 101, by the accuracy
# on its test images, which favours these methods; the ridges on held-out train images.
_TRAINING = {"hidden": 400, "learning_rate": 3e-4, "batch_size": 32, "min_steps": 300}
_JOINT_TRAINING = {**_TRAINING, "learning_rate": 1e-3, "batch_size": 128}


def _baseline(
    description: str,
    function: str,
    training: Mapping[str, Any] = _TRAINING,
    needs: tuple[str, ...] = (),
    **options: Any,
) -> Method:
    """A method that runs through Avalanche."""

    def run(stream: Stream, seed: int, progress: Progress) -> Cell:
        # Avalanche takes seconds to import: only when a cell is run.
        from growmoe.continual import baselines

        how = baselines.Training(**training)
        return getattr(baselines, function)(stream, seed, progress, how, **options)

    def again(**changes: Any) -> Method:
        return _baseline(description, function, {**training, **changes}, needs, **options)

    return Method(description, run, {**training, **options}, needs, again)


def _rival(
    description: str,
    make: Callable[..., Learner],
    needs: tuple[str, ...] = (),
    *,
    batch_size: int = _TRAINING["batch_size"],  # type: ignore[assignment]
    min_steps: int = _TRAINING["min_steps"],  # type: ignore[assignment]
    on_features: bool = False,
    **options: Any,
) -> Method:
    """A method in plain torch, whose learner `make` builds."""
    budget = Budget(batch_size, min_steps)

    def run(stream: Stream, seed: int, progress: Progress) -> Cell:
        return run_learner(stream, progress, make(stream, seed, **options), budget)

    settings = {"batch_size": batch_size, "min_steps": min_steps, **options}
    if on_features:
        settings |= _feature_settings()
    again = partial(
        _rival,
        description,
        make,
        needs,
        batch_size=batch_size,
        min_steps=min_steps,
        on_features=on_features,
        **options,
    )
    return Method(description, run, settings, needs, again)


def _feature_settings() -> dict[str, Any]:
    return {
        "features": default_features((1, 28, 28)).settings(),
        "features_of_small_images": default_features((1, 8, 8)).settings(),
        "features_of_rows": default_features((1, 1, 8)).settings(),
    }


def _closed_form(
    description: str, function: str, kept: Mapping[str, Any] | None = None, **options: Any
) -> Method:
    """A method on fixed features; `kept` are settings that are not options of its function."""

    def run(stream: Stream, seed: int, progress: Progress) -> Cell:
        from growmoe.continual import closed_form

        return getattr(closed_form, function)(stream, seed, progress, **options)

    def again(**changes: Any) -> Method:
        changes.pop("min_steps", None)  # one pass already
        return _closed_form(description, function, kept, **{**options, **changes})

    settings = {**options, **(kept or {}), **_feature_settings()}
    return Method(description, run, settings, (), again)


# what growmoe's memory follows from, and so the width of the head that may take as much
_BLOCKS = list(default_features((1, 28, 28)).blocks)
_INTAKE: dict[str, Any] = {"batch_size": 64, "early": 1000}

# Of the methods in plain torch: the MLP of all others; a fifth of its width for experts that come
# one per experience; and one pass on growmoe's features. Other numbers are those of the papers or
# of Avalanche, but CN-DPM sleeps 2,000 steps, not 10,000, and PackNet prunes three quarters, so
# that ten experiences fit; RanPAC's ridge is that of the other closed-form heads. SI's strength
# was chosen among 0.1, 1, 10 and 100 on permuted-fashion-mnist with seed 100.
_MLP: dict[str, Any] = {name: _TRAINING[name] for name in ("hidden", "learning_rate")}
_SMALL: dict[str, Any] = {**_MLP, "hidden": 100}
_ONE_PASS: dict[str, Any] = {**_INTAKE, "min_steps": 0, "on_features": True}

METHODS: dict[str, Method] = {
    "growmoe": _closed_form(
        "growing closed-form experts; one pass, no replay, no boundaries",
        "run_growmoe",
        **_INTAKE,
        kept={
            "blocks": _BLOCKS,
            "rules": [repr(rule) for rule in default_rules()],
            "gate": repr(ClosedFormGate()),
            "domain_gate": repr(DomainGate()),
        },
    ),
    "naive": _baseline("an MLP trained on and on, nothing against forgetting", "run_naive"),
    "replay": _baseline(
        "1,000 exemplars; in each step as many per old class as per new",
        "run_replay",
        needs=(BOUNDARIES, EXAMPLES),
        exemplars=1000,
    ),
    "replay-2000": _baseline(
        "the same with 2,000 exemplars",
        "run_replay",
        needs=(BOUNDARIES, EXAMPLES),
        exemplars=2000,
    ),
    "gdumb": _baseline(
        "a balanced memory, and an MLP trained on it alone, anew each time",
        "run_gdumb",
        needs=(BOUNDARIES, EXAMPLES),
        exemplars=1000,
        passes=30,
    ),
    "ewc": _baseline(
        "elastic weight consolidation, one penalty per experience",
        "run_ewc",
        needs=(BOUNDARIES,),
        strength=1e6,
    ),
    "si": _rival(
        "synaptic intelligence, importances from each weight's path",
        build.synaptic_intelligence,
        (BOUNDARIES,),
        **_MLP,
        strength=10.0,
        damping=0.1,
    ),
    "lwf": _baseline(
        "learning without forgetting, distillation from the last MLP",
        "run_lwf",
        needs=(BOUNDARIES,),
        alpha=1.0,
        temperature=2.0,
    ),
    "a-gem": _baseline(
        "gradients that would hurt 1,000 exemplars are projected",
        "run_agem",
        needs=(BOUNDARIES, EXAMPLES),
        exemplars=1000,
        sample=64,
    ),
    "der++": _baseline(
        "1,000 exemplars replayed with labels and old scores",
        "run_der",
        needs=(BOUNDARIES, EXAMPLES),
        exemplars=1000,
        alpha=0.1,
        beta=0.5,
    ),
    "er-ace": _baseline(
        "1,000 exemplars; new images against their own classes alone",
        "run_er_ace",
        needs=(BOUNDARIES, EXAMPLES),
        exemplars=1000,
    ),
    "icarl": _rival(
        "1,000 herded exemplars, distillation, nearest mean",
        build.icarl,
        (BOUNDARIES, EXAMPLES),
        **_MLP,
        exemplars=1000,
    ),
    "cope": _rival(
        "prototypes that evolve, 1,000 exemplars",
        build.cope,
        (EXAMPLES,),
        **_MLP,
        exemplars=1000,
        embedding=100,
        momentum=0.99,
        temperature=0.1,
    ),
    "slda": _rival(
        "streaming linear discriminant analysis on growmoe's features",
        build.streaming_lda,
        **_ONE_PASS,
        shrinkage=1e-4,
    ),
    "pnn": _rival(
        "progressive networks, a column per experience",
        build.pnn,
        (BOUNDARIES, TASK_LABELS),
        **_SMALL,
    ),
    "packnet": _rival(
        "experiences packed into one MLP by pruning",
        build.packnet,
        (BOUNDARIES, TASK_LABELS),
        **_MLP,
        pruned=0.75,
    ),
    "expert-gate": _rival(
        "an expert per experience, chosen by autoencoders",
        build.expert_gate,
        (BOUNDARIES,),
        **_SMALL,
        code=100,
        related=0.85,
        temperature=2.0,
    ),
    "cn-dpm": _rival(
        "a growing Dirichlet process mixture of VAEs and classifiers",
        build.cn_dpm,
        (EXAMPLES,),
        hidden=64,
        latent=16,
        learning_rate=4e-4,
        short_term=500,
        log_alpha=-400.0,
        chill=0.01,
        sleep_steps=2000,
    ),
    "lifelong-moe": _rival(
        "two new experts per experience, old ones and their gates frozen",
        build.lifelong_moe,
        (BOUNDARIES,),
        width=400,
        hidden=100,
        added=2,
        regularisation=1.0,
        learning_rate=3e-4,
    ),
    "sema": _rival(
        "adapters on growmoe's features, added where all find inputs novel",
        build.sema,
        **{**_ONE_PASS, "min_steps": _TRAINING["min_steps"]},
        bottleneck=48,
        threshold=1.0,
        settle=100,
        learning_rate=1e-3,
    ),
    "dynmoe": _rival(
        "top-any gating, experts added and removed by what they accept",
        build.dynmoe,
        width=400,
        hidden=100,
        num_experts=2,
        max_experts=16,
        window=100,
        learning_rate=3e-4,
    ),
    "ranpac": _rival(
        "random projection of growmoe's features, one closed-form head",
        build.ranpac,
        **_ONE_PASS,
        projected=2000,
        ridge=1e-4,
    ),
    "joint": _baseline(
        "the MLP's bound: anew after each experience, ten passes over all",
        "run_joint",
        training=_JOINT_TRAINING,
        needs=(BOUNDARIES, EXAMPLES),
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
        kept={"blocks": _BLOCKS},
    ),
}


def online(batch_size: int = 10, chosen: Mapping[str, Method] | None = None) -> dict[str, Method]:
    """The methods as they run online: one pass, in mini-batches of this size.

    Args:
        batch_size: images in a mini-batch.
        chosen: the methods; all if left out. One that cannot be built anew stays as it is, and so
            does joint, which is no online method but the bound.
    """
    methods = METHODS if chosen is None else chosen
    return {
        name: method
        if method.again is None or name == "joint"
        else method.again(batch_size=batch_size, min_steps=0)
        for name, method in methods.items()
    }


def controls() -> dict[str, Method]:
    """growmoe with one thing taken away, added or decided by someone else; its own settings."""
    settings = METHODS["growmoe"].settings
    same = {name: settings[name] for name in ("batch_size", "early")}
    made = {
        "oracle-growth": _control(
            "growth at the true boundaries, domains found again",
            "run_at_boundaries",
            (ORACLE,),
            **same,
        ),
        "random-growth": _control(
            "growth at random times, with as many births", "run_at_random", **same
        ),
        "fixed-mixture": _control(
            "as many domains as growmoe ends with, from the beginning", "run_fixed", **same
        ),
        "dense": _control(
            "one closed-form head of growmoe's final memory", "run_dense", **same, ridge=1e-4
        ),
    }
    made["no-spawn"] = _control("no domain is born: one for all", "run_without_births", **same)
    for act, what in _FURTHER.items():
        made[f"with-{act}"] = _control(what, "run_with", **same, act=act)
    return made


_FURTHER = {
    "merge": "domains that overlap are merged as well",
    "prune": "domains idle for 16 mini-batches are removed as well",
    "freeze": "label experts that have enough rows are frozen as well",
}


def _control(
    description: str, function: str, needs: tuple[str, ...] = (), **options: Any
) -> Method:
    def run(stream: Stream, seed: int, progress: Progress) -> Cell:
        from growmoe.continual import controls as room

        return getattr(room, function)(stream, seed, progress, **options)

    def again(**changes: Any) -> Method:
        changes.pop("min_steps", None)  # one pass already
        return _control(description, function, needs, **{**options, **changes})

    settings = METHODS["growmoe"].settings
    return Method(description, run, {**settings, **options}, needs, again)
