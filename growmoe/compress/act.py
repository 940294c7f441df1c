"""Do to a model in memory what a command asks for: prune or merge, then recover."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from growmoe.compress.api import merge, prune
from growmoe.compress.choose import Progress
from growmoe.compress.options import Options
from growmoe.compress.recovery import recover_beside_control
from growmoe.compress.report import Report
from growmoe.compress.text import Texts


def act_on(
    model: nn.Module,
    texts: Texts,
    options: Options,
    reference: nn.Module | None,
    progress: Progress,
    say: Any,
) -> Report:
    """Change the model in place.

    Args:
        reference: the model before fine-tuning, for "router-norm".

    Raises:
        CompressError: it cannot be done.
    """
    recovers = options.recover or options.router_steps
    whole = copy.deepcopy(model) if recovers else None
    if options.act == "prune":
        report = prune(
            model,
            texts.calibration,
            **options.budget(),
            saliency=options.saliency,
            per_layer=options.per_layer,
            selection=texts.selection,
            evaluation=texts.evaluation,
            guard=options.guard,
            match=options.match,
            reference=reference,
            seed=options.seed,
            progress=progress,
        )
    else:
        report = merge(
            model,
            texts.calibration,
            ratio=options.ratio,
            keep=options.keep,
            method=options.method,
            evaluation=texts.evaluation,
            match=options.match,
            seed=options.seed,
            progress=progress,
        )
    if whole is not None:
        say(f"{report.experts_before} experts -> {report.experts_after}; recovering")
        report.recovery = recover_beside_control(
            model,
            whole,
            texts.training,
            options.recover,
            router_steps=options.router_steps,
            control=options.control,
            evaluation=texts.evaluation,
            progress=progress,
        )
    return report
