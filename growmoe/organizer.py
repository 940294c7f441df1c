"""Proposals in, decisions out: one call in the training loop that lets a model organize itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growmoe import surgery
from growmoe.consent import evaluating, evidence_of, output_change, weight_dtype
from growmoe.experts.expert import check_alike, merge_group
from growmoe.experts.statistics import FIELDS, distance_z
from growmoe.lineage import Event
from growmoe.moe import MoE, moe_layers
from growmoe.optim import as_optimizers, guard
from growmoe.rules.rule import Proposal, Rule
from growmoe.signals import Signals

log = logging.getLogger("growmoe")


class Organizer:
    """Applies rules to every MoE layer of a model, within limits, and writes down why.

    Call `step` once per iteration (or micro-batch), after the optimizer's step. Each layer has its
    own decisions. A proposal is carried out if

    - none of its experts was acted on within `cooldown` steps, or in the same decision;
    - the layer stays within `max_experts` and within `budget` structural acts per decision;
    - for a merge or a prune, the layer's output changes by no more than `tolerance` on what its
      experts are for (see `growmoe.consent`).

    What was refused, and why, stands in the lineage too.

    Args:
        model: holds one or more `MoE` layers.
        optimizer: one, several, or None where nothing is trained by gradients. Idle experts are
            guarded in each (`growmoe.guard`).
        rules: read in this order; earlier ones have precedence.
        max_experts: per layer.
        every: optimizer steps between decisions; calls of `step` without an optimizer. So there
            is no decision between the micro-batches of one step.
        budget: spawns, merges and prunes per layer and decision.
        cooldown: steps for which an expert is left alone after an act, and a proposal after it
            was refused (twice as long each time); 5 · every if left out.
        tolerance: relative change of the output that a merge or prune may cost.

    Raises:
        ValueError: no MoE layer in the model, or a setting out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        rules: Sequence[Rule] = (),
        *,
        max_experts: int = 64,
        every: int = 100,
        budget: int = 1,
        cooldown: int | None = None,
        tolerance: float = 0.1,
    ) -> None:
        self.layers = moe_layers(model)
        if not self.layers:
            raise ValueError("Organizer: the model has no growmoe.MoE layer")
        for name, value in (("every", every), ("budget", budget), ("max_experts", max_experts)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Organizer: {name} must be a positive integer, got {value!r}")
        if not tolerance >= 0:
            raise ValueError(f"Organizer: tolerance must not be negative, got {tolerance!r}")
        if cooldown is not None and not (isinstance(cooldown, int) and cooldown >= 0):
            raise ValueError(f"Organizer: cooldown must be an integer >= 0, got {cooldown!r}")
        for rule in rules:
            if isinstance(rule, type):
                raise ValueError(f"Organizer: {rule.__name__} is a class: pass {rule.__name__}()")
            if not callable(getattr(rule, "propose", None)):
                raise ValueError(f"Organizer: {rule!r} is no rule: it has no propose(signals)")
        self.optimizers = as_optimizers(optimizer)
        held = {id(p) for o in self.optimizers for g in o.param_groups for p in g["params"]}
        for name, layer in self.layers.items():
            mine = {id(p) for p in layer.parameters()}
            if self.optimizers and mine and not mine & held:
                raise ValueError(
                    f"Organizer: no optimizer passed holds a parameter of layer {name!r}: pass the "
                    "one that trains it"
                )
        self.rules = list(rules)
        self.max_experts, self.every, self.budget = max_experts, every, budget
        self.cooldown = 5 * every if cooldown is None else cooldown
        self.tolerance = tolerance
        self.steps = 0
        self._decided = 0
        # when each expert was last acted on, and each proposal last refused and how often
        self._acted: dict[str, dict[int, int]] = {name: {} for name in self.layers}
        self._refused: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in self.layers}
        self._lost = 0
        self._model = model
        for name, layer in self.layers.items():
            layer.name = name
        self._attach()

    def _attach(self) -> None:
        for o in self.optimizers:
            guard(o, self._model)
        if self.optimizers:
            self.optimizers[0].register_step_post_hook(self._count)
        self._attached = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_attached": False}  # a copied optimizer has no hooks

    def _count(self, *_: Any) -> None:
        self.steps += 1

    def step(self, loss: Tensor | float | None = None) -> list[Event]:
        """Take in a loss; decide if it is time to.

        Args:
            loss: of the last training forward: a scalar, or one value per input of the MoE layers
                or per sequence, which tells the experts apart better. One that is NaN or infinite
                is counted in `lost_losses` and otherwise ignored.

        Returns:
            What was done and what was refused (`event.accepted`), often nothing.
        """
        if not self._attached:
            self._attach()
        if loss is not None:
            value = torch.as_tensor(loss)
            for layer in self.layers.values():
                layer.recorder.check_loss(value)
            for layer in self.layers.values():
                layer.recorder.observe_loss(list(layer.experts.values()), value)
        if not self.optimizers:
            self.steps += 1
        if self.steps - self._decided < self.every:
            return []
        self._decided = self.steps - self.steps % self.every
        self._report_lost()
        events: list[Event] = []
        for name, layer in self.layers.items():
            events += self._decide(name, layer)
        return events

    @property
    def lost_losses(self) -> int:
        """How many losses were NaN or infinite."""
        return max(int(layer.recorder.lost) for layer in self.layers.values())

    def _report_lost(self) -> None:
        if self.lost_losses > self._lost:
            log.warning("%d losses were NaN or infinite and ignored", self.lost_losses - self._lost)
            self._lost = self.lost_losses

    def _decide(self, name: str, layer: MoE) -> list[Event]:
        signals = snapshot(layer, self.steps)
        # all speak before any is carried out: signals are of the layer as it was
        proposals: list[Proposal] = []
        for rule in self.rules:
            with layer.gathered():
                said = rule.propose(signals)
            if not isinstance(said, (list, tuple)):
                raise ValueError(f"{rule!r}.propose must return a list of Proposal, got {said!r}")
            proposals += said
        acted, events, spent = self._acted[name], [], 0
        busy = {id for id, step in acted.items() if self.steps - step < self.cooldown}
        for proposal in proposals:
            structural = proposal.act in ("spawn", "merge", "prune")
            if busy & set(proposal.ids) or (structural and spent >= self.budget):
                continue
            if self._waits(name, proposal):
                continue
            event = self._carry_out(layer, proposal)
            events.append(event)
            if not event.accepted:
                times = self._refused[name].get(_key(proposal), (0, 0))[1]
                self._refused[name][_key(proposal)] = (self.steps, times + 1)
                continue
            spent += structural
            touched = {*proposal.ids} | ({event.child} if event.child is not None else set())
            busy |= touched
            acted.update(dict.fromkeys(touched, self.steps))
        layer.recorder.begin_window()
        for id in [id for id in acted if id not in layer.experts]:
            del acted[id]
        for key in [k for k in self._refused[name] if not _ids(k) <= set(layer.experts)]:
            del self._refused[name][key]
        return events

    def _waits(self, name: str, proposal: Proposal) -> bool:
        """Whether it was refused lately; each further refusal doubles the wait."""
        step, times = self._refused[name].get(_key(proposal), (0, 0))
        return times > 0 and self.steps - step < self.cooldown * 2 ** (times - 1)

    def _carry_out(self, layer: MoE, proposal: Proposal) -> Event:
        why: dict[str, Any] = {
            "step": self.steps,
            "reason": proposal.reason,
            "signals": proposal.signals,
        }
        act, ids, optimizers = proposal.act, list(proposal.ids), self.optimizers
        try:
            unknown = [id for id in ids if id not in layer.experts]
            if unknown:
                raise surgery.Refused(f"the layer has no expert {unknown}", None)
            if act == "spawn":
                if len(layer.experts) >= self.max_experts:
                    raise surgery.Refused(f"max_experts={self.max_experts} is reached", None)
                parent = ids[0] if ids else None
                event = surgery.spawn(layer, parent, optimizers, toward=proposal.toward, **why)
                # the newborn answers for what was novel
                if proposal.toward is not None:
                    layer.recorder.begin_window(forget=True)
                if parent is not None:
                    layer.experts[parent].statistics.view()["novel"] = 0.0
                return event
            if act == "merge":
                _check_merge(layer, ids)
                return surgery.merge(layer, ids, optimizers, tolerance=self.tolerance, **why)
            if act == "prune":
                _check_left(layer, ids)
                return surgery.prune(layer, ids, optimizers, tolerance=self.tolerance, **why)
            if act == "freeze":
                return surgery.freeze(layer, ids, **why)
            return surgery.thaw(layer, ids, optimizers, **why)
        except surgery.Refused as refusal:
            return layer.lineage.add(
                Event(
                    self.steps,
                    layer.name,
                    act,
                    tuple(ids),
                    reason=f"{proposal.reason}; refused: {refusal}",
                    signals=proposal.signals,
                    change=refusal.change,
                    accepted=False,
                )
            )

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs, in plain JSON types. The rules are the user's to give."""
        return {
            "steps": self.steps,
            "decided": self._decided,
            "lost": self._lost,
            "acted": {
                name: {str(id): step for id, step in acted.items()}
                for name, acted in self._acted.items()
            },
            "refused": {
                name: {key: list(value) for key, value in refused.items()}
                for name, refused in self._refused.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state is of a model with other MoE layers."""
        if set(state["acted"]) != set(self.layers):
            raise ValueError(
                f"the organizer's state is of layers {sorted(state['acted'])}, "
                f"this model has {sorted(self.layers)}"
            )
        self.steps, self._decided, self._lost = state["steps"], state["decided"], state["lost"]
        self._acted = {
            name: {int(id): step for id, step in acted.items()}
            for name, acted in state["acted"].items()
        }
        self._refused = {
            name: {key: (step, times) for key, (step, times) in refused.items()}
            for name, refused in state["refused"].items()
        }


def _check_merge(layer: MoE, ids: Sequence[int]) -> None:
    left = len(layer.experts) - len(ids) + 1
    if left < layer.router.min_experts:
        raise surgery.Refused(f"the router needs {layer.router.min_experts} experts", None)
    try:
        check_alike([layer.experts[id].body for id in ids])
    except ValueError as error:
        raise surgery.Refused(str(error), None) from error


def _key(proposal: Proposal) -> str:
    return " ".join([proposal.act, *map(str, proposal.ids)])


def _ids(key: str) -> set[int]:
    return {int(id) for id in key.split()[1:]}


def _check_left(layer: MoE, ids: Sequence[int]) -> None:
    left = [e for id, e in layer.experts.items() if id not in ids]
    if len(left) < layer.router.min_experts:
        raise surgery.Refused(f"the router needs {layer.router.min_experts} experts", None)
    if not any(e.admission > 0 for e in left):
        raise surgery.Refused("only newborns would be left", None)


@torch.no_grad()
def snapshot(layer: MoE, step: int = 0) -> Signals:
    """The layer's signals for the rules, copied to the CPU."""
    experts = list(layer.experts.values())
    recorder = layer.recorder
    view = recorder.records(experts)
    numbers_FE = torch.stack([view[field] for field in FIELDS]).cpu().tolist()
    novel = recorder.novel
    count = float(novel[2])
    mean = (novel[3:] / novel[2]) if count >= 1 else None
    nearest = None
    if mean is not None:
        nearest = experts[int(distance_z(view, mean[None])[0].argmin())].id

    @torch.no_grad()
    def similarity() -> Tensor:
        rows = {i: evidence_of(layer, e) for i, e in enumerate(experts)}
        cosine_EE = torch.zeros(len(experts), len(experts), dtype=torch.float64)
        for i, x in rows.items():
            if x is None:
                continue
            with evaluating(layer):
                x = x.to(weight_dtype(layer))
                out = [e(x).double() for e in experts]
            for j, y in enumerate(out):
                cosine_EE[i, j] = torch.cosine_similarity(out[i], y, dim=-1).mean().cpu()
        known = torch.tensor([rows[i] is not None for i in range(len(experts))]).double()
        both = (known[:, None] + known[None, :]).clamp_min(1)
        return ((cosine_EE + cosine_EE.T) / both).float()

    def usefulness() -> dict[int, float]:
        changes = {}
        for expert in experts:
            left = [e for e in experts if e is not expert]
            if len(left) < layer.router.min_experts or expert.statistics["hits"] == 0:
                continue
            if not any(e.admission > 0 for e in left):
                continue
            change, _ = output_change(layer, left, [expert])
            if change is not None:
                changes[expert.id] = change
        return changes

    overlap = layer.router.overlap(experts)
    if overlap is None:
        overlap = distance_z(view, view.mean)
    return Signals(
        layer=layer.name,
        step=step,
        d_model=layer.d_model,
        ids=[e.id for e in experts],
        groups=[merge_group(e.body) for e in experts],
        frozen=[e.frozen for e in experts],
        values=dict(zip(FIELDS, numbers_FE, strict=True)),
        novel_share=float(novel[1]),
        novel_count=count,
        novel_mean=None if mean is None else mean.cpu(),
        novel_nearest=nearest,
        overlap=overlap.cpu(),
        similarity=similarity,
        usefulness=usefulness,
    )
