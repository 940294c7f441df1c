"""A mixture inside a transformers model: look at it, mask its experts, remove and merge them.

`Block` is a `growmoe.compress.Layer`. No gating is written here: the family's router is called, and
an expert is masked by adding -inf to what its row of the router gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.assignment import Assignment
from growmoe.compress.layer import CompressError, Observed
from growmoe.consent import evaluating
from growmoe.hf.bodies import body_of, tensors_of
from growmoe.hf.families import Family, family_of
from growmoe.hf.masking import OffsetLogits

_uneven: ContextVar[bool] = ContextVar("uneven", default=False)


@contextmanager
def allow_uneven() -> Iterator[None]:
    """Within, blocks may end with different numbers of experts: only growmoe can load that."""
    token = _uneven.set(True)
    try:
        yield
    finally:
        _uneven.reset(token)


class Block:
    """One mixture of a transformers model, as a `growmoe.compress.Layer`.

    Experts are named by the position they had when this was made, until the end.

    Attributes:
        name: in the model.
        module: the family's block.
    """

    def __init__(self, name: str, module: Any, family: Family, model: nn.Module) -> None:
        self.name, self.module, self.family, self.model = name, module, family, model
        self.config: Any = model.config
        self.uniform = not _uneven.get()
        self.groups, _ = family.groups_of(self.config)
        self.experts: Any = module.experts
        self.router: Any = getattr(module, family.router)
        self._ids = list(range(self.count))
        for row, dim in family.rows.items():
            if self.row(row).shape[dim] != self.count:
                raise CompressError(
                    f"{name}: {row} is {tuple(self.row(row).shape)} for {self.count} experts"
                )
        for part, p in self.experts.named_parameters():
            if len(p) != self.count or not p.is_floating_point() or p.element_size() < 2:
                raise CompressError(
                    f"{name}: experts.{part} is {p.dtype} {tuple(p.shape)}: prune and merge "
                    "before quantization"
                )

    @property
    def count(self) -> int:
        return int(self.row(f"{self.family.router}.weight").shape[0])

    @property
    def ids(self) -> list[int]:
        return list(self._ids)

    @property
    def k(self) -> int:
        return self.family.fewest(self.config)

    def row(self, name: str) -> Tensor:
        """A tensor of the block by its path."""
        found: Any = self.module
        for part in name.split("."):
            found = getattr(found, part)
        return found

    # To look at.

    @contextmanager
    def observe(self, listener: Callable[[Observed], None]) -> Iterator[None]:
        logits: list[Tensor] = []

        def keep(router: nn.Module, given: Any, routed: tuple[Tensor, ...]) -> None:
            logits[:] = [routed[0].detach().reshape(-1, self.count)]

        def tell(experts: nn.Module, given: tuple[Tensor, ...], mixture_TO: Tensor) -> None:
            x_TD, expert_TK, weight_TK = given
            a = Assignment.from_choice(expert_TK, weight_TK, self.count)
            out_RO = self._rows(x_TD.detach(), a)
            listener(Observed(x_TD, a, out_RO, logits[0], mixture_TO))

        hooks = [
            self.router.register_forward_hook(keep),
            self.experts.register_forward_hook(tell),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _rows(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """Each row's expert output before it is weighted: [R, O]."""
        x_RD = assignment.dispatch(x_TD)
        ones_R1 = x_RD.new_ones(len(x_RD), 1)
        # around the hooks
        return type(self.experts).forward(self.experts, x_RD, assignment.expert_R[:, None], ones_R1)

    @contextmanager
    def masked(self, ids: Collection[int]) -> Iterator[None]:
        positions = [self._ids.index(id) for id in set(ids)]
        left = self.count - len(positions)
        k = int(getattr(self.config, self.family.k))
        if left < k:
            raise CompressError(f"{self.name}: {left} experts would be left, each token takes {k}")
        if not positions:
            yield
            return
        weight = self.router.weight
        offset_E = torch.zeros(self.count, device=weight.device)
        offset_E[positions] = -torch.inf
        modes: list[OffsetLogits] = []

        def enter(router: nn.Module, given: Any) -> None:
            modes.append(OffsetLogits(weight, offset_E))
            modes[-1].__enter__()

        def leave(router: nn.Module, given: Any, result: Any) -> None:
            if modes:
                modes.pop().__exit__(None, None, None)

        hooks = [
            self.router.register_forward_pre_hook(enter),
            self.router.register_forward_hook(leave, always_call=True),
        ]
        before = None
        if self.family.correction is not None:
            correction = self.row(self.family.correction)
            before = correction.detach().clone()
            dim = self.family.rows[self.family.correction]
            with torch.no_grad():
                correction.index_fill_(
                    dim, torch.tensor(positions, device=correction.device), -torch.inf
                )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if before is not None:
                with torch.no_grad():
                    correction.copy_(before)

    @torch.no_grad()
    def weights(self, x_TD: Tensor, without: Collection[int] = ()) -> Tensor:
        with evaluating(self.router), self.masked(without):
            more = [getattr(self.module, name) for name in self.family.arguments]
            _, weight_TK, expert_TK = self.router(x_TD.clone(), *more)
        return weight_TK.new_zeros(len(x_TD), self.count).scatter_(1, expert_TK, weight_TK)

    def ffn(self, id: int) -> nn.Module:
        return body_of(self.experts, self._ids.index(id), copy=False)

    def router_row(self, id: int) -> Tensor:
        return self.router.weight.detach()[self._ids.index(id)]

    def router_parameters(self) -> list[nn.Parameter]:
        rows = [self.row(name) for name in self.family.rows if name != self.family.correction]
        return [p for p in rows if isinstance(p, nn.Parameter)]

    # The acts.

    def prune(self, ids: Sequence[int], reason: str = "") -> None:
        self.check(ids)
        self._keep([p for p, id in enumerate(self._ids) if id not in ids])

    @torch.no_grad()
    def merge(
        self, ids: Sequence[int], body: nn.Module, weights: Sequence[float], reason: str = ""
    ) -> None:
        """They become one in the place of the first; router rows and biases are averaged."""
        self.check(ids[1:])
        positions = [self._ids.index(id) for id in ids]
        self.put(ids[0], body)
        share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        for name, dim in self.family.rows.items():
            row = self.row(name)
            parts = row.index_select(dim, torch.tensor(positions, device=row.device)).double()
            mean = torch.tensordot(share.to(parts.device), parts, ([0], [dim]))
            row.select(dim, positions[0]).copy_(mean)
        self._keep([p for p in range(self.count) if p not in positions[1:]])

    @torch.no_grad()
    def put(self, id: int, body: nn.Module) -> None:
        try:
            tensors = tensors_of(body, self.experts)
        except ValueError as error:
            raise CompressError(f"{self.name}: {error}") from error
        for name, value in tensors.items():
            getattr(self.experts, name)[self._ids.index(id)].copy_(value)

    def novice(self, id: int, value_O: Tensor, reason: str = "") -> None:
        raise CompressError(
            f"{self.name}: a transformers model has no expert that is a constant: choose another "
            "saliency, or growmoe.hf.attach the model"
        )

    def keep_first(self, count: int) -> None:
        """Shrink to so many experts, whose weights are still to be loaded."""
        self._keep(list(range(count)))

    def check(self, ids: Collection[int]) -> None:
        """Raise CompressError unless these can be removed."""
        unknown = [id for id in ids if id not in self._ids]
        if unknown:
            raise CompressError(f"{self.name}: has no expert {unknown[0]!r}")
        if len(set(ids)) != len(list(ids)):
            raise CompressError(f"{self.name}: an expert is named twice in {list(ids)}")
        left = self.count - len(ids)
        if left < self.k:
            raise CompressError(
                f"{self.name}: {left} of {self.count} experts would be left, but the router needs "
                f"{self.k} (it takes {getattr(self.config, self.family.k)} for each token"
                + (f" from {self.groups} groups)" if self.groups > 1 else ")")
            )
        if self.groups > 1:
            size = self.count // self.groups
            gone = [0] * self.groups
            for id in ids:
                gone[self._ids.index(id) // size] += 1
            if len(set(gone)) > 1:
                raise CompressError(
                    f"{self.name}: {gone} experts would go from its {self.groups} groups, which "
                    "must stay equal: transformers would load that, and choose in the wrong groups"
                )

    @torch.no_grad()
    def _keep(self, positions: list[int]) -> None:
        for name, dim in self.family.rows.items():
            owner, _, last = name.rpartition(".")
            _select(self.module.get_submodule(owner), last, dim, positions)
        for name in [name for name, _ in self.experts.named_parameters()]:
            _select(self.experts, name, 0, positions)
        self._ids = [self._ids[p] for p in positions]
        self.tell_size()

    def tell_size(self) -> None:
        """Write the count wherever the modules, and the config if all agree, hold it."""
        set_sizes(self.module, self.family, self.count)
        counts = {block.count for block in blocks_of(self.model)}
        if len(counts) == 1:
            setattr(self.config, self.family.count, counts.pop())


def set_sizes(block: nn.Module, family: Family, count: int) -> None:
    """Write the number of experts wherever the modules of a block hold it."""
    for path in family.sizes:
        owner, _, last = path.rpartition(".")
        try:
            holder = block.get_submodule(owner)
        except AttributeError:
            continue
        if hasattr(holder, last):
            setattr(holder, last, count)


def _select(owner: nn.Module, name: str, dim: int, positions: list[int]) -> None:
    old = getattr(owner, name)
    index = torch.tensor(positions, dtype=torch.long, device=old.device)
    new = old.detach().index_select(dim, index)
    if isinstance(old, nn.Parameter):
        owner.register_parameter(name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(owner, name, new)


class _Place:
    """A block by name, before anything is known of it."""

    def __init__(self, name: str, module: nn.Module, family: Family) -> None:
        self.name, self.module, self.family = name, module, family

    @property
    def count(self) -> int:
        router: Any = getattr(self.module, self.family.router)
        return int(router.weight.shape[0])


def blocks_of(model: nn.Module) -> list[_Place]:
    """Where the mixtures of a model are, in its order.

    Raises:
        CompressError: its family is not known here.
    """
    family = family_of(model.config)
    return [
        _Place(name, module, family)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == family.block
        and isinstance(getattr(module, "experts", None), nn.Module)
        and hasattr(getattr(module, family.router, None), "weight")
    ]


def layers_of(model: Any) -> list[Block]:
    """The mixtures of a transformers model, in its order.

    Raises:
        CompressError: its family is not known here, or it holds none.
    """
    found = [Block(place.name, place.module, place.family, model) for place in blocks_of(model)]
    if not found:
        raise CompressError(
            f"{type(model).__name__} ({model.config.model_type}) holds no mixture of experts"
        )
    return found


def remove_experts(
    model: nn.Module, remove: dict[str, Sequence[int]], *, uneven: bool = False
) -> None:
    """Remove experts of a transformers model in memory, all or nothing.

    Router rows, biases, correction biases, the experts, the modules' counts and the config change
    together, so that `save_pretrained` writes what plain transformers loads.

    Args:
        remove: name of the block -> positions.
        uneven: allow different numbers of experts per layer, which runs, and which only
            `growmoe.hf.save` can write.

    Raises:
        CompressError: an unknown block or expert, fewer experts left than the router needs, groups
            that would be unequal, or layers that would. Nothing has changed then.
    """
    layers = {layer.name: layer for layer in layers_of(model)}
    unknown = [name for name in remove if name not in layers]
    if unknown:
        raise CompressError(f"there is no block {unknown[0]!r}; they are {', '.join(layers)}")
    for name, ids in remove.items():
        layers[name].check(ids)
    left = {name: layer.count - len(remove.get(name, ())) for name, layer in layers.items()}
    if len(set(left.values())) > 1 and not uneven:
        raise CompressError(
            f"layers would be left with {sorted(set(left.values()))} experts: a config of "
            "transformers has one number for all, and what is saved could not be loaded. Remove as "
            "many from each, or take growmoe's own format"
        )
    for name, ids in remove.items():
        if len(ids):
            layers[name].prune(ids)
