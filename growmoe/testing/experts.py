"""What holds for every kind of expert, as one function for each contract."""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growmoe import surgery
from growmoe.checkpoint import load, save
from growmoe.experts.expert import kind_of
from growmoe.moe import MoE, aux_loss
from growmoe.routers.topk import TopK
from growmoe.structure import Template
from growmoe.testing.contract import close, holds, run_all, untouched
from growmoe.testing.routers import adamw
from growmoe.testing.snapshots import copied, differences, of_experts


@dataclass(frozen=True)
class _Subject:
    """A kind of expert as the contracts meet it."""

    template: Template
    d_model: int
    d_out: int

    def layer(self, num_experts: int = 4, seed: int = 0) -> MoE:
        template = copy.deepcopy(self.template)
        return MoE(
            self.d_model, template, num_experts, TopK(2), d_out=self.d_out, warmup=4, seed=seed
        )

    def inputs(self, rows: int = 12, seed: int = 7) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(rows, self.d_model, generator=draw)

    def train(self, layer: MoE, optimizers: list[Any], steps: int, seed: int = 3) -> list[Tensor]:
        layer.train()
        outputs = []
        for step in range(steps):
            torch.manual_seed(100 * seed + step)
            y = layer(self.inputs(16, seed=100 * seed + step))
            ((y - 1).square().mean() + aux_loss(layer)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            outputs.append(y.detach())
        return outputs

    def output(self, layer: MoE) -> Tensor:
        layer.eval()
        with torch.no_grad():
            y: Tensor = layer(self.inputs(40, seed=1))
        layer.train()
        return y


def it_maps_rows_to_rows_each_for_itself(subject: _Subject) -> None:
    """[R, D] -> [R, O] for any R, also none; in eval mode a row's output is of that row alone."""
    body = next(iter(subject.layer().experts.values())).body.eval()
    with torch.no_grad():
        for rows in (0, 1, 5):
            got = tuple(body(subject.inputs(rows)).shape)
            want = (rows, subject.d_out)
            holds(got == want, f"{(rows, subject.d_model)} -> {got}, expected {want}")
        x = subject.inputs()
        alone = torch.cat([body(row[None]) for row in x])
        close(body(x), alone, "together and one by one, the output")


def newborns_are_drawn_by_the_layers_seed(subject: _Subject) -> None:
    a, b, c = subject.layer(seed=1), subject.layer(seed=1), subject.layer(seed=2)

    def weights(layer: MoE) -> list[dict[str, Any]]:
        return [copied(dict(e.body.named_parameters())) for e in layer.experts.values()]

    untouched(differences(weights(a), weights(b)), "between two layers of one seed, weights")
    drawn = weights(a)
    if any(p.numel() for p in drawn[0].values()):
        holds(differences(drawn, weights(c)), "two seeds give the same experts")
        holds(differences(drawn[0], drawn[1]), "all experts of a layer begin with the same weights")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    surgery.spawn(a)
    holds(torch.equal(before, torch.get_rng_state()), "a birth draws from torch's own generator")


def clones_are_like_the_parent_and_share_nothing_with_it(subject: _Subject) -> None:
    layer = subject.layer()
    parent = layer.experts[1]
    child = layer.experts[surgery.spawn(layer, 1, noise=0.0).child]  # type: ignore[index]
    x = subject.inputs()
    layer.eval()
    with torch.no_grad():
        close(child(x), parent(x), "the output of a clone without noise")
    mine = {p.data_ptr() for p in parent.body.parameters() if p.numel()}
    theirs = {p.data_ptr() for p in child.body.parameters() if p.numel()}
    holds(not mine & theirs, "a clone shares memory with its parent")


def surgery_leaves_the_others_as_they_were(subject: _Subject) -> None:
    for act in ("spawn", "fresh", "merge", "prune"):
        layer = subject.layer()
        optimizers = adamw(layer)
        subject.train(layer, optimizers, 3)
        before = of_experts(layer, optimizers, [0, 3])
        y = subject.output(layer)
        if act == "spawn":
            surgery.spawn(layer, 1, optimizers)
        elif act == "fresh":
            surgery.spawn(layer, None, optimizers)
        elif act == "merge":
            surgery.merge(layer, [1, 2], optimizers)
        else:
            surgery.prune(layer, [1, 2], optimizers)
        untouched(differences(before, of_experts(layer, optimizers, [0, 3])), f"by {act}, others")
        if act in ("spawn", "fresh"):
            close(subject.output(layer), y, f"the output after {act}", 1e-5)
        kinds = {kind_of(e.body) for e in layer.experts.values()}
        holds(len(kinds) == 1, f"after {act} there are experts of kinds {sorted(kinds)}")
        holds(subject.output(layer).isfinite().all(), f"after {act} the output is not finite")
        subject.train(layer, optimizers, 6)


def idle_and_frozen_ones_do_not_move(subject: _Subject) -> None:
    layer = subject.layer()
    optimizers = adamw(layer)
    subject.train(layer, optimizers, 2)
    surgery.freeze(layer, [1])

    def of_body() -> Any:
        return copied({n: t for n, t in layer.experts[1].body.state_dict().items()})

    before = of_body()
    subject.train(layer, optimizers, 3)
    untouched(differences(before, of_body()), "the frozen expert")
    surgery.thaw(layer, [1], optimizers)
    key = layer.experts[1].entries.get_parameter("key")
    with torch.no_grad():  # its logit is so low that nothing chooses it
        key.copy_(torch.full_like(key, -1e4))
    x = subject.inputs(16).abs() + 0.1
    before = of_body()
    (layer(x) - 1).square().mean().backward()
    holds(
        all(p.grad is None for p in layer.experts[1].body.parameters()),
        "an expert that received nothing has a gradient",
    )
    optimizers[0].step()
    untouched(differences(before, of_body()), "the idle expert")


def training_goes_on_from_a_checkpoint_into_another_structure(subject: _Subject) -> None:
    """Of a kind of your own, `growmoe.load(…, experts={kind: function})` must be told."""
    layer = subject.layer()
    optimizers = adamw(layer)
    subject.train(layer, optimizers, 3)
    surgery.spawn(layer, 1, optimizers)
    subject.train(layer, optimizers, 5)
    other = subject.layer(6, seed=9)
    others = adamw(other)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        save(path, layer, optimizers)
        body = next(iter(layer.experts.values())).body
        make = functools.partial(_another, subject)
        load(path, other, others, experts=None if hasattr(body, "fresh") else {kind_of(body): make})
    for a, b in zip(
        subject.train(layer, optimizers, 3), subject.train(other, others, 3), strict=True
    ):
        holds(torch.equal(a, b), "the loaded one gives other outputs than the one that went on")


def _another(subject: _Subject, **config: Any) -> nn.Module:
    return next(iter(subject.layer(2).experts.values())).body


def copies_go_on_like_the_original(subject: _Subject) -> None:
    for how in ("deepcopy", "pickle"):
        if how == "pickle" and isinstance(subject.template, types.FunctionType):
            continue  # a layer holds its template, and pickle takes no local function
        layer = subject.layer()
        subject.train(layer, adamw(layer), 2)
        other = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
        a, b = subject.train(layer, adamw(layer), 2), subject.train(other, adamw(other), 2)
        holds(torch.equal(a[-1], b[-1]), f"a copy by {how} goes on otherwise than the original")


EXPERT_CONTRACTS: tuple[Callable[[_Subject], None], ...] = (
    it_maps_rows_to_rows_each_for_itself,
    newborns_are_drawn_by_the_layers_seed,
    clones_are_like_the_parent_and_share_nothing_with_it,
    surgery_leaves_the_others_as_they_were,
    idle_and_frozen_ones_do_not_move,
    training_goes_on_from_a_checkpoint_into_another_structure,
    copies_go_on_like_the_original,
)


def check_expert(template: Template, *, d_model: int = 8, d_out: int | None = None) -> None:
    """Hold a kind of expert to what the library promises of its own (about a second).

    It maps rows to rows each for itself, is drawn by the layer's seed, can be cloned, merged,
    pruned, frozen, copied, and saved and loaded, and leaves its siblings as they were.

    Args:
        template: as for `MoE(expert=…)`: a module, a class or a function that builds one.
        d_model: D, the width of its input.
        d_out: O, the width of its output; D if left out.

    Raises:
        AssertionError: a contract does not hold; all that don't are named.

    >>> import growmoe.testing
    >>> growmoe.testing.check_expert(growmoe.FFN(16))
    """
    name = template.__name__ if isinstance(template, type) else repr(template)
    run_all(_Subject(template, d_model, d_out or d_model), EXPERT_CONTRACTS, name)
