"""Letters of many scripts, rendered from the Noto fonts: an Omniglot that needs no download."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import torch

from growmoe.continual import require
from growmoe.continual.data.idx import DataError
from growmoe.continual.stream import Data

NOTO = Path("/usr/share/fonts/truetype/noto")
# a font and the first of its letters, by script
SCRIPTS: dict[str, tuple[str, int]] = {
    "latin": ("NotoSans", 0x61),
    "greek": ("NotoSans", 0x3B1),
    "cyrillic": ("NotoSans", 0x430),
    "armenian": ("NotoSansArmenian", 0x561),
    "hebrew": ("NotoSansHebrew", 0x5D0),
    "devanagari": ("NotoSansDevanagari", 0x915),
    "tamil": ("NotoSansTamil", 0xB95),
    "thai": ("NotoSansThai", 0xE01),
    "georgian": ("NotoSansGeorgian", 0x10D0),
    "cherokee": ("NotoSansCherokee", 0x13A0),
}
LETTERS, TRAIN, TEST, SIZE = 10, 60, 20, 28


def read_glyphs(data_dir: Path | None = None) -> list[Data]:
    """For each script, 600 train and 200 test images of 28x28 of its first ten letters.

    Each image is a letter in regular or bold, turned by up to 12 degrees, sheared, scaled and
    shifted; the same images every time.

    Args:
        data_dir: a folder of Noto fonts, in place of Debian's.
    """
    folder = data_dir or NOTO
    draw, fonts = require("PIL.ImageDraw"), require("PIL.ImageFont")
    image = require("PIL.Image")
    rng = np.random.default_rng(0)
    scripts = []
    for name, (stem, first) in SCRIPTS.items():
        letters = [c for c in map(chr, range(first, first + 64))
                   if unicodedata.category(c) in ("Lo", "Ll", "Lu")][:LETTERS]  # fmt: skip
        loaded = []
        for weight in ("Regular", "Bold"):
            path = folder / f"{stem}-{weight}.ttf"
            try:
                if not path.is_file():  # Pillow would look for it elsewhere
                    raise OSError("no such file")
                loaded.append(fonts.truetype(str(path), 64))
            except OSError as error:
                raise DataError(
                    f"{path} is missing or damaged ({error}): the script {name} needs it; install "
                    "Debian's fonts-noto-core, or name a folder of Noto fonts with --data-dir"
                ) from error
        parts: dict[bool, list[np.ndarray]] = {True: [], False: []}
        for letter in letters:
            canvases = []
            for font in loaded:
                canvas = image.new("L", (128, 128))
                draw.Draw(canvas).text((64, 64), letter, fill=255, font=font, anchor="mm")
                canvases.append(canvas)
            for i in range(TRAIN + TEST):
                angle, shear = rng.uniform(-0.21, 0.21), rng.uniform(-0.2, 0.2)
                scale = rng.uniform(0.85, 1.2) * 84 / SIZE
                turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
                matrix = scale * turn @ np.array([[1.0, shear], [0.0, 1.0]])
                offset = 64 - matrix @ (SIZE / 2 + rng.uniform(-2, 2, 2))
                coefficients = np.column_stack([matrix, offset]).flatten().tolist()
                made = canvases[int(rng.integers(2))].transform(
                    (SIZE, SIZE), image.Transform.AFFINE, coefficients, image.Resampling.BILINEAR
                )
                parts[i < TRAIN].append(np.asarray(made, np.uint8))
        pixels = {k: torch.from_numpy(np.stack(v)).unsqueeze(1) for k, v in parts.items()}
        labels = torch.arange(len(letters))
        scripts.append(
            Data(
                pixels[True],
                labels.repeat_interleave(TRAIN),
                pixels[False],
                labels.repeat_interleave(TEST),
                255,
            )
        )
    return scripts
