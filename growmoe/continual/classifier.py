"""A classifier that grows on a stream: fixed features, domains found by novelty, closed-form heads.

It sees no task labels and no boundaries, keeps no examples but those that wait for a decision, and
passes once over the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from growmoe import surgery
from growmoe.continual.cell import Memory, tensor_bytes
from growmoe.continual.domain_gate import DomainGate
from growmoe.continual.domains import Domain, LabelExperts
from growmoe.continual.intake import Features, Intake
from growmoe.continual.view import View
from growmoe.experts.moments import Moments
from growmoe.lineage import Event, Lineage
from growmoe.moe import MoE
from growmoe.organizer import Organizer
from growmoe.routers.closed_form import ClosedFormGate
from growmoe.rules import Rule, SpawnOnNovelty

WINDOW = 256  # inputs, of which the novel ones wait for a decision


def default_rules() -> list[Rule]:
    """What makes domains of `GrowingClassifier`: births alone.

    `MergeOverlapping(z=1.0)` would merge domains that turn out to be one, `PruneIdle` remove those
    that do not come again, and `label_rules=[FreezeSettled(), ThawOnNovelty()]` freeze experts of
    labels that have enough rows. They are left out because no stream was found where they are
    worth anything (`growmoe bench --controls` has them).
    """
    return [SpawnOnNovelty(share=0.12)]


class GrowingClassifier(nn.Module):
    """A growing mixture of `Domain` experts, each a mixture of `Moments`, on fixed features.

    A domain is born when inputs arrive that no domain explains given their labels; a label's expert
    within it when the label first appears there. `learn` takes labelled batches of any size in any
    order; calling the model predicts, at any time, without label or domain. Save it whole, by
    `torch.save` or pickle: its features are no tensors of a state dict.

    Until a decision, what is novel is learned by the domain that explains it best; the novel ones
    of the last 256 inputs wait beside, and are taken back and given to the newborn if there is one.
    They count as memory.

    Args:
        features: fitted on the first `early` images, which wait until then.
        num_classes: C.
        early: how many images wait.
        rules: on domains, in place of `default_rules()`.
        label_rules: on the label experts of each domain, none if left out.
        gate: of the label experts, in place of `ClosedFormGate()`.
        domain_gate: in place of `DomainGate()`.
        num_domains: domains to begin with; with `rules=[]` their number is fixed.
        seed: of the features and of the layers' own generators.

    Attributes:
        layer: the `MoE` of domains, once the features are fitted; None before.
        organizer: its organizer, likewise.
        lineage: the events of all layers so far, in order.
    """

    def __init__(
        self,
        features: Features,
        num_classes: int,
        *,
        early: int = 1000,
        rules: Sequence[Rule] | None = None,
        label_rules: Sequence[Rule] | None = None,
        gate: ClosedFormGate | None = None,
        domain_gate: DomainGate | None = None,
        num_domains: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("num_domains", num_domains)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value!r}")
        self.features, self.num_classes = features, num_classes
        self.rules = default_rules() if rules is None else list(rules)
        self.label_rules = list(label_rules or ())
        self.gate = ClosedFormGate() if gate is None else gate
        self.domain_gate = DomainGate() if domain_gate is None else domain_gate
        self.num_domains, self.seed = num_domains, seed
        self.layer: MoE | None = None
        self.organizer: Organizer | None = None
        self.lineage: list[Event] = []
        self._view = View(features)
        self._intake = Intake(self._view, early, seed)
        self._entered: int | None = None
        # (inputs before them, what was usual then, inputs, labels, where they went)
        self._novel: list[tuple[int, dict[int, Tensor], Tensor, Tensor, Tensor]] = []
        self._learned = self._most_waiting = 0

    def learn(self, images: Tensor, labels: Tensor) -> list[Event]:
        """Take in a labelled batch once.

        Args:
            images: float32 [N, ...], as the features take them.
            labels: int64 [N], in [0, C).

        Returns:
            What was born and what the organizers did.

        Raises:
            ValueError: labels that are not integers in range, or not as many as images; images that
                are not finite or change their shape. Nothing is learned then.
        """
        self._check(labels)
        return [e for x, y in self._intake(images, labels) for e in self._learn(x, y)]

    def finish(self) -> list[Event]:
        """Begin even if fewer than `early` images have come, as a first prediction does."""
        return [e for x, y in self._intake.flush() for e in self._learn(x, y)]

    def enter(self, domain: int | None = None) -> int:
        """Be told that another domain begins: all that is learned from now on is of that one.

        For controls, such as growth at oracle boundaries; prediction is told nothing.

        Args:
            domain: the id of one to return to; None for a new one.

        Returns:
            The id.

        Raises:
            KeyError: no domain has this id.
        """
        self.finish()
        if self.layer is None or self.organizer is None:
            self._entered = 0  # the first is born with the first input
        elif domain is None:
            newest = list(self.layer.experts)[-1]
            event = surgery.spawn(
                self.layer, newest, admitted=True, step=self.organizer.steps, reason="was told to"
            )
            self._entered = self._named(event)
        elif domain in self.layer.experts:
            self._entered = domain
        else:
            raise KeyError(f"no domain {domain!r}; the living are {list(self.layer.experts)}")
        return self._entered

    def forward(self, images: Tensor) -> Tensor:
        """Scores [N, C]: each label's share of the votes; 0 for one that was not shortlisted.

        Raises:
            RuntimeError: nothing was learned yet.
            ValueError: images that are not finite or of another shape than those learned.
        """
        self.finish()
        if self.layer is None:
            raise RuntimeError("GrowingClassifier: nothing was learned yet")
        self._intake.check(images)
        self.layer.eval()
        with torch.no_grad():
            scores: Tensor = self.layer(self._view(images))
        self.layer.train(self.training)
        return scores

    @property
    def domains(self) -> dict[int, Domain]:
        """The living domains by id."""
        experts = {} if self.layer is None else self.layer.experts
        return {id: cast(Domain, e.body) for id, e in experts.items()}

    @property
    def num_experts(self) -> int:
        """Label experts in all domains."""
        return sum(domain.num_experts for domain in self.domains.values())

    @property
    def num_heads(self) -> int:
        """Numbers in all heads that were solved."""
        inner = sum(domain.head_numbers() for domain in self.domains.values())
        return inner + self.domain_gate.head_numbers()

    def rows(self) -> dict[str, float]:
        """The inputs that each expert has received, by "layer:id"."""
        found: dict[str, float] = {}
        for id, domain in self.domains.items():
            if domain.layer is None:
                found[f"domains:{id}"] = float(domain.count_C.sum())
                continue
            for label, expert in domain.layer.experts.items():
                found[f"{domain.name}:{label}"] = expert.statistics["rows"]
        return found

    @torch.no_grad()
    def expert_names(self, images: Tensor) -> list[str]:
        """The expert that decides on each image, by "layer:id" as in `rows`."""
        self.finish()
        if self.layer is None:
            raise RuntimeError("GrowingClassifier: nothing was learned yet")
        x_NI = self._view(images)
        chosen_N = self.layer.eval().route(x_NI).assignment.expert_R
        self.layer.train(self.training)
        names = [""] * len(images)
        for i, (id, domain) in enumerate(self.domains.items()):
            rows = (chosen_N == i).nonzero()[:, 0]
            if not len(rows):
                continue
            if domain.layer is None:
                inner = [f"domains:{id}"] * len(rows)
            else:
                by_label = {
                    int(cast(Moments, e.body).label): f"{domain.name}:{j}"
                    for j, e in domain.layer.experts.items()
                }
                answers = domain.eval()(x_NI[rows]).argmax(1).tolist()
                inner = [by_label[label] for label in answers]
                domain.train(self.training)
            for row, name in zip(rows.tolist(), inner, strict=True):
                names[row] = name
        return names

    def memory(self) -> Memory:
        """All that is kept, in bytes; of waiting inputs the most there ever were."""
        if self.layer is None:
            return Memory(examples=self._intake.waiting_bytes)
        return Memory(
            model=4 * self.num_heads,
            buffers=self._view.memory_bytes,
            statistics=tensor_bytes(*self.layer.buffers()),
            examples=self._most_waiting,
        )

    def _check(self, labels: Tensor) -> None:
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(f"labels must be a tensor of integers [N], got {labels!r:.80}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels must be in [0, {self.num_classes}), got "
                f"{int(labels.min())} to {int(labels.max())}"
            )

    @torch.no_grad()
    def _learn(self, x_NI: Tensor, labels: Tensor) -> list[Event]:
        begun: list[Event] = []
        if self.layer is None or self.organizer is None:
            self.layer, self.organizer = self._begin()
            begun = list(self.layer.lineage)
        labels = labels.long()
        self.layer.train()
        context: dict[str, Any] = {"label": labels}
        if self._entered is not None:
            context["domain"] = self._entered
        routing, _ = self.layer.rows(x_NI, context)
        ids = list(self.layer.experts)
        where_N = torch.empty_like(labels)
        where_N[routing.assignment.token_R] = torch.tensor(ids)[routing.assignment.expert_R]
        usual = {id: domain.usual.score_3C.clone() for id, domain in self.domains.items()}
        events = begun
        for id in where_N.unique().tolist():
            rows, expert = where_N == id, self.layer.experts[id]
            if not expert.frozen:
                events += cast(Domain, expert.body).learn(x_NI[rows], labels[rows])
        self._wait(usual, x_NI, labels, where_N, routing.novel_T)
        acts = self.organizer.step()
        for event in acts:
            if event.accepted and event.act == "spawn":
                events += self._settle(self._named(event))
            elif event.accepted and event.act in ("merge", "prune"):
                self._novel.clear()  # where they went may be gone
                heir = self._named(event) if event.act == "merge" else None
                self._entered = heir if self._entered in event.ids else self._entered
        events = [*events, *acts]
        self.lineage += events
        return events

    def _named(self, event: Event) -> int:
        assert self.layer is not None and event.child is not None
        cast(Domain, self.layer.experts[event.child].body).name = f"domain {event.child}"
        return event.child

    def _wait(
        self,
        usual: dict[int, Tensor],
        x_NI: Tensor,
        labels: Tensor,
        where_N: Tensor,
        novel_N: Tensor | None,
    ) -> None:
        """Novel inputs wait for some batches, in case they are the first of a new domain."""
        now = self._learned
        self._learned += len(labels)
        self._novel = [held for held in self._novel if now - held[0] < WINDOW]
        if novel_N is not None and novel_N.any():
            self._novel.append((now, usual, x_NI[novel_N], labels[novel_N], where_N[novel_N]))
        waiting = sum(tensor_bytes(*held[2:], *held[1].values()) for held in self._novel)
        self._most_waiting = max(self._most_waiting, waiting)

    def _settle(self, newborn: int) -> list[Event]:
        """Give the newborn what waited, taken back from where it went."""
        assert self.layer is not None
        if not self._novel:
            return []
        _, usual, *_ = self._novel[0]
        x_NI = torch.cat([held[2] for held in self._novel])
        labels = torch.cat([held[3] for held in self._novel])
        where_N = torch.cat([held[4] for held in self._novel])
        self._novel.clear()
        for id in where_N.unique().tolist():
            if id in self.layer.experts:
                rows, domain = where_N == id, self.domains[id]
                domain.take_back(x_NI[rows], labels[rows])
                if id in usual:  # running means cannot be subtracted from
                    domain.usual.score_3C.copy_(usual[id])
                self.layer.experts[id].statistics.view()["rows"] -= int(rows.sum())
        self.layer.experts[newborn].statistics.view()["rows"] += len(labels)
        return self.domains[newborn].learn(x_NI, labels)

    def _begin(self) -> tuple[MoE, Organizer]:
        view, how = self._view, (self.gate, self.label_rules, self.seed)
        kind = partial(
            Domain,
            self.num_classes,
            view.width,
            view.num_features,
            *how,
            view.blocks,
            pooled=True,
        )
        layer = MoE(
            view.num_features,
            kind,
            num_experts=self.num_domains,
            router=self.domain_gate,
            d_out=self.num_classes,
            balance_loss=0.0,
            warmup=1,
            evidence="moments",
            seed=self.seed,
        )
        first = cast(Domain, next(iter(layer.experts.values())).body)
        first.heads = LabelExperts(self.num_classes, view.blocks, *how)
        named = nn.ModuleDict({"domains": layer})
        # sums add up exactly: whether two domains are one is for the rule to say
        organizer = Organizer(
            named, rules=self.rules, max_experts=1024, every=1, cooldown=8, tolerance=1.0
        )
        layer.lineage = Lineage(replace(event, layer="domains") for event in layer.lineage)
        for id, expert in layer.experts.items():
            cast(Domain, expert.body).name = f"domain {id}"
        return layer, organizer
