"""What `growmoe prune`, `merge` and `inspect` do with a Hugging Face folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from growmoe.compress.act import act_on
from growmoe.compress.api import inspect
from growmoe.compress.choose import Progress
from growmoe.compress.layer import CompressError
from growmoe.compress.options import Options
from growmoe.compress.output import writing
from growmoe.compress.report import Inspection, Report
from growmoe.compress.text import Texts, read_texts
from growmoe.hf.block import allow_uneven
from growmoe.hf.folder import load, read_config, require, tokenizer_of, write
from growmoe.hf.streaming import available_bytes, prune_streaming, streams

LONGEST = 512  # tokens of a sequence, unless asked for


def prune_folder(options: Options, progress: Progress, say: Any) -> Report:
    """Prune into a new folder: in memory, or tensor by tensor.

    Raises:
        CompressError: it cannot be done; there is no new folder then.
    """
    with quiet():
        if not streams(options, available_bytes()):
            return _in_memory(options, progress, say)
        say(f"{options.model}: layer by layer, then tensor by tensor")
        return prune_streaming(options, texts_of(options), progress)


def merge_folder(options: Options, progress: Progress, say: Any) -> Report:
    """Merge into a new folder, in memory.

    Raises:
        CompressError: it cannot be done; there is no new folder then.
    """
    with quiet():
        return _in_memory(options, progress, say)


def inspect_folder(options: Options, progress: Progress, say: Any) -> Inspection:
    """What `growmoe.compress.inspect` tells of a model; with a text, also loads and likeness."""
    with quiet():
        texts = None if options.calibration is None else texts_of(options)
        progress(0.0, "reading")
        model = load(options.model)
        batches = None if texts is None else texts.calibration
        return inspect(model, batches, seed=options.seed, progress=progress)


def _in_memory(options: Options, progress: Progress, say: Any) -> Report:
    assert options.output is not None
    clock = time.perf_counter()
    texts = texts_of(options)
    progress(0.0, "reading")
    model = load(options.model)
    reference = None if options.reference is None else load(options.reference)
    with allow_uneven() if options.trust else nullcontext(), writing(options.output) as folder:
        report = act_on(model, texts, options, reference, progress, say)
        progress(1.0, "writing")
        write(model, folder, uneven=options.trust, source=options.model)
        report.model = {
            "path": str(options.model),
            "kind": model.config.model_type,
            "command": options.command,
        }
        report.seconds = time.perf_counter() - clock
        report.write(folder)
    return report


def texts_of(options: Options) -> Texts:
    """The texts that were given, in the tokens of the folder's own tokenizer.

    Raises:
        CompressError: no text to calibrate on, or one that cannot be read or is too short.
    """
    config = read_config(options.model)
    if options.calibration is None:
        raise CompressError(
            f"{options.model} comes without the text it was trained on: give --calibration FILE"
        )
    tokenizer = tokenizer_of(options.model)

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    most = getattr(config, "max_position_embeddings", None) or LONGEST
    return read_texts(
        options.calibration,
        options.evaluation,
        encode,
        sequence_length=options.sequence_length or min(LONGEST, most),
        samples=options.samples,
        batch_size=options.batch_size,
        seed=options.seed,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and warnings of transformers, which would lie over our own."""
    logging = require().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
