"""Random lives: whatever is done to a layer, in whatever order, the invariants hold."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from snapshots import copied, differences, of_everything, of_experts
from torch import nn

from growmoe import FFN, MoE, TopK, load, save, surgery

D, MOST = 8, 7
INPUTS = torch.randn(40, D, generator=torch.Generator().manual_seed(9))
some = st.integers(0, 10**6)  # taken modulo the number of the living


class Linear(nn.Module):
    """A user's own kind of expert."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(D, D)

    def forward(self, x):
        return self.map(x)


class Host(nn.Module):
    def __init__(self, num_experts, seed):
        super().__init__()
        self.moe = MoE(D, FFN(8, bias=True), num_experts, TopK(2), warmup=5, seed=seed)

    def forward(self, x):
        return x + self.moe(x)


def optimizer_of(model):
    return torch.optim.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1)


def without_objects(snapshots):
    """What must come back in another process: all but the identity of objects."""
    return {
        id: {k: v for k, v in s.items() if k not in ("object", "parameters", "gradients", "place")}
        for id, s in snapshots.items()
    }


class Life(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.model = Host(3, seed=0)
        self.optimizer = optimizer_of(self.model)
        self.ever = {0, 1, 2}
        self.draws = torch.Generator().manual_seed(1)

    @property
    def layer(self):
        return self.model.moe

    def experts(self):
        return of_experts(self.layer, [self.optimizer])

    def choose(self, numbers):
        living = list(self.layer.experts)
        return list(dict.fromkeys(living[n % len(living)] for n in numbers))

    def born(self, id):
        assert id not in self.ever and id > max(self.ever)
        self.ever.add(id)

    def survived(self, before, named=()):
        after = self.experts()
        for id in before:
            if id not in named:
                assert differences(before[id], after[id]) == []

    def attempt(self, act, named):
        """The act happens, or it is refused and nothing at all has changed."""
        before, everything = self.experts(), of_everything(self.model, [self.optimizer])
        try:
            event = act()
        except ValueError:
            assert differences(everything, of_everything(self.model, [self.optimizer])) == []
            return None
        self.survived(before, named)
        return event

    # Acts.

    @precondition(lambda self: len(self.layer.experts) < MOST)
    @rule(parent=some, noise=st.sampled_from([0.0, 0.05]), admitted=st.booleans())
    def clone(self, parent, noise, admitted):
        (parent,) = self.choose([parent])
        before = self.experts()
        self.born(
            surgery.spawn(
                self.layer, parent, self.optimizer, noise=noise, admitted=admitted
            ).child
        )  # fmt: skip
        self.survived(before)

    @precondition(lambda self: len(self.layer.experts) < MOST)
    @rule(kind=st.sampled_from([None, FFN(12), Linear]), toward=st.booleans())
    def fresh(self, kind, toward):
        before = self.experts()
        mean = torch.ones(D) if toward else None
        event = surgery.spawn(self.layer, None, self.optimizer, expert=kind, toward=mean)
        self.born(event.child)
        self.survived(before)

    @rule(ids=st.lists(some, min_size=2, max_size=3), tolerance=st.sampled_from([None, 0.2]))
    def merge(self, ids, tolerance):
        ids = self.choose(ids)
        event = self.attempt(
            lambda: surgery.merge(self.layer, ids, self.optimizer, tolerance=tolerance), ids
        )
        if event is not None:
            self.born(event.child)

    @rule(ids=st.lists(some, min_size=1, max_size=2), tolerance=st.sampled_from([None, 0.2]))
    def prune(self, ids, tolerance):
        ids = self.choose(ids)
        self.attempt(
            lambda: surgery.prune(self.layer, ids, self.optimizer, tolerance=tolerance), ids
        )

    @rule(ids=st.lists(some, min_size=1, max_size=2))
    def freeze(self, ids):
        ids = self.choose(ids)
        self.attempt(lambda: surgery.freeze(self.layer, ids), ids)
        assert all(not p.requires_grad for i in ids for p in self.layer.experts[i].parameters())

    @rule(ids=st.lists(some, min_size=1, max_size=3))
    def thaw(self, ids):
        ids = self.choose(ids)
        self.attempt(lambda: surgery.thaw(self.layer, ids), ids)
        assert all(p.requires_grad for i in ids for p in self.layer.experts[i].parameters())

    @rule(steps=st.integers(1, 6), rows=st.sampled_from([1, 16]))
    def train(self, steps, rows):
        before = self.experts()
        self.model.train()
        for _ in range(steps):
            x = torch.randn(rows, D, generator=self.draws)
            loss = (self.model(x) - x.flip(1)).square().mean() + self.layer.aux_loss()
            if loss.requires_grad:
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        after = self.experts()
        idle = {i for i, e in self.layer.experts.items() if e.statistics["idle"] >= steps}
        for id in before:
            learned = ("weights", "state") if id in idle or before[id]["frozen"] else ()
            for what in ("parameters", "place", "frozen"):
                assert differences(before[id][what], after[id][what]) == []
            for what in learned:
                for name in before[id][what]:
                    if before[id]["frozen"] or name.startswith("body"):  # an idle key may learn
                        assert differences(before[id][what][name], after[id][what][name]) == []

    # Journeys.

    @rule(num_experts=st.integers(2, 5))
    def save_and_load_into_another_size(self, num_experts):
        before = without_objects(self.experts())
        lineage = [str(e) for e in self.layer.lineage]
        other = Host(num_experts, seed=7)
        optimizer = optimizer_of(other)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "checkpoint.safetensors")
            save(path, self.model, self.optimizer)
            kind = f"{Linear.__module__}.{Linear.__qualname__}"
            load(path, other, optimizer, experts={kind: Linear})
        counters = (self.layer.next_id, self.layer.steps)
        random = self.layer.generator.get_state()
        self.model, self.optimizer = other, optimizer
        assert differences(before, without_objects(self.experts())) == []
        assert [str(e) for e in self.layer.lineage] == lineage
        assert (self.layer.next_id, self.layer.steps) == counters
        assert torch.equal(self.layer.generator.get_state(), random)

    @rule()
    def state_dict_of_another_size(self):
        other = Host(4, seed=7)
        surgery.spawn(other.moe, None, expert=Linear)  # so that it knows that kind
        other.load_state_dict(self.model.state_dict())
        mine = {n: copied(p) for n, p in self.model.named_parameters()}
        theirs = {n: copied(p) for n, p in other.named_parameters()}
        assert differences(mine, theirs) == []
        assert other.moe.lineage.replay() == list(self.layer.experts)

    @rule()
    def state_dict_of_its_own(self):
        before = self.experts()
        self.model.load_state_dict(copied(self.model.state_dict()))
        self.survived(before)

    @rule()
    def deepcopy(self):
        before = without_objects(self.experts())
        self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))
        assert differences(before, without_objects(self.experts())) == []

    @rule()
    def to_float64_and_back(self):
        before = self.experts()
        self.model.double()
        self.outputs_agree(INPUTS.double())
        self.model.float()
        self.survived(before)

    @rule()
    def to_where_it_is(self):
        before = self.experts()
        self.model.to("cpu").to(torch.float32).cpu()
        self.survived(before)

    # What holds after each.

    def outputs_agree(self, x):
        self.model.eval()
        with torch.no_grad():
            y = self.layer(x)
        slow = self.layer.output_of(x, list(self.layer.experts.values()))
        self.model.train()
        assert y.isfinite().all()
        assert (y - slow).norm() <= 1e-5 * slow.norm()

    @invariant()
    def the_fast_path_equals_the_slow(self):
        self.outputs_agree(INPUTS)

    @invariant()
    def the_living_are_those_of_the_lineage(self):
        living = list(self.layer.experts)
        assert living == sorted(living) and set(living) <= self.ever
        assert self.layer.next_id > max(self.ever)
        assert living == [e.id for e in self.layer.experts.values()]
        assert self.layer.lineage.replay() == living
        frozen = [i for i, e in self.layer.experts.items() if e.frozen]
        assert self.layer.lineage.frozen() == frozen

    @invariant()
    def the_optimizer_holds_the_living_once_each(self):
        (group,) = self.optimizer.param_groups
        names = {id(p): n for n, p in self.model.named_parameters()}
        held = dict(zip(map(id, group["params"]), group["param_names"], strict=True))
        assert len(group["params"]) == len(held) and set(held) == set(names)
        assert set(held.values()) == set(names.values())
        assert {id(p) for p in self.optimizer.state} <= set(names)


def live(lives, acts):
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=lives,
            stateful_step_count=acts,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_invariants_hold_after_each_act_of_a_few_lives():
    live(5, 20)


@pytest.mark.slow
def test_the_invariants_hold_after_each_act_of_many_lives():
    live(50, 50)
