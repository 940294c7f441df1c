"""Every way of choosing written as plainly as its formula: loops over tokens and experts, float64.

Nothing here is shared with growmoe's own computation. Where a router draws random numbers, the
formula draws them too, by the same calls of torch in the same order, so that after the same
`torch.manual_seed` both have the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from reference_gates import Rows, Setting, best, cosine, gate_logits, log, sigmoid, softmax
from torch import Tensor

from growmoe import Router, routers


@dataclass
class Choice:
    """What a router should have decided.

    Attributes:
        weights: per token, {position of the expert: combine weight, [] or [J]}.
        mixtures: for a soft choice: per row, the (expert, weight of each token in it, weight of it
            in each token); `weights` is then empty.
    """

    weights: list[dict[int, Tensor]]
    probs: Rows
    logits: Rows
    aux: Tensor | None = None
    mixtures: list[tuple[int, list[Tensor], list[Tensor]]] = field(default_factory=list)


def choose(router: Router, s: Setting) -> Choice:
    """Raises TypeError for a router whose formula is not written here."""
    if type(router) not in FORMULAS:
        raise TypeError(f"no reference for {router}")
    return FORMULAS[type(router)](router, s)


def spread(values: list[Tensor]) -> Tensor:
    """Variance over squared mean."""
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def _dense(router: routers.Dense, s: Setting) -> Choice:
    logits = gate_logits(router.gate, s)
    probs = [softmax(row) for row in logits]
    return Choice([dict(enumerate(row)) for row in probs], probs, logits)


def _top_k(router: routers.TopK, s: Setting) -> Choice:
    logits = gate_logits(router.gate, s)
    if s.training and router.noise:
        draw = torch.randn(len(s.tokens), len(s.experts), dtype=s.dtype).double()
        logits = [
            [v + router.noise * n for v, n in zip(row, noise, strict=True)]
            for row, noise in zip(logits, draw, strict=True)
        ]
    probs, weights = [], []
    for row in logits:
        chosen = best(row, router.k, s.margins)
        scores = [sigmoid(v) for v in row] if router.score == "sigmoid" else softmax(row)
        probs.append(scores)
        if router.score == "softmax_topk":
            weights.append(dict(zip(chosen, softmax([row[e] for e in chosen]), strict=True)))
        else:
            total = sum(scores[e] for e in chosen) if router.renormalize else 1.0
            weights.append({e: scores[e] / total for e in chosen})
    return Choice(weights, probs, logits)


def _switch(router: routers.Switch, s: Setting) -> Choice:
    seen = s
    if s.training and router.jitter and s.tokens:
        draw = torch.empty(len(s.tokens), len(s.tokens[0]), dtype=s.dtype)
        draw = draw.uniform_(1 - router.jitter, 1 + router.jitter).double()
        seen = replace(s, tokens=[t * d for t, d in zip(s.tokens, draw, strict=True)])
    logits = gate_logits(router.gate, seen)
    probs = [softmax(row) for row in logits]
    chosen = [best(row, 1, s.margins)[0] for row in probs]
    return Choice([{e: row[e]} for e, row in zip(chosen, probs, strict=True)], probs, logits)


def _noisy(router: routers.NoisyTopK, s: Setting) -> Choice:
    clean = gate_logits(router.gate, s)
    noisy, sds = clean, [[torch.zeros(())] * len(s.experts) for _ in s.tokens]
    if s.training:
        draw = torch.randn(len(s.tokens), len(s.experts), dtype=s.dtype).double()
        sds = [
            [torch.log1p(torch.exp(t.dot(s.entry("noise", e)))) for e in range(len(s.experts))]
            for t in s.tokens
        ]
        noisy = [
            [c + n * sd for c, n, sd in zip(*rows, strict=True)]
            for rows in zip(clean, draw, sds, strict=True)
        ]
    weights = []
    for row in noisy:
        chosen = best(row, router.k, s.margins)
        weights.append(dict(zip(chosen, softmax([row[e] for e in chosen]), strict=True)))
    aux = None
    if s.training and s.tokens:
        zero = torch.zeros((), dtype=torch.float64)
        importance = [sum((w[e] for w in weights if e in w), zero) for e in range(len(s.experts))]
        load = [zero] * len(s.experts)
        for c, h, sd in zip(clean, noisy, sds, strict=True):
            for e in range(len(s.experts)):
                others = sorted([v for i, v in enumerate(h) if i != e], key=lambda v: -v.item())
                if len(others) < router.k:
                    load[e] = load[e] + 1
                elif s.admissions[e] > 0:
                    rival = others[router.k - 1]
                    z = (c[e] - rival) / sd[e]
                    load[e] = load[e] + (0.5 * (1 + torch.erf(z / math.sqrt(2))))
        aux = router.importance * spread(importance) + router.load * spread(load)
    return Choice(weights, [softmax(row) for row in noisy], noisy, aux)


def _gshard(router: routers.GShard, s: Setting) -> Choice:
    logits = gate_logits(router.gate, s)
    probs = [softmax(row) for row in logits]
    draw = torch.rand(len(s.tokens), dtype=s.dtype).tolist() if s.training else [0] * len(probs)
    weights = []
    for row, u in zip(probs, draw, strict=True):
        first, second = best(row, 2, s.margins)
        g1, g2 = (row[e] / (row[first] + row[second]) for e in (first, second))
        used = not s.training or u < min(1.0, 2 * g2.item())
        s.margins.append(abs(u - 2 * g2.item()))
        weights.append({first: g1, second: g2} if used else {first: g1})
    return Choice(weights, probs, logits)


def _gumbel(router: routers.Gumbel, s: Setting) -> Choice:
    logits = gate_logits(router.gate, s)
    drawn = _plus(logits, s.gumbel()) if s.training else logits
    probs = [softmax([v / router.temperature for v in row]) for row in drawn]
    if not router.hard:
        return Choice([dict(enumerate(row)) for row in probs], probs, logits)
    weights = []
    for row, p in zip(drawn, probs, strict=True):
        chosen = [e for e in best(row, router.k, s.margins)]
        # 1/k, with the gradient of p/k
        weights.append({e: 1 / router.k + (p[e] - p[e].detach()) / router.k for e in chosen})
    return Choice(weights, probs, logits)


def _plus(a: Rows, b: Rows) -> Rows:
    return [[v + n for v, n in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def _expert_choice(router: routers.ExpertChoice, s: Setting) -> Choice:
    logits = gate_logits(router.gate, s)
    probs = [softmax(row) for row in logits]
    weights: list[dict[int, Tensor]] = [{} for _ in probs]
    for e, admission in enumerate(s.admissions):
        share = math.ceil(len(probs) * router.capacity * admission / sum(s.admissions))
        for t in best([row[e] for row in probs], share, s.margins) if probs and share else []:
            weights[t][e] = probs[t][e]
    return Choice(weights, probs, logits)


def _sinkhorn(router: routers.Sinkhorn, s: Setting) -> Choice:
    logits = gate_logits(router.gate, s)
    probs = [softmax(row) for row in logits]
    plan = [[v.item() for v in row] for row in logits]
    if s.training and plan:
        plan = [[math.exp(v) for v in row] for row in plan]
        for _ in range(3000):
            for e, admission in enumerate(s.admissions):
                column = sum(row[e] for row in plan)
                goal = len(plan) * admission / sum(s.admissions)
                for row in plan:
                    row[e] *= goal / column if column else 1.0
            plan = [[v / sum(row) for v in row] for row in plan]
    weights = []
    for row, p in zip(plan, probs, strict=True):
        # growmoe stops within 1e-4
        gaps: list[float] = []
        chosen = best([torch.tensor(v, dtype=torch.float64) for v in row], router.k, gaps)
        s.margins.extend(gap / 100 if s.training else gap for gap in gaps)
        total = sum(p[e] for e in chosen) if router.k > 1 else 1.0
        weights.append({e: p[e] / total for e in chosen})
    return Choice(weights, probs, logits)


def balanced(logits: list[list[float]], fewest: list[int], most: list[int]) -> list[int]:
    """The expert of each token with the largest sum, by trying all ways of filling the experts."""

    @cache
    def fill(t: int, loads: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        if t == len(logits):
            enough = all(n >= f for n, f in zip(loads, fewest, strict=True))
            return (0.0 if enough else -math.inf), ()
        options = [(-math.inf, (0,) * (len(logits) - t))]
        for e, n in enumerate(loads):
            if n < most[e]:
                rest, chosen = fill(t + 1, (*loads[:e], n + 1, *loads[e + 1 :]))
                options.append((logits[t][e] + rest, (e, *chosen)))
        return max(options)

    return list(fill(0, (0,) * len(most))[1])


def _base(router: routers.BASE, s: Setting) -> Choice:
    logits = gate_logits(router.gate, s)
    scores = [[sigmoid(v) for v in row] for row in logits]
    chosen = [best(row, 1, s.margins)[0] for row in logits]
    if s.training and logits:
        shares = [len(logits) * a / sum(s.admissions) for a in s.admissions]
        fewest, most = [int(v + 1e-9) for v in shares], [math.ceil(v - 1e-9) for v in shares]
        chosen = balanced([[v.item() for v in row] for row in logits], fewest, most)
    return Choice([{e: row[e]} for e, row in zip(chosen, scores, strict=True)], scores, logits)


def hash_score(value: int, id: int, seed: int) -> float:
    """A uniform draw in (0, 1) by splitmix64's finalizer, in Python's own integers."""
    mask = 2**64 - 1
    z = (value * 0x9E3779B97F4A7C15 + (id + 1 + (seed << 20)) * 0xC2B2AE3D27D4EB4F) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (((z ^ (z >> 31)) >> 11) + 0.5) * 2.0**-53


def _hash(router: routers.Hash, s: Setting) -> Choice:
    weights, logits = [], []
    for value in s.told(router.by) if s.tokens else []:
        scores = [
            math.log(hash_score(value, e.id, router.seed)) / a if a else -math.inf
            for e, a in zip(s.experts, s.admissions, strict=True)
        ]
        logits.append([torch.tensor(v, dtype=torch.float64) for v in scores])
        share = torch.tensor(1 / router.k, dtype=torch.float64)
        weights.append({e: share for e in best(logits[-1], router.k, s.margins)})
    share = [torch.tensor(a / sum(s.admissions), dtype=torch.float64) for a in s.admissions]
    return Choice(weights, [share for _ in weights], logits)


def _bias_balanced(router: routers.BiasBalanced, s: Setting) -> Choice:
    logits = gate_logits(router.gate, s)
    scores, weights = [[sigmoid(v) for v in row] for row in logits], []
    group = [int(s.entry("group", e)) for e in range(len(s.experts))]
    steps = [
        s.entry("bias_steps", i) + (s.training and not e.frozen) * s.entry("bias_pending", i)
        for i, e in enumerate(s.experts)
    ]
    for row in scores:
        biased = [
            v.detach() + router.rate * steps[e] if a else -torch.tensor(math.inf)
            for e, (v, a) in enumerate(zip(row, s.admissions, strict=True))
        ]
        inside = {}
        for g in range(router.groups):
            own = [biased[e] for e in range(len(row)) if group[e] == g]
            two = sorted([v.item() for v in own if v.isfinite()], reverse=True)[:2]
            if two:
                inside[g] = torch.tensor(sum(two), dtype=torch.float64)
        names = list(inside)
        kept = best(list(inside.values()), router.chosen_groups, s.margins)
        allowed = {names[i] for i in kept}
        chosen = best(
            [v if group[e] in allowed else v - 1e4 for e, v in enumerate(biased)],
            router.k,
            s.margins,
        )
        total = sum(row[e] for e in chosen)
        weights.append({e: router.scale * row[e] / total for e in chosen})
    return Choice(weights, scores, logits)


def _top_p(router: routers.TopP, s: Setting) -> Choice:
    logits = gate_logits(router.gate, s)
    probs = [softmax(row) for row in logits]
    weights = []
    for row in probs:
        chosen: list[int] = []
        for e in sorted(range(len(row)), key=lambda e: -row[e].item()):
            so_far = sum(row[i].item() for i in chosen)
            s.margins.append(abs(so_far - router.p))
            if so_far >= router.p or len(chosen) == router.most:
                break
            chosen.append(e)
        weights.append({e: row[e] for e in chosen})
    aux = None
    if s.training and router.entropy and probs:
        admitted = [[p for p in row if p.item() > 0] for row in probs]
        aux = router.entropy * sum(-p * p.log() for row in admitted for p in row) / len(probs)
    return Choice(weights, probs, logits, aux)


def _remoe(router: routers.ReMoE, s: Setting) -> Choice:
    logits = gate_logits(router.gate, s)
    values = [
        [a * (v - log(a)) if a and v - log(a) > 0 else 0 * v.nan_to_num() for v, a in
         zip(row, s.admissions, strict=True)]
        for row in logits
    ]  # fmt: skip
    s.margins.extend(
        abs(v.item() - log(a)) for row in logits for v, a in zip(row, s.admissions, strict=True)
        if a
    )  # fmt: skip
    weights = [{e: v for e, v in enumerate(row) if v.item() > 0} for row in values]
    aux = None
    if s.training and values:
        busy = [sum(e in w for w in weights) for e in range(len(s.experts))]
        even = router.k * len(values) / len(s.experts)
        strength = router.initial * router.rate ** int(
            s.own("lambda_steps") + s.own("lambda_pending")
        )
        aux = strength * sum(busy[e] / even * v for row in values for e, v in enumerate(row))
        aux = aux / len(values)
    return Choice(weights, values, logits, aux)


def _top_any(router: routers.TopAny, s: Setting) -> Choice:
    count = range(len(s.experts))
    keys = [s.entry("key", e) for e in count]
    cosines = [[cosine(token, key) for key in keys] for token in s.tokens]
    scores = [[sigmoid(v) for v in row] for row in cosines]
    weights = []
    for row in scores:
        margin = [row[e] * a - sigmoid(s.entry("threshold", e)) for e, a in enumerate(s.admissions)]
        s.margins.extend(abs(v.item()) for v in margin)
        admitted = [e for e in count if s.admissions[e] > 0]
        chosen = [e for e in admitted if margin[e].item() > 0]
        if not chosen:
            chosen = [admitted[best([margin[e] for e in admitted], 1, s.margins)[0]]]
        # 1/n, with the gradient of the margin
        weights.append({e: (1 + margin[e] - margin[e].detach()) / len(chosen) for e in chosen})
    aux = None
    if s.training and router.diversity:
        off = [cosine(keys[i], keys[j]) ** 2 for i in count for j in count if i != j]
        apart = torch.sqrt(sum(off)) if off else torch.tensor(1e-6, dtype=torch.float64)
        aux = router.diversity * (apart + sum(key.norm() for key in keys) / len(keys))
    logits = [[v + log(a) for v, a in zip(row, s.admissions, strict=True)] for row in cosines]
    return Choice(weights, scores, logits, aux)


def _dense_to_sparse(router: routers.DenseToSparse, s: Setting) -> Choice:
    logits = gate_logits(router.gate, s)
    drawn = _plus(logits, s.gumbel()) if s.training else logits
    done = min(max(int(s.own("anneal_steps")) + s.training, 0) / router.steps, 1.0)
    temperature = router.start ** (1 - done) * router.end**done
    threshold = 0.5 / sum(s.admissions) if router.threshold is None else router.threshold
    weights, probs = [], []
    for row in drawn:
        p = softmax([v / temperature for v in row])
        s.margins.extend(abs(v.item() - threshold) for v in p)
        first = best(p, 1, s.margins)[0]
        probs.append(p)
        weights.append({e: v for e, v in enumerate(p) if v.item() > threshold or e == first})
    return Choice(weights, probs, logits)


def _multi_gate(router: routers.MultiGate, s: Setting) -> Choice:
    count = range(len(s.experts))
    tasks = s.told("task") if s.context.get("task") is not None else None
    weights, probs, logits = [], [], []
    for t, token in enumerate(s.tokens):
        own = range(router.num_tasks) if tasks is None else [tasks[t]]
        rows = [
            [token.dot(s.entry("key", e)[j]) + log(a) for e, a in enumerate(s.admissions)]
            for j in own
        ]
        gates = [softmax(row) for row in rows]
        zero = torch.zeros((), dtype=torch.float64)
        mixed: list[list[Tensor]] = []
        chosen_by_any = set()
        for gate in gates:
            chosen = best(gate, router.k, s.margins) if router.k else list(count)
            chosen_by_any |= set(chosen)
            total = sum(gate[e] for e in chosen) if router.k else 1.0
            mixed.append([gate[e] / total if e in chosen else zero for e in count])
        weights.append(
            {
                e: torch.stack([m[e] for m in mixed]) if tasks is None else mixed[0][e]
                for e in sorted(chosen_by_any)
            }
        )
        probs.append([sum(g[e] for g in gates) / len(gates) for e in count])
        logits.append([sum(r[e] for r in rows) / len(rows) for e in count])
    return Choice(weights, probs, logits)


def _stochastic(router: routers.Stochastic, s: Setting) -> Choice:
    logits = [[v / router.temperature for v in row] for row in gate_logits(router.gate, s)]
    how = router.train_by if s.training else router.inference_by
    if how == "uniform":
        flat = [torch.tensor(log(a), dtype=torch.float64) for a in s.admissions]
        logits = [flat for _ in logits]
    rank = logits if how == "best" else _plus(logits, s.gumbel())
    probs, weights = [softmax(row) for row in logits], []
    for row, p in zip(rank, probs, strict=True):
        chosen = best(row, router.k, s.margins)
        total = sum(p[e] for e in chosen) if router.k > 1 or how == "uniform" else 1.0
        weights.append({e: p[e] / total for e in chosen})
    return Choice(weights, probs, logits)


def _soft(router: routers.SoftMoE, s: Setting) -> Choice:
    length = s.context["length"]
    slots = [(e, i) for e in range(len(s.experts)) for i in range(router.slots)]
    zero = torch.zeros((), dtype=torch.float64)
    mixtures, logits = [], []
    for first in range(0, len(s.tokens), max(length, 1)):
        sequence = range(first, first + length)
        value = {
            (t, e, i): cosine(s.tokens[t], s.entry("key", e)[i]) * s.own("scale")
            for t in sequence
            for e, i in slots
        }
        combine = {}
        for t in sequence:
            admitted = [value[t, e, i] + log(s.admissions[e]) for e, i in slots]
            row = softmax(admitted)
            powers = torch.stack(admitted).exp().view(-1, router.slots)
            logits.append(list(powers.sum(1).log()))
            combine.update({(t, *slot): v for slot, v in zip(slots, row, strict=True)})
        for e, i in slots:
            part = dict(zip(sequence, softmax([value[t, e, i] for t in sequence]), strict=True))
            every = range(len(s.tokens))
            dispatch = [part.get(t, zero) for t in every]
            mixtures.append((e, dispatch, [combine.get((t, e, i), zero) for t in every]))
    return Choice([], [], logits, mixtures=mixtures)


FORMULAS: dict[type, Callable[[Any, Setting], Choice]] = {
    routers.Dense: _dense,
    routers.TopK: _top_k,
    routers.Switch: _switch,
    routers.NoisyTopK: _noisy,
    routers.GShard: _gshard,
    routers.Gumbel: _gumbel,
    routers.ExpertChoice: _expert_choice,
    routers.Sinkhorn: _sinkhorn,
    routers.BASE: _base,
    routers.Hash: _hash,
    routers.BiasBalanced: _bias_balanced,
    routers.TopP: _top_p,
    routers.ReMoE: _remoe,
    routers.TopAny: _top_any,
    routers.DenseToSparse: _dense_to_sparse,
    routers.MultiGate: _multi_gate,
    routers.Stochastic: _stochastic,
    routers.SoftMoE: _soft,
}
