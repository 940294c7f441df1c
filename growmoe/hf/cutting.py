"""Which bytes of a checkpoint are left when experts go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from growmoe.compress.layer import CompressError
from growmoe.hf.families import Family
from growmoe.hf.shards import Checkpoint, Cut

_LAYER = re.compile(r"(?P<start>.*\blayers\.(?P<number>\d+)\.)(?P<inner>.+)")
_EXPERT = re.compile(r"experts\.(?P<expert>\d+)\.(?P<part>.+)")


def cuts_of(
    checkpoint: Checkpoint, family: Family, config: Any, keep: Mapping[int, Sequence[int]]
) -> tuple[dict[str, Cut], list[str]]:
    """What is kept of each tensor.

    Args:
        keep: number of a decoder layer -> the experts that stay.

    Returns:
        Name -> what is kept, and the names that are left out although no expert of theirs went:
        layers that the config does not count (multi-token prediction), which transformers does not
        load and which no calibration reaches.

    Raises:
        CompressError: experts where this family is not known to have any.
    """
    cuts: dict[str, Cut] = {}
    extra: list[str] = []
    for name, entry in checkpoint.entries.items():
        found = _LAYER.fullmatch(name)
        if found is None or not found["inner"].startswith(f"{family.disk_block}."):
            if ".experts." in name:
                raise CompressError(f"{name} is an expert where none was expected")
            cut: Cut | None = Cut(name)
        elif int(found["number"]) in keep:
            start = f"{found['start']}{family.disk_block}."
            cut = _in_block(name, start, entry.shape, family, keep[int(found["number"])])
        else:
            cut = Cut(name)
        if found is not None and int(found["number"]) >= config.num_hidden_layers:
            extra.append(name)
        elif cut is not None:
            cuts[name] = cut
    return cuts, extra


def _in_block(
    name: str, start: str, shape: tuple[int, ...], family: Family, keep: Sequence[int]
) -> Cut | None:
    inner = name[len(start) :]
    expert = _EXPERT.fullmatch(inner)
    if expert is not None:
        number = int(expert["expert"])
        if number not in keep:
            return None
        return Cut(f"{start}experts.{keep.index(number)}.{expert['part']}")
    memory = family.disk_rows.get(inner, inner)
    if memory in family.rows:
        return Cut(name, family.rows[memory], tuple(keep))
    if memory.startswith("experts."):
        return Cut(name, 0, tuple(keep))
    return Cut(name)
