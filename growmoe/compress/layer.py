"""What pruning and merging need of a layer, and how growmoe's own layers give it.

Criteria, plans, merging, recovery and reports know a layer by the protocol `Layer` alone, so that
they are written once for growmoe's layers and for the blocks of other libraries.

Shape suffixes: T tokens, E experts in ascending order of id, R routed rows (one for each token and
expert), D width of the input, O width of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from growmoe import surgery
from growmoe.assignment import Assignment
from growmoe.consent import evaluating
from growmoe.experts.ffn import FFN
from growmoe.experts.zero_computation import Novice
from growmoe.moe import MoE, moe_layers
from growmoe.routers.router import Routing

Listener = Callable[["Observed"], None]


class CompressError(ValueError):
    """The model cannot be pruned or merged as asked; the message says why, in one line."""


@dataclass(frozen=True)
class Observed:
    """One forward of one layer.

    Attributes:
        x_TD: the layer's input.
        assignment: where it went, `expert_R` as positions in `Layer.ids`, with the combine weights
            that the layer used.
        out_RO: each row's expert output before it is weighted, in the assignment's order.
        logits_TE: the router's logits, before anything is chosen.
        mixture_TO: the sum that the model goes on with, where `out_RO` is not in its graph.
    """

    x_TD: Tensor
    assignment: Assignment
    out_RO: Tensor
    logits_TE: Tensor
    mixture_TO: Tensor | None = None


class Layer(Protocol):
    """A mixture whose experts can be looked at, removed and merged.

    Attributes:
        name: in the model.
        k: the fewest experts that may be left.
        groups: consecutive groups of ids that must lose equally many (1: no such rule).
        uniform: whether all layers of the model must end with as many experts.
    """

    name: str
    groups: int
    uniform: bool

    @property
    def k(self) -> int: ...

    @property
    def ids(self) -> list[int]:
        """The living experts, ascending."""
        ...

    def observe(self, listener: Listener) -> AbstractContextManager[None]:
        """Tell `listener` of every forward."""
        ...

    def masked(self, ids: Collection[int]) -> AbstractContextManager[None]:
        """In eval mode the layer computes as if these experts were gone; nothing is copied."""
        ...

    def weights(self, x_TD: Tensor, without: Collection[int] = ()) -> Tensor:
        """Combine weights [T, E] were these experts gone (their columns are 0)."""
        ...

    def ffn(self, id: int) -> nn.Module:
        """An expert as a module, [R, D] -> [R, O]; a `growmoe.FFN` where it is one.

        To look at: what is done to its weights need not reach the model.
        """
        ...

    def router_row(self, id: int) -> Tensor:
        """[D], what the router knows an expert by."""
        ...

    def router_parameters(self) -> list[nn.Parameter]:
        """What the router learns, in whatever order."""
        ...

    def prune(self, ids: Sequence[int], reason: str = "") -> None:
        """Remove these experts."""
        ...

    def merge(
        self, ids: Sequence[int], body: nn.Module, weights: Sequence[float], reason: str = ""
    ) -> None:
        """They become one expert that computes as `body`; router rows are averaged by `weights`."""
        ...

    def put(self, id: int, body: nn.Module) -> None:
        """Overwrite one expert's weights with those of `body`."""
        ...

    def novice(self, id: int, value_O: Tensor, reason: str = "") -> None:
        """One expert gives this from now on, whatever its input."""
        ...


class MoELayer:
    """A `growmoe.MoE` as a `Layer`.

    Raises:
        CompressError: its router needs what a calibration cannot give (a context), or gives each
            row several weights.
    """

    groups = 1
    uniform = False

    def __init__(self, name: str, layer: MoE) -> None:
        self.name, self.layer = name, layer

    @property
    def ids(self) -> list[int]:
        return list(self.layer.experts)

    @property
    def k(self) -> int:
        return self.layer.router.min_experts

    @contextmanager
    def observe(self, listener: Listener) -> Iterator[None]:
        routed: list[Routing] = []

        def keep(module: nn.Module, given: Any, routing: Routing) -> None:
            routed[:] = [routing]

        def tell(module: nn.Module, given: tuple[Tensor, Assignment], out_RO: Tensor) -> None:
            x_TD, assignment = given
            if assignment.weight_R.dim() != 1:
                raise CompressError(
                    f"{self.name}: {self.layer.router} gives each row several weights; that is "
                    "not supported"
                )
            listener(Observed(x_TD, assignment, out_RO, routed[0].logits_TE))

        hooks = [
            self.layer.router.register_forward_hook(keep),
            self.layer.experts.register_forward_hook(tell),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def masked(self, ids: Collection[int]) -> Iterator[None]:
        self._check_left(ids)
        experts = [self.layer.experts[id] for id in ids]
        before = [expert.admission for expert in experts]
        for expert in experts:
            expert.admission = 0.0
        try:
            yield
        finally:
            for expert, admission in zip(experts, before, strict=True):
                expert.admission = admission

    @torch.no_grad()
    def weights(self, x_TD: Tensor, without: Collection[int] = ()) -> Tensor:
        self._check_left(without)
        left = [(e, expert) for e, expert in enumerate(self.layer.experts.values())]
        left = [(e, expert) for e, expert in left if expert.id not in without]
        with evaluating(self.layer):
            weight_TS = self.layer.route(x_TD, [expert for _, expert in left]).assignment.dense()
        weight_TE = weight_TS.new_zeros(len(x_TD), len(self.layer.experts))
        weight_TE[:, [e for e, _ in left]] = weight_TS
        return weight_TE

    def ffn(self, id: int) -> nn.Module:
        return self.layer.experts[id].body

    def router_row(self, id: int) -> Tensor:
        entries = list(self.layer.experts[id].entries.parameters())
        vectors = [p.detach() for p in entries if p.dim() == 1 and len(p) == self.layer.d_model]
        if len(vectors) != 1:
            raise CompressError(
                f"{self.name}: {self.layer.router} knows an expert by no single row of a matrix"
            )
        return vectors[0]

    def router_parameters(self) -> list[nn.Parameter]:
        own = list(self.layer.router.parameters())
        return own + [
            p for expert in self.layer.experts.values() for p in expert.entries.parameters()
        ]

    def prune(self, ids: Sequence[int], reason: str = "") -> None:
        self._check_left(ids)
        surgery.prune(self.layer, list(ids), reason=reason)

    def merge(
        self, ids: Sequence[int], body: nn.Module, weights: Sequence[float], reason: str = ""
    ) -> None:
        surgery.merge(self.layer, list(ids), body=body, weights=weights, reason=reason)

    @torch.no_grad()
    def put(self, id: int, body: nn.Module) -> None:
        mine = self.layer.experts[id].body.state_dict(keep_vars=True)
        for name, value in body.state_dict().items():
            if isinstance(value, Tensor):
                mine[name].copy_(value)

    @torch.no_grad()
    def novice(self, id: int, value_O: Tensor, reason: str = "") -> None:
        dead = self.layer.experts[id]
        born = surgery.spawn(
            self.layer, expert=Novice(value_O), admitted=True, reason=f"stands for {id}"
        )
        assert born.child is not None
        novice = self.layer.experts[born.child]
        for name, value in dead.entries.state_dict().items():
            getattr(novice.entries, name).copy_(value)
        surgery.prune(self.layer, [id], reason=reason)

    def _check_left(self, without: Collection[int]) -> None:
        left = len(self.layer.experts) - len(set(without))
        if left < self.k:
            raise CompressError(
                f"{self.name}: {left} experts would be left, {self.layer.router} needs {self.k}"
            )


def layers_of(model: nn.Module) -> list[Layer]:
    """The mixtures of a growmoe model, or of a transformers model of a known family.

    Raises:
        CompressError: there are none.
    """
    if isinstance(model, MoE):
        return [MoELayer("moe", model)]
    own: list[Layer] = [MoELayer(name, layer) for name, layer in moe_layers(model).items()]
    if own:
        return own
    if hasattr(getattr(model, "config", None), "model_type"):
        from growmoe import hf

        return list(hf.layers_of(model))
    raise CompressError(f"{type(model).__name__} holds no mixture of experts")


def ffn_of(layer: Layer, id: int, act: str) -> FFN:
    """An expert as a feed-forward network, for what works on its matrices.

    Raises:
        CompressError: it is of another kind.
    """
    body = layer.ffn(id)
    if type(body) is not FFN:
        raise CompressError(
            f"{layer.name}: expert {id} is a {type(body).__name__}, {act} takes feed-forward "
            "experts (growmoe.FFN) alone"
        )
    return body


@torch.no_grad()
def outputs_of(layer: Layer, x_TD: Tensor) -> Tensor:
    """Every expert on every token, [E, T, O], in eval mode."""
    rows = []
    for id in layer.ids:
        body = layer.ffn(id)
        with evaluating(body):
            rows.append(body(x_TD))
    return torch.stack(rows)
