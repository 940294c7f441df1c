"""The hidden folder beside an output in which a long run keeps what it has done."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from growmoe.compress.layer import CompressError
from growmoe.compress.options import Options
from growmoe.hf.anonymous import Peak
from growmoe.hf.shards import Checkpoint, settle


class Work:
    """The hidden folder: what is done so far, and the model as it grows.

    Attributes:
        folder: of all of it. model: in it, the folder that becomes the output.
        told: what is kept in a file between runs: the job, seconds, peak (bytes), runs, and more.

    Raises:
        CompressError: it holds the beginnings of another job.
    """

    def __init__(self, options: Options, checkpoint: Checkpoint, peak: Peak) -> None:
        assert options.output is not None
        self._peak, self._clock = peak, time.perf_counter()
        self.output = options.output
        self.folder = self.output.parent / f".{self.output.name}.unfinished"
        self.model = self.folder / "model"
        job = _fingerprint(options, checkpoint)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            state = self.folder / "state.json"
            self.told: dict[str, Any] = {"job": job, "seconds": 0.0, "peak": None, "runs": 0}
            if state.is_file():
                self.told = json.loads(state.read_text(encoding="utf-8"))
            if self.told["job"] != job:
                raise CompressError(
                    f"{self.folder} holds an unfinished run with other settings or of another "
                    "model: finish that, or remove the folder"
                )
            self.keep(runs=self.told["runs"] + 1)
        except OSError as error:
            raise CompressError(
                f"cannot write to {self.output}: {error.strerror or error}"
            ) from error

    def keep(self, **told: Any) -> None:
        """Remember, from now on also after an interruption; and the time and memory so far."""
        now = time.perf_counter()
        self.told["seconds"] += now - self._clock
        self._clock = now
        if self._peak.bytes is not None:
            self.told["peak"] = max(self.told["peak"] or 0, self._peak.bytes)
        self.told |= told
        partial = self.folder / "state.json.partial"
        partial.write_text(json.dumps(self.told, indent=1), encoding="utf-8")
        os.replace(partial, self.folder / "state.json")

    def store(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        partial = self.folder / f"{name}.partial"
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, str(partial))
        except Exception as error:  # of safetensors, which wraps what the system says
            partial.unlink(missing_ok=True)
            raise CompressError(f"cannot write {partial}: {error}") from error
        settle(partial)
        os.replace(partial, self.folder / name)

    def finish(self) -> None:
        """The model takes its name, and all else goes."""
        if self.output.exists():
            self.output.rmdir()  # empty, as was checked
        os.replace(self.model, self.output)
        shutil.rmtree(self.folder, ignore_errors=True)


def _fingerprint(options: Options, checkpoint: Checkpoint) -> dict[str, Any]:
    settings = {
        k: str(v) if isinstance(v, Path) else v
        for k, v in asdict(options).items()
        if k not in ("command", "evaluation", "streaming")
    }
    texts = {"(calibration)": options.calibration, **options.evaluation}
    stats = {n: (str(p), p.stat()) for n, p in texts.items() if p is not None}
    told = {
        "settings": settings,
        "checkpoint": checkpoint.fingerprint(),
        "texts": {n: [p, s.st_size, s.st_mtime_ns] for n, (p, s) in stats.items()},
    }
    result: dict[str, Any] = json.loads(json.dumps(told))
    return result
