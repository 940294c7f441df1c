"""A small stream that can drift, a model that learns it, and signals made by hand."""

from dataclasses import replace

import torch

from growmoe import FFN, MoE, Organizer, TopK, aux_loss
from growmoe.organizer import snapshot

D = 4
CENTERS = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [-6, -6, 0, 6]])


class Stream:
    """Inputs around centers, targets by a function of the input that may be turned round."""

    def __init__(self, seed=0, noise=0.1):
        self.draw = torch.Generator().manual_seed(seed)
        self.noise = noise

    def batch(self, centers=(0, 1), turned=False, spread=0.4, rows=48):
        which = torch.tensor(centers)[torch.randint(len(centers), (rows,), generator=self.draw)]
        x = CENTERS[which] + spread * torch.randn(rows, D, generator=self.draw)
        y = torch.sin(x.flip(1)) * (-1 if turned else 1)
        return x, y + self.noise * torch.randn(rows, D, generator=self.draw)


class Learner:
    """A layer with optimizer and organizer; `learn` trains it and gives what was done."""

    def __init__(
        self, rules, num_experts=3, k=1, seed=0, lr=1e-2, layer=None, noise=0.1, **options
    ):
        self.layer = layer or MoE(
            D, FFN(8), num_experts, TopK(k), warmup=5, seed=seed, balance_loss=0.0
        )
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=lr)
        self.organizer = Organizer(
            self.layer, self.optimizer, rules, **{"every": 10, "cooldown": 30, **options}
        )
        self.stream = Stream(seed, noise)

    def learn(self, steps, per_token=True, **domain):
        events = []
        for _ in range(steps):
            x, y = self.stream.batch(**domain)
            losses = (self.layer(x) - y).square().mean(1)
            loss = losses.mean() + aux_loss(self.layer)
            if loss.requires_grad:  # not if all are frozen
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            events += self.organizer.step(losses if per_token else losses.mean())
        return events


def point(layer, *keys):
    """Give the experts these keys."""
    for expert, key in zip(layer.experts.values(), keys, strict=True):
        expert.entries.key.data.copy_(torch.tensor(key, dtype=torch.float32))


def done(events, act=None):
    """The acts that were carried out."""
    return [e for e in events if e.accepted and act in (None, e.act)]


def signals(num_experts=3, frozen=(), **values):
    """A snapshot of a layer that lived through nothing, with the values given put in.

    A value of the record is a list, one number for each expert; other fields go as they are.
    """
    layer = MoE(D, FFN(8), num_experts, TopK(1), seed=0)
    plain = snapshot(layer)
    record = {k: [float(v) for v in values.pop(k)] for k in list(values) if k in plain.values}
    return replace(
        plain,
        frozen=[i in frozen for i in plain.ids],
        values={**plain.values, **record},
        **values,
    )
