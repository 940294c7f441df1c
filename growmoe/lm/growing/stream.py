"""Streams of text whose domain changes, for measuring: shuffled windows, or documents in order.

B sequences in a batch    S tokens in a sequence
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from growmoe.lm.config import TrainError
from growmoe.lm.domains import Domain

Order = Literal["shuffled", "documents"]


@dataclass(frozen=True)
class TextStream:
    """Batches of one domain after the other, the same whenever they are asked for.

    Args:
        domains: name -> domain.
        phases: a domain's name and the number of its batches, in turn; a name may return. The name
            of several, joined with "+", draws each sequence's domain evenly.
        order: "shuffled" draws each window anywhere; in "documents" each of the B rows reads on
            through the documents, and takes up a domain that returns where it left it.
        stagger: batches over which the rows change their domain, one after the other, so that
            boundaries fall inside batches.
        seed: of the draws, and of where reading begins.
    """

    domains: Mapping[str, Domain]
    phases: Sequence[tuple[str, int]]
    order: Order = "shuffled"
    batch_size: int = 16
    sequence_length: int = 128
    stagger: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise TrainError(f"order must be one of {', '.join(get_args(Order))}: {self.order!r}")
        for name, steps in self.phases:
            for part in name.split("+"):
                if part not in self.domains:
                    raise TrainError(f"no domain {part!r}: choose from {', '.join(self.domains)}")
                if len(self.domains[part].train) < 2 * self.sequence_length + 2:
                    raise TrainError(f"domain {part!r} is too short for {self.sequence_length}")
            if steps < 1:
                raise TrainError(f"a phase must have batches, got {steps!r} of {name!r}")
        if not 1 <= self.stagger <= min(steps for _, steps in self.phases):
            raise TrainError(f"stagger must be from 1 to the shortest phase, got {self.stagger!r}")

    def __len__(self) -> int:
        return sum(steps for _, steps in self.phases)

    @property
    def boundaries(self) -> list[int]:
        """The batches, counted from 0, in which the first sequence of another phase comes."""
        ends, total = [], 0
        for _, steps in self.phases[:-1]:
            total += steps
            ends.append(total)
        return ends

    def __iter__(self) -> Iterator[Tensor]:
        """int64 [B, S + 1] each."""
        generator = torch.Generator().manual_seed(7_919 * self.seed + 1)
        rows, length = self.batch_size, self.sequence_length
        place = {
            name: torch.rand(rows, generator=generator, dtype=torch.float64)
            .mul(len(domain.train) - length - 1)
            .long()
            for name, domain in self.domains.items()
        }
        window = torch.arange(length + 1)
        for step in range(len(self)):
            batch = torch.empty(rows, length + 1, dtype=torch.int64)
            for row in range(rows):
                names = self._phase(step, row).split("+")
                draw = int(torch.randint(len(names), (), generator=generator))
                tokens = self.domains[names[draw]].train
                most = len(tokens) - length - 1
                if self.order == "shuffled":
                    start = int(torch.randint(most, (), generator=generator))
                else:
                    start = int(place[names[draw]][row])
                    place[names[draw]][row] = (start + length) % most
                batch[row] = tokens[start + window].long()
            yield batch

    def _phase(self, step: int, row: int) -> str:
        # row 0 changes at the boundary, the last row `stagger` - 1 batches later
        late = row * self.stagger // self.batch_size
        end = 0
        for name, steps in self.phases:
            end += steps
            if step < end + late:
                return name
        return self.phases[-1][0]
