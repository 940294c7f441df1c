"""Runs of `growmoe train-lm` as models to prune: read them, and write what came of them.

A pruned run is a folder with config.json and checkpoint.safetensors as before, so that it can be
pruned again or loaded: ``growmoe.load(folder / "checkpoint.safetensors", model)`` into the model of
``load_run(folder)``, or into any model of that configuration.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import growmoe
from growmoe.compress.layer import CompressError
from growmoe.compress.options import Options
from growmoe.compress.text import Texts, read_texts, read_windows
from growmoe.lm import (
    ByteTokenizer,
    FileTokenizer,
    TrainConfig,
    TrainError,
    batch,
    build_model,
    load_domains,
)
from growmoe.lm.data import windows
from growmoe.lm.domains import Domain, Split

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class LoadedRun:
    """A run's model, in eval mode, with what it was told and how far it came."""

    folder: Path
    model: nn.Module
    config: TrainConfig
    saved: dict[str, Any]
    extra: Any
    vocab_size: int


def is_run(path: Path) -> bool:
    """Whether this is a run of growmoe's (a folder, or its checkpoint)."""
    folder = path if path.is_dir() else path.parent
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(saved, dict) and "config" in saved


def is_hugging_face(path: Path) -> bool:
    """Whether this is a folder with a config.json of transformers'."""
    try:
        saved = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(saved, dict) and ("model_type" in saved or "architectures" in saved)


def load_run(path: Path) -> LoadedRun:
    """Read a run's folder, or a checkpoint with its config.json beside it.

    Raises:
        CompressError: there is no run, or it is damaged.
    """
    folder = path if path.is_dir() else path.parent
    checkpoint = folder / CHECKPOINT if path.is_dir() else path
    if not is_run(path):
        raise CompressError(
            f"{path} is neither a run of growmoe train-lm (config.json and {CHECKPOINT}) nor a "
            "Hugging Face folder"
        )
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        known = TrainConfig.__dataclass_fields__
        config = TrainConfig(**{k: v for k, v in saved["config"].items() if k in known})
        tokenizer = _tokenizer(config)
        model = build_model(config, tokenizer.vocab_size)
        extra = growmoe.load(checkpoint, model, random_state=False)
    except (TrainError, TypeError, ValueError, OSError) as error:
        raise CompressError(f"{path}: {error}") from error
    for name, layer in growmoe.moe_layers(model).items():
        layer.name = name
    return LoadedRun(folder, model.eval(), config, saved, extra, tokenizer.vocab_size)


def _tokenizer(config: TrainConfig) -> ByteTokenizer | FileTokenizer:
    return ByteTokenizer() if config.tokenizer is None else FileTokenizer(config.tokenizer)


def texts_of(run: LoadedRun, options: Options) -> Texts:
    """Files where they are given; else the run's own texts: train calibrates, validation selects,
    test evaluates.

    Raises:
        CompressError: a text cannot be read or is too short.
    """
    sizes = {
        "sequence_length": options.sequence_length or run.config.sequence_length,
        "samples": options.samples,
        "batch_size": options.batch_size,
    }
    encode = _tokenizer(run.config).encode
    if options.calibration is not None:
        read = read_texts(
            options.calibration, options.evaluation, encode, seed=options.seed, **sizes
        )
        if options.evaluation:
            return read
        return replace(read, evaluation=_own(run, options).evaluation)
    own = _own(run, options)
    if not options.evaluation:
        return own
    paths = options.evaluation.items()
    return replace(own, evaluation={n: read_windows(path, encode, **sizes) for n, path in paths})


def _own(run: LoadedRun, options: Options) -> Texts:
    config = run.config
    length = options.sequence_length or config.sequence_length
    try:
        domains = load_domains(
            config.domains, config.bytes_per_domain, tokenizer=_tokenizer(config)
        )
        each = -(-options.samples // len(domains))

        def cut(domain: Domain, split: Split, number: int) -> list[Tensor]:
            return list(windows(domain, split, number, length).split(options.batch_size))

        calibration = [b for d in domains.values() for b in cut(d, "train", each)]
        selection = [b for d in domains.values() for b in cut(d, "validation", -(-each // 4))]
        evaluation = {name: cut(d, "test", options.samples) for name, d in domains.items()}
    except TrainError as error:
        raise CompressError(str(error)) from error

    def training(step: int) -> Tensor:
        # beyond the steps that pretraining took, so that batches are new
        x_BS, y_BS, _ = batch(
            domains, None, config.steps + step, config.seed, config.batch_size, length
        )
        return torch.cat([x_BS, y_BS[:, -1:]], 1)

    return Texts(calibration, selection, evaluation, training)


def save_run(run: LoadedRun, folder: Path, report: dict[str, Any]) -> None:
    """Write the model, its lineage and its configuration into a folder.

    Raises:
        CompressError: the disk does not take it.
    """
    try:
        growmoe.save(folder / CHECKPOINT, run.model, extra=run.extra)
    except ValueError as error:  # what safetensors makes of a full disk
        reason = str(error).removeprefix(f"{folder / CHECKPOINT}: ")  # the folder is to go
        raise CompressError(f"{CHECKPOINT} {reason}") from error
    saved = {**run.saved, "compressed": [*run.saved.get("compressed", []), report]}
    (folder / "config.json").write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    events = [e for layer in growmoe.moe_layers(run.model).values() for e in layer.lineage]
    lines = [json.dumps(event.to_json()) + "\n" for event in events]
    (folder / "lineage.jsonl").write_text("".join(lines), encoding="utf-8")
