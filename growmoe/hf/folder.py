"""Model folders in memory: load one, and write one that plain transformers or growmoe can load.

growmoe's own format is for what a config of transformers cannot say, different numbers of experts
per layer: `growmoe.json` with the config and the counts, and the weights by their names in memory.
It has no `model.safetensors` and another model type, so that transformers refuses it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from growmoe.compress.layer import CompressError
from growmoe.compress.output import writing
from growmoe.hf.block import allow_uneven, blocks_of, layers_of
from growmoe.hf.families import family_of
from growmoe.hf.shards import Checkpoint

FORMAT = "growmoe-hf-1"
OWN, WEIGHTS = "growmoe.json", "growmoe.safetensors"


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


def read_config(path: str | Path) -> Any:
    """The config of a folder of a known family.

    Raises:
        CompressError: there is none, or it is of no family that is known here.
    """
    transformers = require()
    path = Path(path)
    if (path / OWN).is_file():
        return _read_own(path)[0]
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind = raw.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CompressError(f"{path} is no folder of a model: {_line(error)}") from error
    family_of(SimpleNamespace(model_type=kind))
    try:
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # its own checks raise many kinds
        raise CompressError(f"{path}/config.json: {_line(error)}") from error


def tokenizer_of(path: Path) -> Any:
    """The tokenizer in a folder.

    Raises:
        CompressError: there is none.
    """
    config = read_config(path)
    try:
        tokenizer = require().AutoTokenizer.from_pretrained(
            path, config=config, local_files_only=True
        )
    except Exception as error:  # of many kinds, by what is missing
        raise CompressError(f"{path} has no tokenizer that can be read: {_line(error)}") from error
    # without files transformers may make one that knows no word
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise CompressError(f"{path} has no tokenizer: its files are missing or empty")
    return tokenizer


def load(path: str | Path, **options: Any) -> Any:
    """A causal language model from a folder, plain or in growmoe's own format.

    Args:
        path: a local folder.
        options: for `from_pretrained`, such as `device_map`; not with growmoe's own format.

    Raises:
        CompressError: no known family, torn or missing files.
    """
    path = Path(path)
    if (path / OWN).is_file():
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


def save(
    model: Any, path: str | Path, *, uneven: bool = False, source: str | Path | None = None
) -> None:
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
        write(model, folder, uneven=uneven, source=None if source is None else Path(source))


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
        ours = file.name in ("config.json", OWN) or file.name.startswith("report.")
        if file.is_file() and not (weights or index or ours) and not (folder / file.name).exists():
            shutil.copy2(file, folder / file.name)


def _write_own(model: Any, folder: Path, counts: dict[str, int]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    config = model.config.to_dict()
    family = family_of(model.config)
    config[family.count] = max(counts.values())
    held = {"format": FORMAT, "config": config, "experts": counts}
    (folder / OWN).write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    shown = {
        "model_type": f"growmoe_{config['model_type']}",
        "growmoe": "layers hold different numbers of experts: load with growmoe.hf.load",
    }
    (folder / "config.json").write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    try:
        save_model(model, str(folder / WEIGHTS))
    except SafetensorError as error:
        raise CompressError(f"the model cannot be written: {_line(error)}") from error


def _read_own(path: Path) -> tuple[Any, dict[str, int]]:
    """The config, and the number of experts of each block."""
    transformers = require()
    try:
        held = json.loads((path / OWN).read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            raise ValueError(f"its format is {held['format']!r}, not {FORMAT!r}")
        return transformers.AutoConfig.for_model(**held["config"]), dict(held["experts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompressError(f"{path / OWN}: {_line(error)}") from error


def _load_own(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    config, counts = _read_own(path)
    dtype = getattr(config, "dtype", None)
    model = require().AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
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
