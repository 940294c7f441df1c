"""An expert that is a sufficient statistic: what was routed to it, summed up.

Legend: R rows, D features, G = D + 1 (the features and a constant 1), C labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_stamps = itertools.count()
_PANEL = 128  # rows of a panel: what is stored below the diagonal is at most this wide


class Moments(nn.Module):
    """A closed-form expert of one label: count, sum and second moment of its inputs.

    In training mode, a forward adds its rows to `moment`, the sum over rows of [x, 1]ᵀ [x, 1],
    whose corner is the count. Sums do not depend on the order of the inputs, so it cannot forget;
    merging two of them is exact addition, and rows can be taken back by subtraction. It has no
    parameters; `ClosedFormGate` solves heads from its moments. Its output is its label, one-hot.

    The moment is symmetric, so only panels of 128 rows from the diagonal rightwards are kept:
    little more than half of it, and half the work. With several `blocks`, features of different
    blocks are never multiplied: B blocks keep a B-th of the numbers, and each has heads of its own
    (see `ClosedFormGate`).

    Args:
        num_labels: C.
        label: what it is for, in [0, C).
        d_model: D.
        blocks: the widths of the blocks that the features are made of, in order; one if left out.

    Buffers: ``panels`` float32 [about Σ G_b (G_b + 128) / 2], ``label`` int64 [].
    """

    panels: Tensor
    label: Tensor

    def __init__(
        self,
        num_labels: int,
        label: int,
        d_model: int,
        blocks: Sequence[int] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label < num_labels:
            raise ValueError(f"Moments: label must be in [0, {num_labels}), got {label!r}")
        self.blocks = (d_model,) if blocks is None else tuple(blocks)
        if sum(self.blocks) != d_model or min(self.blocks) < 1:
            raise ValueError(f"Moments: blocks {self.blocks} do not make up {d_model} features")
        self.num_labels, self.d_model = num_labels, d_model
        length = moment_numbers(self.blocks)
        self.register_buffer("panels", torch.zeros(length, device=device))
        self.register_buffer("label", torch.tensor(label, device=device))
        self.touch()

    def touch(self) -> None:
        """Tell those who derived something from the moments that these have changed."""
        self.stamp = next(_stamps)

    def _shapes(self) -> Iterator[tuple[int, int, int, int]]:
        """Block, first row, rows and columns of each panel."""
        return _panel_shapes(self.blocks)

    def _each_panel(self) -> Iterator[tuple[int, int, Tensor]]:
        """Block and first row of each panel, and the panel, a view: [rows, G_b - first row]."""
        start = 0
        for b, row, rows, columns in self._shapes():
            yield b, row, self.panels[start : start + rows * columns].view(rows, columns)
            start += rows * columns

    def moments(self) -> list[Tensor]:
        """The whole sum of each block, float32 [G_b, G_b]: copies."""
        whole = [self.panels.new_empty(width + 1, width + 1) for width in self.blocks]
        for b, row, panel in self._each_panel():
            whole[b][row : row + len(panel), row:] = panel
            whole[b][row:, row : row + len(panel)] = panel.T
        return whole

    @property
    def moment(self) -> Tensor:
        """The whole sum, float32 [G, G], of an expert with one block: a copy."""
        (moment_GG,) = self.moments()
        return moment_GG

    def totals(self) -> list[Tensor]:
        """The sum of [x, 1] over the rows for each block, float32 [G_b]."""
        columns: list[list[Tensor]] = [[] for _ in self.blocks]
        for b, _, panel in self._each_panel():
            columns[b].append(panel[:, -1])
        return [torch.cat(parts) for parts in columns]

    @property
    def count(self) -> float:
        """How many rows it has summed up."""
        return float(self.panels[-1])

    @torch.no_grad()
    def add(self, x_RD: Tensor, times: float = 1.0) -> None:
        """Sum up rows, float32 [R, D]; with `times` -1 they are taken back."""
        parts = with_constant(x_RD.float(), self.blocks)
        for b, row, panel in self._each_panel():
            x_RG = parts[b]
            panel.addmm_(x_RG[:, row : row + len(panel)].T, x_RG[:, row:], alpha=times)
        self.touch()

    @torch.no_grad()
    def add_moments(self, moments: Sequence[Tensor]) -> None:
        """Add whole sums, one [G_b, G_b] for each block, as `moments` gives them."""
        for b, row, panel in self._each_panel():
            panel.add_(moments[b][row : row + len(panel), row:])
        self.touch()

    @torch.no_grad()
    def forward(self, x_RD: Tensor) -> Tensor:
        """float32 [R, D] -> [R, C]."""
        if self.training and len(x_RD):
            self.add(x_RD)
        return F.one_hot(self.label, self.num_labels).to(x_RD.dtype).expand(len(x_RD), -1)

    @property
    def merge_key(self) -> int:
        """Only experts of one label can be merged."""
        return int(self.label)

    def cloned(self, noise: float, generator: torch.Generator) -> Moments:
        """A child of the same label that begins with nothing: the parent's inputs stay its own."""
        return Moments(
            self.num_labels, int(self.label), self.d_model, self.blocks, device=self.panels.device
        )

    def fresh(self, d_model: int, d_out: int, **place: Any) -> Moments:
        """An empty expert of this label."""
        return self.cloned(0.0, place["generator"])

    @torch.no_grad()
    def merged(self, others: Sequence[Moments], weights: Sequence[float]) -> Moments:
        """The sum of all moments: exactly what one expert would hold that had seen all the rows.

        Args:
            others: of the same label.
            weights: the rows each received, self first; more than it summed up if it was frozen.

        Raises:
            ValueError: experts of different labels.
        """
        labels = {int(body.label) for body in (self, *others)}
        if len(labels) > 1:
            raise ValueError(f"merge: experts of different labels {sorted(labels)}")
        result = self.cloned(0.0, torch.Generator())
        for body, rows in zip((self, *others), weights, strict=True):
            # one that was frozen stands for more rows than it summed up
            result.panels.add_(body.panels, alpha=max(1.0, rows / max(body.count, 1.0)))
        return result

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws from the Gaussian with these moments, as evidence without examples: [count, D].

        Features of different blocks are drawn independently.
        """
        draws = []
        for moment_GG in self.moments():
            moment_GG = moment_GG.double()
            n = moment_GG[-1, -1].clamp_min(1)
            mean_D = moment_GG[-1, :-1] / n
            cov_DD = moment_GG[:-1, :-1] / n - mean_D[:, None] * mean_D
            value_D, vector_DD = torch.linalg.eigh(cov_DD)
            draw = torch.randn(count, len(mean_D), generator=generator, dtype=torch.float64)
            draw = draw.to(cov_DD.device) * value_D.clamp_min(0).sqrt()
            draws.append((mean_D + draw @ vector_DD.T).float())
        return torch.cat(draws, 1)

    def _apply(self, fn: Any, recurse: bool = True) -> Moments:
        # moves with the model, but .bfloat16() would stop the sums
        panels, label = self.panels, self.label
        super()._apply(fn, recurse)
        self.panels = panels.to(self.panels.device)
        self.label = label.to(self.label.device)
        self.touch()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.touch()  # another process has counted its own stamps

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.touch()

    def extra_repr(self) -> str:
        return f"label={int(self.label)}, count={self.count:.0f}"


def _panel_shapes(blocks: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    for b, width in enumerate(blocks):
        for row in range(0, width + 1, _PANEL):
            yield b, row, min(_PANEL, width + 1 - row), width + 1 - row


def moment_numbers(blocks: Sequence[int]) -> int:
    """How many numbers `Moments` keeps of features in these blocks."""
    return sum(rows * columns for _, _, rows, columns in _panel_shapes(blocks))


def with_constant(x_RD: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """Each block of features with a constant 1 behind: [R, D] -> [R, G_b] for each."""
    return [F.pad(part, (0, 1), value=1.0) for part in x_RD.split(list(blocks), dim=1)]
