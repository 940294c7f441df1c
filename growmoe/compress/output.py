"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from growmoe.compress.layer import CompressError


def check_output(output: Path, *sources: Path) -> None:
    """Raise CompressError if something is at `output`, or it lies in what is read."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CompressError(f"{output} is there already: choose another --output")
    for source in sources:
        inside, around = output.resolve(), source.resolve()
        if inside == around or around in inside.parents:
            raise CompressError(f"{output} lies in {source}, which must stay as it is")


@contextmanager
def writing(output: str | Path) -> Iterator[Path]:
    """A folder beside `output` to write to; it takes that name once all is well, else it goes.

    Raises:
        CompressError: there is something at `output`, or the disk cannot take it.
    """
    output = Path(output)
    check_output(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    except OSError as error:
        raise CompressError(f"cannot write to {output}: {error.strerror or error}") from error
    try:
        yield made
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(made, 0o777 & ~umask)  # mkdtemp makes it private
        if output.exists():
            output.rmdir()  # empty, as checked
        os.replace(made, output)
    except OSError as error:
        raise CompressError(f"cannot write to {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
