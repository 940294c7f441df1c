"""Model folders in memory: load one, and write one that plain transformers or growmoe can load.

growmoe's own format is for what a config of transformers cannot say, different numbers of experts
per layer: `growmoe.json` with the config and the counts, and the weights by their names in memory.
It has no `model.safetensors` and another model type, so that transformers refuses it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from growmoe.compress.layer import CompressError
from growmoe.compress.output import writing
from growmoe.hf.block import allow_uneven, blocks_of, layers_of
from growmoe.hf.families import family_of
from growmoe.hf.shards import Checkpoint

FORMAT = "growmoe-hf-1"
WEIGHTS = "growmoe.safetensors"


def require() -> Any:
    """transformers.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "growmoe.hf needs transformers, which is not installed: pip install 'growmoe[hf]'"
        ) from error
    return transformers


def is_model_folder(path: str | Path) -> bool:
    """Whether this is a folder of a transformers model, or of growmoe's own format."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and ("model_type" in config or "architectures" in config)


def read_config(path: str | Path) -> Any:
    """The config of a folder of a known family.

    Raises:
        CompressError: there is none, or it is of no family that is known here.
    """
    transformers = require()
    path = Path(path)
    if not is_model_folder(path):
        raise CompressError(f"{path} is no folder of a model: it has no config.json of one")
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    kind = raw.get("model_type")
    family_of(type("Config", (), {"model_type": kind}))
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CompressError(f"{path}/config.json: {_line(error)}") from error
    return config


def load(path: str | Path, **options: Any) -> nn.Module:
    """A causal language model from a folder, plain or in growmoe's own format.

    Args:
        path: a local folder.
        options: for `from_pretrained`, such as `device_map`; not with growmoe's own format.

    Raises:
        CompressError: no known family, torn or missing files.
    """
    path = Path(path)
    if (path / "growmoe.json").is_file():
        return _load_own(path)
    transformers = require()
    read_config(path)
    Checkpoint(path)  # torn files are refused by name
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, output_loading_info=True, **{"dtype": "auto", **options}
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CompressError(f"{path} cannot be loaded: {_line(error)}") from error
    missing = info["missing_keys"]
    if missing:
        raise CompressError(f"{path}: {len(missing)} tensors are missing, {sorted(missing)[0]} …")
    return model.eval()


def save(model: Any, path: str | Path, *, uneven: bool = False, source: Path | None = None) -> None:
    """Write a model to a new folder, whole or not at all.

    Args:
        path: the folder; there must be nothing yet.
        uneven: where layers hold different numbers of experts, write growmoe's own format, which
            `load` reads.
        source: a folder whose tokenizer and other small files are copied.

    Raises:
        CompressError: there is something at `path`, the disk cannot take it, or layers hold
            different numbers of experts.
    """
    with writing(path) as folder:
        write(model, folder, uneven=uneven, source=source)


def write(model: Any, folder: Path, *, uneven: bool = False, source: Path | None = None) -> None:
    """As `save`, into a folder that is there."""
    counts = {place.name: place.count for place in blocks_of(model)}
    if len(set(counts.values())) > 1:
        if not uneven:
            raise CompressError(
                f"layers hold {sorted(set(counts.values()))} experts, and transformers could not "
                "load that: ask for growmoe's own format (uneven=True, --own-format)"
            )
        _write_own(model, folder, counts)
    else:
        try:
            model.save_pretrained(folder)
        except Exception as error:
            if "No space" in str(error) or type(error).__name__ == "SafetensorError":
                raise CompressError(f"the model cannot be written: {_line(error)}") from error
            raise
    if source is not None:
        copy_small_files(source, folder)


def copy_small_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation config and whatever else lies beside the weights."""
    for file in sorted(source.iterdir()):
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".gguf", ".h5", ".msgpack")
        index = file.name.endswith(".index.json")
        ours = file.name in ("config.json", "growmoe.json") or file.name.startswith("report.")
        if file.is_file() and not (weights or index or ours) and not (folder / file.name).exists():
            shutil.copy2(file, folder / file.name)


def _write_own(model: Any, folder: Path, counts: dict[str, int]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    config = model.config.to_dict()
    family = family_of(model.config)
    config[family.count] = max(counts.values())
    held = {"format": FORMAT, "config": config, "experts": counts}
    (folder / "growmoe.json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    shown = {
        "model_type": f"growmoe_{config['model_type']}",
        "growmoe": "layers hold different numbers of experts: load with growmoe.hf.load",
    }
    (folder / "config.json").write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    try:
        save_model(model, str(folder / WEIGHTS))
    except SafetensorError as error:
        raise CompressError(f"the model cannot be written: {_line(error)}") from error


def _load_own(path: Path) -> nn.Module:
    transformers = require()
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        held = json.loads((path / "growmoe.json").read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            raise CompressError(f"{path}/growmoe.json is of a format unknown here")
        config = transformers.AutoConfig.for_model(**held["config"])
        counts: dict[str, int] = held["experts"]
    except (OSError, ValueError, KeyError) as error:
        raise CompressError(f"{path}/growmoe.json: {_line(error)}") from error
    dtype = getattr(config, "dtype", None)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    with allow_uneven():
        for layer in layers_of(model):
            layer.keep_first(counts[layer.name])
    try:
        load_model(model, str(path / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CompressError(f"{path} cannot be loaded: {_line(error)}") from error
    return model.eval()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
