"""The example of Ray Tune trains with the thresholds it is given, and counts every seed."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from growmoe import lm
from growmoe.rules import MergeSimilar, SpawnOnNovelty

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tune_rules.py"


def test_a_trial_grows_with_its_thresholds_and_reports_the_mean_of_its_seeds(monkeypatch):
    pytest.importorskip("ray.tune")
    spec = importlib.util.spec_from_file_location("tune_rules", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    trained, reported = [], []

    def train(settings, *, rules, listen):
        trained.append((settings, rules))
        for step in (0, settings.steps):
            bits = {"a": settings.seed - step, "b": settings.seed + step}
            listen({"kind": "evaluation", "step": step, "bits_per_byte": bits, "experts": {"0": 4}})

    monkeypatch.setattr(lm, "train", train)
    monkeypatch.setattr(script, "tune", SimpleNamespace(report=reported.append))
    script.trial({"novelty": 0.1, "similarity": 0.9, "steps": 8, "seeds": [100, 104]})
    for settings, rules in trained:
        assert settings.grow and rules[:2] == [SpawnOnNovelty(0.1), MergeSimilar(0.9)]
    assert [report["bits_per_byte"] for report in reported] == [100, 100, 102, 102]
    assert [report["seeds"] for report in reported] == [0, 1, 1, 2]
