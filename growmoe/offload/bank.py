"""The bank of a layer whose experts are offloaded, and the hooks that guard it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from growmoe.assignment import Assignment
from growmoe.experts.bank import ExpertBank, run_alone
from growmoe.experts.expert import Expert
from growmoe.moe import MoE
from growmoe.offload.cache import Cache
from growmoe.offload.cold import Tensors


class OffloadedBank(ExpertBank):
    """An `ExpertBank` most of whose experts are elsewhere; a bank becomes one and is one again."""

    _cache: Cache
    _next: tuple[MoE, Cache] | None

    def enter(self, cache: Cache, after: tuple[MoE, Cache] | None) -> None:
        self._layout, self._laid_out = [], []  # a pool would keep the weights it stacked
        self._cache, self._next = cache, after
        cache.empty()

    def leave(self) -> None:
        del self._cache, self._next
        self.__class__ = ExpertBank  # type: ignore[assignment]

    def forward(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """Each row through its expert: [T, D] -> [R, O], rows sorted by expert."""
        experts: list[Expert] = list(self._modules.values())  # type: ignore[arg-type]
        x_RD = assignment.dispatch(x_TD)
        counts, guess = _on_host(assignment.counts_E, self._guess(x_TD))
        sections = x_RD.split(counts)
        outputs = [x_RD.new_zeros(0, self.d_out) for _ in experts]
        position = {e.id: i for i, e in enumerate(experts)}
        rows = {e.id: n for e, n in zip(experts, counts, strict=True) if n}
        with self._cache.lock:
            for id in self._cache.serve(rows, partial(self._prefetch, guess)):
                i = position[id]
                outputs[i] = run_alone(experts[i], sections[i], self.d_out)
        dtypes = [y.dtype for y in outputs if len(y)] or [x_RD.dtype]
        common = reduce(torch.promote_types, dtypes)
        return torch.cat([y.to(common) for y in outputs])

    def _guess(self, x_TD: Tensor) -> Tensor | None:
        """int64 [E'], how many of these rows the next layer's router would give to each expert."""
        if self._next is None or self._next[0].training or self._next[0].d_model != x_TD.shape[1]:
            return None
        devices = [x_TD.device] if x_TD.is_cuda else []
        try:
            # a router may draw in eval mode too, and the layer's own draws must not notice
            with torch.random.fork_rng(devices), torch.no_grad():
                return self._next[0].route(x_TD).assignment.counts_E
        except ValueError:
            self._next = None  # it wants a context, which is not known here
            return None

    def _prefetch(self, guess: list[int]) -> None:
        if self._next is not None and guess:
            layer, cache = self._next
            cache.prefetch({id: n for id, n in zip(layer.experts, guess, strict=True) if n})

    def replace(self, experts: Sequence[Expert]) -> None:
        """Refused: experts can come and go only when all are there.

        Raises:
            ValueError: always, unless they are the experts it holds.
        """
        if list(experts) != list(self._modules.values()):
            raise ValueError(
                f"the experts of layer {self._cache.name!r} are offloaded: restore() them before "
                "its structure is changed"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> OffloadedBank:
        if recurse:
            raise RuntimeError(
                f"the experts of layer {self._cache.name!r} are offloaded: restore() them before "
                "the model is moved or converted"
            )
        return self


def enter(layer: MoE, cache: Cache, after: tuple[MoE, Cache] | None) -> list[Any]:
    """Make the layer's bank an offloaded one; returns the hooks that were set."""
    bank = layer.experts
    bank.__class__ = OffloadedBank
    cast(OffloadedBank, bank).enter(cache, after)
    hooks: list[Any] = [
        layer.register_forward_pre_hook(_refuse_learning, with_kwargs=True),
        layer.register_load_state_dict_pre_hook(refuse_load),
        bank.register_load_state_dict_pre_hook(refuse_load),
    ]
    for expert in bank.values():
        if expert.id in cache.tensors:
            hooks.append(expert.register_forward_pre_hook(cache.fetch))
            hooks.append(expert.register_load_state_dict_pre_hook(refuse_load))
            fill = partial(_fill, cache, expert.id, _names(expert.body, cache.tensors[expert.id]))
            hooks.append(expert.body.register_state_dict_post_hook(fill))
            hooks.append(expert.body.register_load_state_dict_pre_hook(refuse_load))
    return hooks


def _names(body: nn.Module, tensors: Tensors) -> dict[str, str]:
    """The one name by which each offloaded tensor is stored, for each name it has."""
    stored = {id(t): name for name, t in tensors.items()}
    named = (
        *body.named_parameters(remove_duplicate=False),
        *body.named_buffers(remove_duplicate=False),
    )
    return {name: stored[id(t)] for name, t in named if id(t) in stored}


def _refuse_learning(layer: MoE, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    if layer.training:
        raise RuntimeError(
            f"layer {layer.name!r} is in training mode, but its experts are offloaded, which is "
            "for inference: call eval(), or restore() them"
        )
    if torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad
        for t in (*inputs, *named.values(), *layer.parameters())
    ):
        raise RuntimeError(
            f"gradients are asked of layer {layer.name!r}, but its experts are offloaded and may "
            "be gone before backward: run under torch.no_grad(), or restore() them"
        )


def refuse_load(*_: Any) -> None:
    raise RuntimeError("the model's experts are offloaded: restore() them before a state is loaded")


def _fill(
    cache: Cache,
    id: int,
    names: Mapping[str, str],
    body: nn.Module,
    state: Any,
    prefix: str,
    _: Any,
) -> None:
    """A hook of state_dict: values from where they are, instead of tensors without any."""
    empty = [n for n in names if prefix + n in state and not state[prefix + n].numel()]
    values = cache.read(id) if empty else {}
    for n in empty:
        state[prefix + n] = values[names[n]]


def _on_host(counts_E: Tensor, guess_E: Tensor | None) -> tuple[list[int], list[int]]:
    both = (counts_E if guess_E is None else torch.cat([counts_E, guess_E])).tolist()  # one copy
    return both[: len(counts_E)], both[len(counts_E) :]
