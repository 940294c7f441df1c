"""What holds for every rule, as one function for each contract."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from growmoe import surgery
from growmoe.experts.ffn import FFN
from growmoe.moe import MoE, aux_loss
from growmoe.organizer import Organizer, snapshot
from growmoe.routers.topk import TopK
from growmoe.rules.rule import Proposal, Rule
from growmoe.signals import Signals
from growmoe.testing.contract import BrokenContract, holds, run_all, untouched
from growmoe.testing.snapshots import differences, of_everything

_D = 4
_FAR = torch.tensor([5.0, -5.0, 0.0, 5.0])


class _Life:
    """A small layer that learns a stream which can move away and turn round."""

    def __init__(self, num_experts: int = 3, seed: int = 0, rules: tuple[Rule, ...] = ()) -> None:
        self.layer = MoE(_D, FFN(8), num_experts, TopK(1), warmup=5, balance_loss=0.0, seed=seed)
        self.optimizer = AdamW(self.layer.parameters(), lr=1e-2)
        self.organizer = Organizer(
            self.layer, self.optimizer, rules, every=10, cooldown=20, max_experts=8
        )
        self.draw = torch.Generator().manual_seed(seed)

    def live(self, steps: int, far: bool = False, turned: bool = False) -> _Life:
        """So many steps; the inputs move away, or the targets change sign."""
        for _ in range(steps):
            x = torch.randn(32, _D, generator=self.draw) + (_FAR if far else 0)
            y = torch.sin(x.flip(1)) * (-1 if turned else 1)
            loss_T = (self.layer(x) - y).square().mean(1)
            loss = loss_T.mean() + aux_loss(self.layer)
            if loss.requires_grad:
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.organizer.step(loss_T.detach())
        return self

    def clone(self, times: int) -> _Life:
        for _ in range(times):
            surgery.spawn(self.layer, next(iter(self.layer.experts)), self.optimizer, noise=0.0)
        return self

    def freeze(self, *ids: int) -> _Life:
        surgery.freeze(self.layer, ids)
        return self


@functools.cache
def _lived() -> tuple[tuple[str, MoE], ...]:
    settled = _Life().live(120)
    old = _Life().live(40).clone(2).live(20)
    for expert in old.layer.experts.values():  # as if it had been long
        expert.statistics.view()["age"] += 1000.0
    idle = _Life().live(40)
    idle.layer.experts[2].statistics.view()["idle"] = 1e5
    moved = _Life(seed=1).live(60).live(10, far=True)
    turned = _Life(seed=2).live(60).live(20, turned=True)
    frozen = _Life(seed=3).live(60).freeze(0, 1).live(20, turned=True)
    return (
        ("a layer that has not run", _Life().layer),
        ("one expert", _Life(1).live(30).layer),
        ("a settled layer", settled.layer),
        ("inputs that moved away", moved.layer),
        ("targets that changed", turned.layer),
        ("frozen experts", frozen.layer),
        ("old clones", old.layer),
        ("an expert long idle", idle.layer),
        ("a newborn", _Life().live(20).clone(1).layer),
    )


def _lives() -> Iterator[tuple[str, MoE]]:
    """Layers in the situations a rule may meet, each with its name."""
    for situation, layer in _lived():
        yield situation, copy.deepcopy(layer)  # whatever the rule does to it


def proposals_are_well_formed(rule: Rule) -> None:
    for situation, layer in _lives():
        signals = snapshot(layer, layer.steps)
        said = rule.propose(signals)
        holds(isinstance(said, list), f"{situation}: propose gave {said!r}, not a list")
        for p in said:
            holds(isinstance(p, Proposal), f"{situation}: {p!r} is no Proposal")
            _check(p, signals, situation)


def _check(p: Proposal, signals: Signals, situation: str) -> None:
    where = f"{situation}: {p.act} {p.ids}"
    strange = [id for id in p.ids if id not in signals.ids]
    holds(not strange, f"{where}: no living expert {strange}, which are {signals.ids}")
    holds(len(set(p.ids)) == len(p.ids), f"{where}: an expert twice")
    holds(isinstance(p.reason, str) and p.reason.strip(), f"{where}: no reason")
    for name, value in p.signals.items():
        holds(
            isinstance(value, int | float),
            f"{where}: signals[{name!r}] is {type(value).__name__}, not a number",
        )
    of = dict(zip(signals.ids, zip(signals.groups, signals.frozen, strict=True), strict=True))
    if p.act == "merge":
        kinds = {of[id][0] for id in p.ids}
        holds(len(kinds) == 1, f"{where}: of different kinds (see Signals.groups)")
    if p.act == "freeze":
        holds(not all(of[id][1] for id in p.ids), f"{where}: frozen already")
    if p.act == "thaw":
        holds(any(of[id][1] for id in p.ids), f"{where}: not frozen")
    if p.toward is not None:
        fits = isinstance(p.toward, Tensor) and p.toward.shape == (signals.d_model,)
        holds(fits and p.toward.isfinite().all(), f"{where}: toward must be {signals.d_model} long")


def it_keeps_nothing_in_mind(rule: Rule) -> None:
    """The same signals give the same proposals, whatever was seen in between."""
    seen = [(situation, snapshot(layer, layer.steps)) for situation, layer in _lives()]
    first = {situation: _plain(rule, signals) for situation, signals in seen}
    for situation, signals in reversed(seen):
        holds(
            _plain(rule, signals) == first[situation],
            f"{situation}: the same signals gave other proposals the second time",
        )


def _plain(rule: Rule, signals: Signals) -> list[Any]:
    return [
        (p.act, p.ids, p.reason, sorted(p.signals.items()),
         None if p.toward is None else p.toward.tolist())
        for p in rule.propose(signals)
    ]  # fmt: skip


def it_touches_neither_model_nor_signals(rule: Rule) -> None:
    for situation, layer in _lives():
        signals = snapshot(layer, layer.steps)
        before, read = of_everything(layer), _numbers(signals)
        rule.propose(signals)
        untouched(differences(before, of_everything(layer)), f"{situation}: the model")
        untouched(differences(read, _numbers(signals)), f"{situation}: the signals")


def _numbers(signals: Signals) -> dict[str, Any]:
    return {
        "ids": list(signals.ids),
        "frozen": list(signals.frozen),
        "groups": list(signals.groups),
        "values": {name: list(values) for name, values in signals.values.items()},
        "overlap": signals.overlap.clone(),
        "novel_mean": None if signals.novel_mean is None else signals.novel_mean.clone(),
    }


def an_organizer_carries_it_out_over_a_drifting_stream(rule: Rule) -> None:
    """Nothing raises, the lineage replays to what lives, and every event has its reason."""
    life = _Life(rules=(rule,))
    try:
        life.live(60).live(60, far=True).live(40, turned=True)
    except ValueError as error:
        raise BrokenContract(f"the organizer stopped: {error}") from error
    layer = life.layer
    holds(layer.lineage.replay() == list(layer.experts), "the lineage does not replay")
    for event in layer.lineage:
        holds(event.act == "init" or event.reason.strip(), f"no reason: {event}")
    held = {id(p) for g in life.optimizer.param_groups for p in g["params"]}
    learned: list[nn.Parameter] = list(layer.parameters())
    holds(all(id(p) in held for p in learned), "the optimizer lost a parameter")


RULE_CONTRACTS: tuple[Callable[[Rule], None], ...] = (
    proposals_are_well_formed,
    it_keeps_nothing_in_mind,
    it_touches_neither_model_nor_signals,
    an_organizer_carries_it_out_over_a_drifting_stream,
)


def check_rule(rule: Rule) -> None:
    """Hold a rule to what the organizer expects of it (a few seconds).

    It is shown layers that are young, settled, drifting, frozen in part, full of clones or idle:
    what it proposes must be well formed and name living experts, be the same for the same signals,
    and leave model and signals alone; then an organizer runs it over a drifting stream.

    Args:
        rule: an object with `propose(signals)`.

    Raises:
        AssertionError: a contract does not hold; all that don't are named.

    >>> import growmoe.testing
    >>> growmoe.testing.check_rule(growmoe.rules.SpawnOnNovelty())
    """
    if isinstance(rule, type) or not callable(getattr(rule, "propose", None)):
        raise BrokenContract(f"{rule!r} is no rule: an object with propose(signals) is one")
    run_all(rule, RULE_CONTRACTS, repr(rule))
