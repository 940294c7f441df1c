"""The experts of a layer, and how an Assignment is run through them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.experts.pool import Counts, Pool, globally_hooked, poolable


class ExpertBank(nn.Module, Mapping[int, Expert]):
    """A mapping id -> Expert in ascending order of id, which runs each expert on its rows.

    Feed-forward experts of one shape lie in one pool and run as one grouped matmul; any other
    expert runs by itself. The pools follow by themselves whatever is done to the experts.
    """

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.d_out = d_out
        self._layout: list[tuple[list[int], Pool | None]] = []
        self._laid_out: list[Expert] = []
        self._tied: set[int] = set()

    # The mapping. Keys of the state dict are the ids.

    def __getitem__(self, id: int) -> Expert:
        expert = self._modules.get(str(id)) if isinstance(id, int) else None
        if expert is None:
            raise KeyError(f"no expert {id!r}; the living are {list(self)}")
        return expert  # type: ignore[return-value]

    def __iter__(self) -> Iterator[int]:
        return (int(key) for key in self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, int) and str(id) in self._modules

    __hash__ = nn.Module.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def replace(self, experts: Sequence[Expert]) -> None:
        """Hold these experts from now on; only surgery and loading call it."""
        self._modules.clear()
        for expert in sorted(experts, key=lambda e: e.id):
            self._modules[str(expert.id)] = expert

    # The computation.

    def forward(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """Each row through its expert: [T, D] -> [R, O], rows sorted by expert."""
        experts: list[Expert] = list(self._modules.values())  # type: ignore[arg-type]
        return self.run(experts, assignment.dispatch(x_TD), assignment)

    def run(self, experts: list[Expert], x_RD: Tensor, assignment: Assignment) -> Tensor:
        """Rows sorted by expert through these: [R, D] -> [R, O]; of the rest, counts are read."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            # under a functorch transform Parameters are not what they seem
            return run_each(experts, x_RD, assignment, self.d_out)
        layout = self._current_layout(experts)
        if len(layout) == 1 and layout[0][1] is not None:
            return layout[0][1](x_RD, Counts(assignment.counts_E))

        counts = assignment.counts_E.tolist()
        sections = list(x_RD.split(counts))
        outputs: list[Tensor] = sections
        for positions, pool in layout:
            if pool is None:
                for e in positions:
                    outputs[e] = run_alone(experts[e], sections[e], self.d_out)
                continue
            rows = torch.cat([sections[e] for e in positions])
            group = Counts(torch.tensor([counts[e] for e in positions], device=x_RD.device))
            parts = pool(rows, group).split([counts[e] for e in positions])
            for e, part in zip(positions, parts, strict=True):
                outputs[e] = part
        common = _common_dtype(outputs)
        return torch.cat([y.to(common) for y in outputs])

    def _current_layout(self, experts: list[Expert]) -> list[tuple[list[int], Pool | None]]:
        current = len(experts) == len(self._laid_out) and all(
            a is b for a, b in zip(experts, self._laid_out, strict=True)
        )
        for positions, pool in self._layout if current else ():
            if pool is not None:
                current &= pool.holds()
            else:
                alone = (experts[e] for e in positions)
                current &= all(e.id in self._tied or poolable(e) is None for e in alone)
        if not current or globally_hooked():
            self._lay_out(experts)
        return self._layout

    def _lay_out(self, experts: list[Expert]) -> None:
        owners: dict[int, int] = {}
        for expert in experts:
            # with duplicates: an expert's parameters may also be tied to each other
            for _, p in expert.body.named_parameters(remove_duplicate=False):
                owners[p.data_ptr()] = owners.get(p.data_ptr(), 0) + 1
        self._tied = {
            e.id for e in experts if any(owners[p.data_ptr()] > 1 for p in e.body.parameters())
        }
        groups: dict[Any, list[int]] = {}
        for position, expert in enumerate(experts):
            alone = globally_hooked() or expert.id in self._tied
            groups.setdefault(None if alone else poolable(expert), []).append(position)
        self._layout = [
            (where, None if key is None else Pool([experts[e] for e in where]))
            for key, where in groups.items()
        ]
        self._laid_out = experts

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_layout"], state["_laid_out"] = [], []
        return state


def run_each(experts: Sequence[Expert], x_RD: Tensor, assignment: Assignment, d_out: int) -> Tensor:
    """The plain way, a loop over experts that touches no pool: [R, D] -> [R, O]."""
    sections = x_RD.split(assignment.counts_E.tolist())
    outputs = [run_alone(e, rows, d_out) for e, rows in zip(experts, sections, strict=True)]
    common = _common_dtype(outputs)
    return torch.cat([y.to(common) for y in outputs])


def run_alone(expert: Expert, x_RD: Tensor, d_out: int) -> Tensor:
    """One expert on its rows; without rows it is not called, so that it gets no gradient.

    Raises:
        ValueError: the expert's output has not the layer's width.
    """
    if len(x_RD) == 0:
        return x_RD.new_zeros(0, d_out)
    y_RO = expert(x_RD)
    if y_RO.shape != (len(x_RD), d_out):
        raise ValueError(
            f"expert {expert.id} ({type(expert.body).__name__}) mapped {tuple(x_RD.shape)} to "
            f"{tuple(y_RO.shape)}, expected {(len(x_RD), d_out)}"
        )
    if y_RO.requires_grad and not expert.frozen:

        def touch(_: Tensor) -> None:
            expert.touches += 1

        y_RO.register_hook(touch)
    return y_RO


def _common_dtype(outputs: Sequence[Tensor]) -> torch.dtype:
    dtypes = [y.dtype for y in outputs if len(y)] or [y.dtype for y in outputs]
    common = dtypes[0]
    for dtype in dtypes[1:]:
        common = torch.promote_types(common, dtype)
    return common
