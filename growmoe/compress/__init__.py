"""Pruning and merging experts after pretraining.

    report = growmoe.compress.prune(model, calibration, ratio=0.3, saliency="reap")

`calibration` is batches of token ids, int64 [B, S + 1], or whatever a loss of one's own takes. The
model is changed in place. Start reading at `growmoe.compress.api`.
"""

from growmoe.compress.api import inspect, merge, prune
from growmoe.compress.calibrate import collect, losses, next_token_loss
from growmoe.compress.criteria import CRITERIA, NEEDS_MODEL, super_experts
from growmoe.compress.layer import CompressError, Layer, MoELayer, Observed, layers_of
from growmoe.compress.measure import Change, paired
from growmoe.compress.merging import METHODS
from growmoe.compress.output import writing
from growmoe.compress.plan import LayerSize, Plan, make_plan
from growmoe.compress.report import Inspection, Report
from growmoe.compress.statistics import LayerStatistics

__all__ = [
    "CRITERIA",
    "METHODS",
    "NEEDS_MODEL",
    "Change",
    "CompressError",
    "Inspection",
    "Layer",
    "LayerSize",
    "LayerStatistics",
    "MoELayer",
    "Observed",
    "Plan",
    "Report",
    "collect",
    "inspect",
    "layers_of",
    "losses",
    "make_plan",
    "merge",
    "next_token_loss",
    "paired",
    "prune",
    "super_experts",
    "writing",
]
