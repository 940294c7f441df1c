"""The router of a transformers block as a growmoe router: its own code, over experts that change.

The rows of its tensors become entries of the experts. For each forward they are stacked, lent to
the family's router, and that is called: no gating is written here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.hf.families import Family
from growmoe.hf.masking import OffsetLogits
from growmoe.routers.gate import Context, Entry, linear_key
from growmoe.routers.router import Router, Routing


class TransformersRouter(Router):
    """Chooses as the router of a transformers block does.

    A newborn's logit is offset by the log of how far it is let in. With groups of experts
    (DeepSeek), a clone stays in its parent's group, a fresh expert comes into group id mod groups,
    and while groups are unequal the smaller are filled up with experts that are never chosen.

    Args:
        module: the family's router. Its tensors of `family.rows` must be gone when it is called.
        rows: path in the block -> such a tensor.

    Attributes:
        paths: name of an entry -> path in the block.
        learns: path -> whether it is trained.
    """

    def __init__(
        self, module: nn.Module, family: Family, config: Any, rows: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.family = family
        self.k = int(getattr(config, family.k))
        self.fewest = family.fewest(config)
        self.groups = family.groups_of(config)[0]
        self.module: Any = module
        self.paths = {entry_name(path): path for path in rows}
        self._groups: dict[int, tuple[tuple[int, int], int]] = {}
        self.learns = {path: value.requires_grad for path, value in rows.items()}

    @property
    def min_experts(self) -> int:  # type: ignore[override]
        return self.fewest

    def entries(self, d_model: int) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for name, path in self.paths.items():
            if path == f"{self.family.router}.weight":
                key = linear_key(d_model)
                found[name] = Entry(key.fresh, parameter=self.learns[path], toward=key.toward)
            else:
                found[name] = Entry(lambda _: torch.zeros(()), parameter=self.learns[path])
        if self.groups > 1:
            found["group"] = Entry(
                lambda _: torch.zeros((), dtype=torch.int64),
                parameter=False,
                merge=lambda values_P, _: values_P[0],
                numbered=lambda id: torch.tensor(id % self.groups),
            )
        return found

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        order = self.order(experts)
        rows = {path: self._stacked(name, experts, order) for name, path in self.paths.items()}
        offset = None
        if None in order or any(expert.admission < 1 for expert in experts):
            offset = self._spread(admission_E, order).log()
            if self.family.correction is not None:
                rows_E = rows[self.family.correction]
                shut = (offset == -torch.inf).expand_as(rows_E)
                rows[self.family.correction] = rows_E.masked_fill(shut, -torch.inf)
        weight = rows[f"{self.family.router}.weight"]
        with self._lent(rows), nullcontext() if offset is None else OffsetLogits(weight, offset):
            x_TD = x_TD.clone() if self.training else x_TD  # some add noise in place
            more = [rows[name] for name in self.family.arguments]
            logits_TE, weight_TK, expert_TK = self.module(x_TD, *more)
        if self.groups > 1:
            expert_TK = self._unpadded(expert_TK, order)
            place = [order.index(e) for e in range(len(experts))]
            logits_TE = logits_TE[:, torch.tensor(place, device=logits_TE.device)]
        logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
        probs_TE = logits_TE.sigmoid() if self.family.sigmoid else logits_TE.softmax(-1)
        assignment = Assignment.from_choice(expert_TK, weight_TK, len(experts))
        return Routing(assignment, probs_TE, logits_TE)

    def order(self, experts: Sequence[Expert]) -> list[int | None]:
        """Positions of the experts as the router wants them, group by group; None fills up."""
        if self.groups == 1:
            return list(range(len(experts)))
        members: list[list[int | None]] = [[] for _ in range(self.groups)]
        for e, expert in enumerate(experts):
            members[self.group_of(expert)].append(e)
        width = max(max(map(len, members)), self.family.group_best)
        return [e for group in members for e in group + [None] * (width - len(group))]

    def group_of(self, expert: Expert) -> int:
        """The number of an expert's group, read from its device once."""
        group: Any = expert.entries.group
        now = (id(group), group._version)
        if self._groups.get(expert.id, (None, 0))[0] != now:
            self._groups[expert.id] = (now, int(group))
        return self._groups[expert.id][1]

    def _spread(self, value_E: Tensor, order: Sequence[int | None]) -> Tensor:
        """Values of the experts in the router's order, 0 for what fills up."""
        if self.groups == 1:
            return value_E
        place = torch.tensor([-1 if e is None else e for e in order], device=value_E.device)
        return torch.cat([value_E, value_E.new_zeros(1)])[place]

    def _stacked(self, name: str, experts: Sequence[Expert], order: Sequence[int | None]) -> Tensor:
        values: list[Tensor] = [getattr(expert.entries, name) for expert in experts]
        nothing = torch.zeros_like(values[0])
        found = [nothing if e is None else values[e] for e in order]
        return torch.stack(found, self.family.rows[self.paths[name]])

    def _unpadded(self, expert_TK: Tensor, order: Sequence[int | None]) -> Tensor:
        position = torch.tensor([-1 if e is None else e for e in order], device=expert_TK.device)
        expert_TK = position[expert_TK]
        if None in order and bool((expert_TK < 0).any()):
            raise ValueError(
                f"{self}: a token's groups hold fewer than {self.k} experts; groups must not "
                "become so unequal"
            )
        return expert_TK

    @contextmanager
    def _lent(self, rows: dict[str, Tensor]) -> Iterator[None]:
        """Within, the family's router has these tensors."""
        lent = []
        for path, value in rows.items():
            owner, last = self.owner(path)
            if owner is not None:
                owner.__dict__[last] = value
                lent.append((owner, last))
        if hasattr(self.module, "num_experts"):
            self.module.num_experts = len(rows[f"{self.family.router}.weight"])
        try:
            yield
        finally:
            for owner, last in lent:
                del owner.__dict__[last]

    def owner(self, path: str) -> tuple[nn.Module | None, str]:
        """The module in the router that a tensor of the block belongs to; None: to the block."""
        first, _, rest = path.partition(".")
        if first != self.family.router:
            return None, path
        owner, _, last = rest.rpartition(".")
        return self.module.get_submodule(owner), last

    def extra_repr(self) -> str:
        text = f"{type(self.module).__name__}, k={self.k}"
        return text + (f", groups={self.groups}" if self.groups > 1 else "")


def entry_name(path: str) -> str:
    """What an expert's share of a tensor of the block is called."""
    return path.replace(".", "_")
