"""Counts which expert takes what of each domain while a model is evaluated.

E  experts of a layer
G  domains
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from growmoe.assignment import Assignment
from growmoe.lm.growing.model import GrowingLM
from growmoe.moe import moe_layers


class RoutingCounts:
    """The tokens that each expert was given, by layer and domain::

        counts = RoutingCounts(model)
        evaluate(model, domains, counts=counts)
        counts.maps()

    A token that goes to several experts counts for each; capacity, which may drop some, is not
    looked at. A path of a `GrowingLM` counts the tokens by the weight that the gate gives it.
    Routers whose rows belong to no single token (Soft MoE) are left out.

    Args:
        model: whose `MoE` layers are looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._counts: dict[str, dict[str, dict[int, float]]] = {}

    @contextmanager
    def of(self, domain: str) -> Iterator[None]:
        """What the model is given inside is of this domain."""
        with ExitStack() as stack:
            if isinstance(self._model, GrowingLM):
                hooks = [self._model.register_forward_hook(self._of_paths(domain))]
            else:
                hooks = [
                    layer.router.register_forward_hook(self._of_layer(name, domain))
                    for name, layer in moe_layers(self._model).items()
                ]
            for hook in hooks:
                stack.callback(hook.remove)
            yield

    def maps(self) -> dict[str, list[dict[str, Any]]]:
        """{layer: [{"by": "domain", "experts": ids, "groups": domains, "counts": [E][G]}]}."""
        maps = {}
        for layer, by_domain in self._counts.items():
            ids = sorted({id for counts in by_domain.values() for id in counts})
            counts = [[round(c.get(id, 0.0), 2) for c in by_domain.values()] for id in ids]
            one = {"by": "domain", "experts": ids, "groups": list(by_domain), "counts": counts}
            maps[layer] = [one]
        return maps

    def _add(self, layer: str, domain: str, ids: Sequence[int], count_E: Sequence[float]) -> None:
        counts = self._counts.setdefault(layer, {}).setdefault(domain, {})
        for id, count in zip(ids, count_E, strict=True):
            counts[id] = counts.get(id, 0.0) + count

    def _of_layer(self, layer: str, domain: str) -> Any:
        def count(router: nn.Module, given: tuple[Any, ...], routing: Any) -> None:
            if type(routing.assignment) is Assignment:
                ids = [expert.id for expert in given[1]]
                self._add(layer, domain, ids, routing.assignment.counts_E.tolist())

        return count

    def _of_paths(self, domain: str) -> Any:
        def count(model: Any, given: tuple[Any, ...], out: Any) -> None:
            shares = [1.0] if model.share_K is None else model.share_K.tolist()
            tokens = given[0].numel()
            ids = [path.id for path in model.paths]
            self._add("layer", domain, ids, [tokens * share for share in shares])

        return count
