"""What holds for every router, as one function for each contract.

T tokens   E experts   R routed rows   D width of the input   J gates
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from growmoe import surgery
from growmoe.assignment import Assignment
from growmoe.checkpoint import load, save
from growmoe.experts.ffn import FFN
from growmoe.moe import MoE, aux_loss
from growmoe.routers.router import Router
from growmoe.testing.contract import close, holds, refused, run_all, untouched
from growmoe.testing.snapshots import copied, differences, of_everything, of_experts


@dataclass(frozen=True)
class RouterSubject:
    """A router as the contracts meet it: in small layers, on small inputs.

    Attributes:
        make: a new router; called for each layer.
        context: number of tokens -> what the layer is told of them.
        build: (num_experts, seed, options of `MoE`) -> a layer; if left out, one whose router and
            entries are moved away from their initial values, so that nothing is 0 or 1 by chance.
        d_model: D.
    """

    make: Callable[[], Router]
    context: Callable[[int], Any] = lambda tokens: None
    build: Callable[..., MoE] | None = None
    d_model: int = 8

    def layer(self, num_experts: int = 4, seed: int = 0, **options: Any) -> MoE:
        """A layer of feed-forward experts with this router."""
        if self.build is not None:
            return self.build(num_experts=num_experts, seed=seed, **options)
        options = {"z_loss": 0.0, "expert": FFN(6, bias=True), **options}
        layer = MoE(self.d_model, num_experts=num_experts, router=self.make(), seed=seed, **options)
        draw = torch.Generator().manual_seed(seed + 1)
        entries: list[Any] = [p for e in layer.experts.values() for p in e.entries.parameters()]
        own = [*layer.router.parameters(), *entries]
        with torch.no_grad():
            for p in own:
                p += 0.3 * torch.randn(p.shape, generator=draw).to(p.dtype)
        return layer

    def inputs(self, tokens: int = 10, seed: int = 7) -> Tensor:
        """[T, D], normal."""
        return torch.randn(tokens, self.d_model, generator=torch.Generator().manual_seed(seed))

    def call(self, layer: MoE, x: Tensor) -> Tensor:
        """The layer's output, with the context it needs."""
        y: Tensor = layer(x, self.context(x.numel() // self.d_model))
        return y

    def output(self, layer: MoE, seed: int = 5) -> Tensor:
        """The output in eval mode on 40 inputs; the layer trains again afterwards."""
        layer.eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            y = self.call(layer, self.inputs(40, seed=1))
        layer.train()
        return y

    def train(
        self, layer: MoE, optimizers: list[Optimizer], steps: int, seed: int = 3
    ) -> list[Tensor]:
        """So many steps on inputs and noise that depend on `seed`; the outputs."""
        layer.train()
        outputs = []
        for step in range(steps):
            torch.manual_seed(1000 * seed + step)
            y = self.call(layer, self.inputs(16, seed=1000 * seed + step))
            loss = (y - 1).square().mean() + aux_loss(layer)
            if loss.requires_grad:
                loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            outputs.append(y.detach())
        return outputs


def adamw(layer: MoE) -> list[Optimizer]:
    """An optimizer with momentum and decay, which move whatever may be moved."""
    return [AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1)]


def _state(layer: MoE) -> dict[str, Tensor]:
    return {n: copied(t) for n, t in layer.state_dict().items() if isinstance(t, Tensor)}


def _of_router(layer: MoE, optimizers: list[Optimizer]) -> Any:
    own = dict(layer.router.named_parameters())
    return [
        copied({n: t for n, t in layer.router.state_dict().items() if isinstance(t, Tensor)}),
        {n: [id(p), copied(optimizers[0].state.get(p, {}))] for n, p in own.items()},
    ]


def _same(a: list[Tensor], b: list[Tensor], what: str) -> None:
    for step, (x, y) in enumerate(zip(a, b, strict=True)):
        holds(torch.equal(x, y), f"{what} differ from step {step} on")


# Choosing.


def its_choice_is_a_well_formed_assignment(subject: RouterSubject) -> None:
    for training in (True, False):
        for tokens in (10, 1, 0):
            layer = subject.layer().train(training)
            routing = layer.route(subject.inputs(tokens), context=subject.context(tokens))
            a, e = routing.assignment, len(layer.experts)
            where = f"of {tokens} tokens, training={training}"
            holds(isinstance(a, Assignment), f"{type(a).__name__} is no Assignment")
            holds(a.num_tokens == tokens, f"num_tokens {a.num_tokens} {where}")
            holds((a.expert_R.diff() >= 0).all(), f"expert_R is not ascending {where}")
            holds(
                torch.equal(torch.bincount(a.expert_R, minlength=e), a.counts_E),
                f"counts_E {a.counts_E.tolist()} does not count expert_R {where}",
            )
            inside = (a.token_R >= 0) & (a.token_R < max(tokens, 1))
            holds(inside.all(), f"token_R names tokens that are none {where}")
            if type(a) is Assignment:
                pairs = set(zip(a.token_R.tolist(), a.expert_R.tolist(), strict=True))
                holds(len(pairs) == len(a.token_R), f"a (token, expert) pair occurs twice {where}")
            holds(a.weight_R.isfinite().all(), f"weight_R is not finite {where}")
            for name in ("probs_TE", "logits_TE"):
                got = tuple(getattr(routing, name).shape)
                holds(got[:1] == (tokens,) and e in got[1:], f"{name} is {got} {where}")


def its_output_and_gradients_are_those_of_a_plain_loop(subject: RouterSubject) -> None:
    """Token by token and expert by expert in float64, from the weights that it chose."""
    for training in (True, False):
        layer = subject.layer().train(training)
        x = subject.inputs().requires_grad_()
        torch.manual_seed(1)
        routing, out_RO = layer.rows(x, subject.context(len(x)))
        a = routing.assignment
        y = a.combine(out_RO)
        bodies = [copy.deepcopy(e.body).double() for e in layer.experts.values()]
        x64 = x.detach().double().requires_grad_()
        if type(a) is Assignment:
            rows = [torch.zeros(y.shape[1:], dtype=torch.float64) for _ in range(len(x))]
            for t, e, w in zip(a.token_R, a.expert_R, a.weight_R.double(), strict=True):
                out = bodies[int(e)](x64[int(t)][None])[0]
                rows[int(t)] = rows[int(t)] + (w[:, None] * out if w.dim() else w * out)
            expected = torch.stack(rows)
        else:  # its rows are no tokens
            mixed_RD = a.dispatch(x).double()
            out = [
                bodies[int(e)](row[None])[0] for e, row in zip(a.expert_R, mixed_RD, strict=True)
            ]
            expected = a.combine(torch.stack(out))
        close(y, expected, f"the output, training={training}")
        draw = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        (y * draw).sum().backward(retain_graph=True)
        got = [dict(e.body.named_parameters()) for e in layer.experts.values()]
        want = torch.autograd.grad(
            (expected * draw.double()).sum(),
            [p for b in bodies for p in b.parameters()],
            allow_unused=True,
        )
        flat = [(i, n, p) for i, of_one in enumerate(got) for n, p in of_one.items()]
        for (i, n, p), g in zip(flat, want, strict=True):
            if int(a.counts_E[i]) == 0:
                holds(p.grad is None, f"{n} of expert {i} got no row, but has a gradient")
            else:
                close(torch.zeros_like(p) if p.grad is None else p.grad,
                      torch.zeros_like(p) if g is None else g,
                      f"the gradient of {n} of expert {i}", 1e-3)  # fmt: skip


def the_same_input_gets_the_same_output(subject: RouterSubject) -> None:
    layer = subject.layer()
    _same([subject.output(layer)], [subject.output(layer)], "two outputs in eval mode, one seed,")


def later_tokens_change_nothing_of_earlier_ones_unless_it_says_so(subject: RouterSubject) -> None:
    """What a causal language model needs; a router that cannot has `sees_future = True`."""
    if subject.make().sees_future:
        refused(lambda: subject.layer(causal=True), "a causal layer took a router that sees ahead")
        return
    subject.layer(causal=True)
    for training in (True, False):
        for cut in (1, 6, 11):
            outputs = []
            for other in (False, True):
                layer = subject.layer().train(training)
                x = subject.inputs(12)
                if other:
                    x[cut:] = 3 * subject.inputs(12, seed=99)[cut:] + 1
                torch.manual_seed(0)  # the same noise whatever the tokens are
                outputs.append(layer(x[None], subject.context(12))[0, :cut].detach())
            leak = float((outputs[0] - outputs[1]).abs().max())
            holds(
                leak <= 1e-6,
                f"outputs before token {cut} change by {leak:.1e} with what comes after; set "
                "sees_future = True if that is meant",
            )


# Surgery.


def a_birth_changes_no_output_and_nobody_else(subject: RouterSubject) -> None:
    for parent in (1, None):
        layer = subject.layer(warmup=4)
        optimizers = adamw(layer)
        subject.train(layer, optimizers, 3)
        before, router = of_experts(layer, optimizers), _of_router(layer, optimizers)
        y = subject.output(layer)
        draws = not torch.equal(y, subject.output(layer, seed=6))
        child = surgery.spawn(layer, parent, optimizers).child
        assert child is not None
        born = "a clone's birth" if parent else "a fresh birth"
        if not draws:  # the draws of eval mode are one for each expert
            close(subject.output(layer), y, f"the output after {born}", 1e-5)
        untouched(differences(before, of_experts(layer, optimizers, before)), f"by {born}, others")
        untouched(differences(router, _of_router(layer, optimizers)), f"by {born}, the router")
        newborn = layer.experts[child]
        admissions = []
        for step in range(4):
            subject.train(layer, optimizers, 1, seed=step)
            admissions.append(newborn.admission)
        holds(admissions == [0.25, 0.5, 0.75, 1.0], f"a newborn is admitted by {admissions}")
        weights = copied(dict(newborn.named_parameters()))
        subject.train(layer, optimizers, 6)
        moved = differences(weights, copied(dict(newborn.named_parameters())))
        holds(moved, f"a newborn ({born}) that was let in learns nothing")
        holds(subject.output(layer).isfinite().all(), f"the output after {born} is not finite")


def a_merge_leaves_the_others_as_they_were(subject: RouterSubject) -> None:
    layer = subject.layer()
    optimizers = adamw(layer)
    subject.train(layer, optimizers, 3)
    before, router = of_experts(layer, optimizers, [0, 3]), _of_router(layer, optimizers)
    event = surgery.merge(layer, [1, 2], optimizers)
    holds(list(layer.experts) == [0, 3, event.child], f"after a merge: {list(layer.experts)}")
    untouched(differences(before, of_experts(layer, optimizers, [0, 3])), "by a merge, others")
    untouched(differences(router, _of_router(layer, optimizers)), "by a merge, the router")
    holds(subject.output(layer).isfinite().all(), "the output after a merge is not finite")
    subject.train(layer, optimizers, 2)


def a_prune_leaves_the_others_as_they_were_down_to_the_fewest(subject: RouterSubject) -> None:
    layer = subject.layer()
    optimizers = adamw(layer)
    subject.train(layer, optimizers, 3)
    fewest = layer.router.min_experts
    dead = list(layer.experts)[fewest:]
    before = of_experts(layer, optimizers, range(fewest))
    router = _of_router(layer, optimizers)
    surgery.prune(layer, dead, optimizers)
    untouched(differences(before, of_experts(layer, optimizers)), "by a prune, others")
    untouched(differences(router, _of_router(layer, optimizers)), "by a prune, the router")
    holds(subject.output(layer).isfinite().all(), "the output after a prune is not finite")
    subject.train(layer, optimizers, 2)
    everything = of_everything(layer, optimizers)
    said = refused(
        lambda: surgery.prune(layer, [0], optimizers), f"fewer than {fewest} experts were left"
    )
    holds(f"needs at least {fewest} experts, but layer 'moe'" in said, f"the refusal says: {said}")
    untouched(differences(everything, of_everything(layer, optimizers)), "by a refusal, something")


def fewer_experts_than_it_needs_are_refused_from_the_beginning(subject: RouterSubject) -> None:
    fewest = subject.make().min_experts
    if fewest > 1:
        said = refused(lambda: subject.layer(fewest - 1), f"{fewest - 1} experts were taken")
        holds(f"needs at least {fewest} experts, got" in said, f"the refusal says: {said}")


def an_expert_that_is_not_admitted_weighs_nothing(subject: RouterSubject) -> None:
    """Even where it must be chosen; add admission_E.log() to the logits."""
    layer = subject.layer(max(2, subject.make().min_experts))
    newborn = list(layer.experts.values())[-1]
    place = len(layer.experts) - 1
    newborn.admission = 0.0
    x, context = subject.inputs(12), subject.context(12)
    for training in (True, False):
        a = layer.train(training).route(x, context=context).assignment
        holds(
            not a.weight_R[a.expert_R == place].any(),
            f"training={training}: an expert with admission 0 has a weight",
        )
    y = layer.eval()(x, context)
    if y.requires_grad:
        y.sum().backward()
    for name, p in layer.named_parameters():
        holds(p.grad is None or p.grad.isfinite().all(), f"the gradient of {name} is not finite")
    for p in newborn.body.parameters():
        holds(p.grad is None or not p.grad.any(), "an expert with admission 0 has a gradient")


def nothing_of_a_frozen_expert_moves(subject: RouterSubject) -> None:
    layer = subject.layer()
    optimizers = adamw(layer)
    subject.train(layer, optimizers, 2)
    surgery.freeze(layer, [1, 2])

    def of_frozen() -> Any:
        return [
            copied({n: t for n, t in layer.experts[id].state_dict().items() if "statist" not in n})
            for id in (1, 2)
        ]

    before, others = of_frozen(), _state(layer)
    subject.train(layer, optimizers, 3)
    untouched(differences(before, of_frozen()), "frozen experts")
    holds(differences(others, _state(layer)), "with two experts frozen nothing learns at all")
    surgery.thaw(layer, [1, 2], optimizers)
    subject.train(layer, optimizers, 4)
    holds(differences(before, of_frozen()), "thawed experts do not move")


# Memory.


def training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(subject: RouterSubject) -> None:
    layer = subject.layer(warmup=10)
    optimizers = adamw(layer)
    subject.train(layer, optimizers, 3)
    surgery.spawn(layer, 1, optimizers)
    surgery.freeze(layer, [2])
    subject.train(layer, optimizers, 2)
    other = subject.layer(6, seed=9, warmup=10)
    others = adamw(other)
    subject.train(other, others, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        save(path, layer, optimizers)
        load(path, other, others)
    _same([subject.output(layer)], [subject.output(other)], "the outputs of saved and loaded")
    _same(
        subject.train(layer, optimizers, 3),
        subject.train(other, others, 3),
        "the outputs of the one that went on and the one that was loaded",
    )
    untouched(differences(_state(layer), _state(other)), "from saved to loaded, state")


def a_copy_goes_on_like_the_original(subject: RouterSubject) -> None:
    for how in ("deepcopy", "pickle", "torch.save", "state_dict"):
        layer = subject.layer()
        subject.train(layer, adamw(layer), 2)
        if how == "deepcopy":
            other = copy.deepcopy(layer)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(layer))
        elif how == "torch.save":
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        else:
            other = subject.layer(5, seed=3)
            other.load_state_dict(layer.state_dict())
        a, b = subject.train(layer, adamw(layer), 2), subject.train(other, adamw(other), 2)
        _same(a, b, f"the outputs of the original and a copy by {how}")
        untouched(differences(_state(layer), _state(other)), f"in a copy by {how}, state")


def recomputation_gives_the_same_gradients_step_after_step(subject: RouterSubject) -> None:
    """Activation checkpointing: what a forward decides must not depend on whether it is the first.

    Let what changes change in `Router.advance`, not in the forward.
    """
    plain = subject.layer(warmup=8)
    plain.experts[3].admission = 0.25
    recomputed = copy.deepcopy(plain)
    of_plain, of_recomputed = adamw(plain), adamw(recomputed)
    for step in range(3):
        x = subject.inputs(16, seed=step)
        torch.manual_seed(step)
        loss = subject.call(plain, x).square().mean() + aux_loss(plain)
        loss.backward()
        torch.manual_seed(step)
        y = checkpoint(subject.call, recomputed, x, use_reentrant=False)
        again = y.square().mean() + aux_loss(recomputed)
        again.backward()
        holds(torch.equal(loss, again), f"step {step}: the loss differs")
        for (n, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
            same = (p.grad is None) == (q.grad is None)
            if same and p.grad is not None and q.grad is not None:
                same = torch.equal(p.grad, q.grad)
            holds(same, f"step {step}: the gradient of {n} differs")
        for optimizers in (of_plain, of_recomputed):
            optimizers[0].step()
            optimizers[0].zero_grad()
    untouched(differences(_state(plain), _state(recomputed)), "by recomputation, state")


# Precision.


def it_runs_under_autocast(subject: RouterSubject) -> None:
    layer = subject.layer()
    x = subject.inputs(12).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = subject.call(layer, x)
        loss = y.float().square().mean() + aux_loss(layer)
    loss.backward()
    holds(y.isfinite().all(), "the output is not finite")
    for name, p in [("x", x), *layer.named_parameters()]:
        holds(p.grad is None or p.grad.isfinite().all(), f"the gradient of {name} is not finite")


def it_runs_in_half_precision(subject: RouterSubject) -> None:
    layer = subject.layer().bfloat16()
    for step in range(3):
        y = subject.call(layer, subject.inputs(5, seed=step).bfloat16())
        (y.float().square().mean() + aux_loss(layer)).backward()
        holds(y.dtype is torch.bfloat16, f"the output is {y.dtype}")
        holds(y.isfinite().all(), "the output is not finite")
    for name, p in layer.named_parameters():
        holds(p.grad is None or p.grad.isfinite().all(), f"the gradient of {name} is not finite")


ROUTER_CONTRACTS: tuple[Callable[[RouterSubject], None], ...] = (
    its_choice_is_a_well_formed_assignment,
    its_output_and_gradients_are_those_of_a_plain_loop,
    the_same_input_gets_the_same_output,
    later_tokens_change_nothing_of_earlier_ones_unless_it_says_so,
    a_birth_changes_no_output_and_nobody_else,
    a_merge_leaves_the_others_as_they_were,
    a_prune_leaves_the_others_as_they_were_down_to_the_fewest,
    fewer_experts_than_it_needs_are_refused_from_the_beginning,
    an_expert_that_is_not_admitted_weighs_nothing,
    nothing_of_a_frozen_expert_moves,
    training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped,
    a_copy_goes_on_like_the_original,
    recomputation_gives_the_same_gradients_step_after_step,
    it_runs_under_autocast,
    it_runs_in_half_precision,
)


def check_router(
    make: Callable[[], Router],
    *,
    context: Callable[[int], Any] = lambda tokens: None,
    d_model: int = 8,
) -> None:
    """Hold a router to what the library promises of its own (about two seconds).

    Among that: its rows are well formed, the layer equals a plain loop in float64 with every
    gradient, births change no output, survivors stay to the last bit through every surgery,
    training goes on from a checkpoint bit for bit, and it works in a causal model or says that it
    does not (`sees_future`).

    Args:
        make: gives a new router: its class, or a function.
        context: number of tokens -> what a layer must be told of them, if the router needs it.
        d_model: D, the width of the layers it is tried in.

    Raises:
        AssertionError: a contract does not hold; all that don't are named.

    >>> import growmoe.testing
    >>> growmoe.testing.check_router(growmoe.TopK)
    """
    run_all(RouterSubject(make, context, None, d_model), ROUTER_CONTRACTS, repr(make()))
