"""MoE, the layer: a router chooses experts for each input, a bank runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growmoe.capacity import Capacity
from growmoe.experts.bank import ExpertBank, run_each
from growmoe.experts.expert import Expert
from growmoe.experts.ffn import FFN
from growmoe.forwards import finite, recomputing, transforming, uncompiled
from growmoe.lineage import Event, Lineage
from growmoe.live import refuse_unseen_optimizers
from growmoe.losses import balance_loss, z_loss
from growmoe.routers.router import Router, Routing
from growmoe.routers.topk import TopK
from growmoe.signals import Recorder
from growmoe.structure import (
    Saved,
    Template,
    build_body,
    differs,
    experts_for,
    fresh_expert,
    saved_structure,
)


class MoE(nn.Module):
    """A mixture of experts that can grow, merge, freeze and lose experts while it trains.

    A drop-in for a feed-forward block: [..., D] -> [..., O]. Structure is changed by
    `growmoe.surgery`, or by a `growmoe.Organizer` that decides from the layer's signals.

    Args:
        d_model: D, the width of the input.
        expert: what an expert is: an `FFN` (with or without its widths), any module that maps
            [R, D] to [R, O] and whose parameters `reset_parameters` re-draws, a function that
            builds a new one, or a sequence of those, one for each initial expert. Newborns
            without a parent are of the first kind.
        num_experts: how many to begin with.
        router: how inputs choose; `TopK(2)` if left out.
        shared: an expert (as above) that sees every input and is added to the mixture.
        shared_gate: None adds it as it is; "sigmoid" times σ(w·x) (Qwen2-MoE, arXiv 2407.10671);
            "softmax" weighs shared and mixture against each other by softmax(W x) (residual MoE,
            arXiv 2201.05596).
        d_out: O, the width of the output; D if left out.
        capacity: how many rows an expert takes; all if left out.
        causal: whether the model is: then routers and capacities that see later tokens are refused.
        balance_loss: coefficient of the Switch balance loss in `growmoe.aux_loss`; 0.01 if left
            out, 0 for a router that balances by itself. Set all coefficients to 0 if you do not
            call that, or each forward's graph lives until the next.
        z_loss: coefficient of the router z-loss there.
        losses: further losses of the gate there, each with its coefficient (`growmoe.losses`).
        warmup: training forwards over which a newborn is let into the gate: its logit is offset by
            log(min(1, age/warmup)), so that its birth changes no output.
        evidence: "inputs" keeps 32 inputs of each expert for consent (see `Organizer`);
            "moments" keeps their mean and variance only.
        seed: of the layer's own generator, which draws initial weights, newborns and evidence;
            drawn from torch's global generator if left out.

    Attributes:
        experts: a mapping id -> `Expert`, ascending.
        lineage: every act on this layer since it was built.
        name: how events call the layer; the organizer sets it to its name in the model.
        steps: training forwards so far.

    Raises:
        ValueError: fewer experts than the router needs, widths that do not fit, or a causal model
            whose router or capacity sees the future.
    """

    def __init__(
        self,
        d_model: int,
        expert: Template | Sequence[Template] | None = None,
        num_experts: int = 8,
        router: Router | None = None,
        *,
        shared: Template | None = None,
        shared_gate: Literal["sigmoid", "softmax"] | None = None,
        d_out: int | None = None,
        capacity: Capacity | None = None,
        causal: bool = False,
        balance_loss: float | None = None,
        z_loss: float = 0.0,
        losses: Mapping[Callable[[Routing], Tensor], float] | None = None,
        warmup: int = 100,
        evidence: str = "inputs",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(d_model, int) or d_model < 1:
            raise ValueError(f"d_model must be a positive integer, got {d_model!r}")
        if not isinstance(num_experts, int) or num_experts < 1:
            raise ValueError(f"num_experts must be a positive integer, got {num_experts!r}")
        if warmup < 1:
            raise ValueError(f"warmup must be at least 1, got {warmup!r}")
        if evidence not in ("inputs", "moments"):
            raise ValueError(f"evidence must be 'inputs' or 'moments', got {evidence!r}")
        if d_out is not None and (not isinstance(d_out, int) or d_out < 1):
            raise ValueError(f"d_out must be a positive integer, got {d_out!r}")
        self.d_model, self.d_out = d_model, d_out or d_model
        self.router = TopK() if router is None else router
        if not isinstance(self.router, Router):
            raise ValueError(f"router must be a Router such as TopK(2), got {router!r}")
        if num_experts < self.router.min_experts:
            raise ValueError(
                f"{self.router} needs at least {self.router.min_experts} experts, "
                f"got num_experts={num_experts}"
            )
        _check_choice(self.router, capacity, causal)
        if shared_gate not in (None, "sigmoid", "softmax"):
            raise ValueError(f"shared_gate must be 'sigmoid' or 'softmax', got {shared_gate!r}")
        if shared_gate is not None and shared is None:
            raise ValueError("shared_gate weighs a shared expert: pass shared= too")
        if expert is None:
            expert = FFN(4 * d_model)
        templates = expert if isinstance(expert, Sequence) else [expert]
        if isinstance(expert, Sequence) and len(templates) != num_experts:
            raise ValueError(f"expert: {len(templates)} kinds for num_experts={num_experts}")
        if balance_loss is None:
            balance_loss = 0.0 if self.router.balances else 0.01
        self.balance_loss, self.z_loss, self.losses = balance_loss, z_loss, dict(losses or {})
        self.capacity = capacity
        self.evidence_rows = 32 if evidence == "inputs" else 0
        self.generator = torch.Generator()
        self.generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        self.name = "moe"
        self.steps = 0
        self.next_id = 0
        self.lineage = Lineage()
        self._template = [templates[0]]  # in a list, so that it is no submodule
        self._entries = self.router.entries(d_model)
        self._aux: Tensor | None = None

        self.recorder = Recorder(d_model, warmup, device)
        self.experts = ExpertBank(self.d_out)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router.build(d_model, self.generator, **place)
        newborns = [
            self.newborn(templates[i % len(templates)], admission=1.0, **place)
            for i in range(num_experts)
        ]
        self.experts.replace(newborns)
        self.shared = None if shared is None else self._build(shared, **place)
        self.shared_gate = None
        if shared_gate is not None:
            out = 1 if shared_gate == "sigmoid" else 2
            self.shared_gate = self._build(nn.Linear(d_model, out), **place)
        self.lineage.add(Event(0, self.name, "init", ids=tuple(self.experts)))

    # What happens to an input.

    @uncompiled
    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """[..., D] -> [..., O]; [..., J, O] where the router has J gates (`MultiGate`).

        Args:
            x: the input, in the dtype of the weights (or under autocast).
            context: what the caller knows of the inputs, by name ("token", "task", "label" …), for
                routers that use it: an integer for each input, for each sequence, or for all. A
                value alone is what the router wants.

        Raises:
            ValueError: the last dimension is not D, or the input is not finite. On an accelerator
                the latter is not checked, since that would make it wait.
        """
        self._check(x)
        x_TD = x.reshape(-1, self.d_model)
        shared_TO = self._run_shared(x_TD)  # first: should it fail, nothing was recorded
        routing, out_RO = self._rows(x, context)
        y_TO = self._add_shared(x_TD, routing.assignment.combine(out_RO), shared_TO)
        return y_TO.reshape(*x.shape[:-1], *y_TO.shape[1:])

    @uncompiled
    def rows(self, x: Tensor, context: Any = None) -> tuple[Routing, Tensor]:
        """The forward up to the experts' own outputs, [R, O], before they are mixed.

        For hosts that do something else with them. Arguments, errors and all that is recorded are
        those of the layer's forward, without the shared expert.
        """
        self._check(x)
        return self._rows(x, context)

    def _rows(self, x: Tensor, context: Any) -> tuple[Routing, Tensor]:
        x_TD = x.reshape(-1, self.d_model)
        experts = list(self.experts.values())
        recording = self.training and not (
            recomputing() or transforming() or torch.is_inference_mode_enabled()
        )
        if recording:
            self._begin_step(experts)
        chosen = self._choose(x_TD, experts, self._context(context, x))
        routing = self._within_capacity(chosen)
        out_RO = self.experts(x_TD, routing.assignment)
        if self.training and not torch.is_inference_mode_enabled():
            # of what was chosen: capacity hides how uneven that was
            aux = self._auxiliary(chosen)  # in a recomputation too, which must save the same
            kept = self._aux is not None and aux is not None and not aux.requires_grad
            if not recomputing() and not kept:
                self._aux = aux  # a pass without gradients does not displace one with
            if recording:
                self.steps += 1
                self.router.observe(experts, self._of_all(chosen))
                self.recorder.observe_capacity(chosen.assignment, routing.assignment)
                self.recorder.observe(
                    experts,
                    x_TD.detach(),
                    routing.assignment.observed(),
                    out_RO.detach(),
                    self.generator,
                    routing.candidates_TE,
                    routing.novel_T,
                )
        return routing, out_RO

    def route(
        self, x_TD: Tensor, experts: Sequence[Expert] | None = None, context: Any = None
    ) -> Routing:
        """Where inputs go: [T, D] -> `Routing` over `experts`, by default all the living."""
        experts = list(self.experts.values()) if experts is None else experts
        return self._within_capacity(self._choose(x_TD, experts, self._context(context, x_TD)))

    def _choose(
        self, x_TD: Tensor, experts: Sequence[Expert], context: Mapping[str, Any]
    ) -> Routing:
        admission_E = torch.ones(len(experts), device=x_TD.device)
        if any(e.admission < 1 for e in experts):
            admission_E = torch.tensor([e.admission for e in experts], device=x_TD.device)
        return self.router(x_TD, experts, admission_E, context)

    def _of_all(self, routing: Routing) -> Routing:
        """The same with the counts of all workers' tokens; here there is one worker."""
        return routing

    def _within_capacity(self, chosen: Routing) -> Routing:
        if self.capacity is None:
            return chosen
        return self.capacity(chosen, self.training, self.recorder.imbalance[1])

    def _context(self, context: Any, x: Tensor) -> Mapping[str, Any]:
        if context is None:
            context = {}
        elif not isinstance(context, Mapping):
            if self.router.wants is None:
                raise ValueError(
                    f"{self.name}: {self.router} uses no context of its own; pass a mapping such "
                    f"as {{'task': 0}}, got {type(context).__name__}"
                )
            context = {self.router.wants: context}
        return {"length": x.shape[-2] if x.dim() > 1 else 1, **context}

    @torch.no_grad()
    def output_of(self, x_TD: Tensor, experts: Sequence[Expert]) -> Tensor:
        """What the routed mixture would give were these its experts: [T, D] -> [T, O].

        Nothing is recorded and nothing moves: for questions such as "what if 3 were gone?". The
        caller puts the layer in eval mode.
        """
        routing = self.route(x_TD, experts)
        return routing.assignment.combine(
            run_each(experts, routing.assignment.dispatch(x_TD), routing.assignment, self.d_out)
        )

    def with_shared(self, x_TD: Tensor, mixture_TO: Tensor) -> Tensor:
        """The layer's output from that of its routed experts, [T, O] or [T, J, O]."""
        return self._add_shared(x_TD, mixture_TO, self._run_shared(x_TD))

    def _run_shared(self, x_TD: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        y_TO: Tensor = self.shared(x_TD)
        if y_TO.shape != (len(x_TD), self.d_out):
            raise ValueError(
                f"{self.name}: the shared expert mapped {tuple(x_TD.shape)} to "
                f"{tuple(y_TO.shape)}, expected {(len(x_TD), self.d_out)}"
            )
        return y_TO

    def _add_shared(self, x_TD: Tensor, mixture_TO: Tensor, y_TO: Tensor | None) -> Tensor:
        if y_TO is None:
            return mixture_TO
        if self.shared_gate is not None:
            gate_TG = self.shared_gate(x_TD)
            if gate_TG.shape[1] == 1:
                y_TO = gate_TG.sigmoid() * y_TO
            else:
                own_T1, mixed_T1 = gate_TG.softmax(-1).split(1, dim=1)
                y_TO = own_T1 * y_TO
                mixture_TO = mixed_T1.view(-1, *[1] * (mixture_TO.dim() - 1)) * mixture_TO
        return mixture_TO + (y_TO if mixture_TO.dim() == 2 else y_TO[:, None])

    def _auxiliary(self, routing: Routing) -> Tensor | None:
        losses = [] if routing.aux is None else [routing.aux]
        for loss, coefficient in (
            (balance_loss, self.balance_loss),
            (z_loss, self.z_loss),
            *self.losses.items(),
        ):
            if coefficient:
                losses.append(coefficient * loss(self._seen_by(loss, routing)))
        return torch.stack(losses).sum() if losses else None

    def _seen_by(self, loss: Callable[[Routing], Tensor], routing: Routing) -> Routing:
        return routing

    @contextmanager
    def gathered(
        self, ids: Sequence[int] | None = (), optimizers: Sequence[Optimizer] = ()
    ) -> Iterator[None]:
        """Inside, what is asked of any expert is answered; the weights of `ids` are here.

        Args:
            ids: with what the optimizers keep of them; None stands for all the living.
        """
        yield

    def aux_loss(self) -> Tensor | None:
        """The auxiliary loss of the last training forward, once; None if there was none since.

        Of a layer called several times in one forward, it is that of the last call.
        """
        aux, self._aux = self._aux, None
        return aux

    def _check(self, x: Tensor) -> None:
        if x.dim() < 1 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"{self.name}: input has shape {tuple(x.shape)}, "
                f"its last dimension must be d_model={self.d_model}"
            )
        if not x.is_floating_point():
            raise ValueError(f"{self.name}: input is {x.dtype}, it must be floating point")
        if x.device.type == "cpu" and not finite(x):
            bad = int((~x.isfinite()).sum())
            raise ValueError(f"{self.name}: {bad} of {x.numel()} input values are NaN or infinite")

    def _begin_step(self, experts: Sequence[Expert]) -> None:
        """Let newborns in a little more; before routing, so that a recomputation sees the same."""
        self.recorder.begin_forward()
        self.router.advance(experts)
        for expert in experts:
            expert.admission = min(1.0, expert.admission + 1 / self.recorder.warmup)
            if expert.frozen:  # whoever called requires_grad_ on the whole model did not mean it
                for p in expert.parameters():
                    p.requires_grad_(False)

    # What surgery needs to know.

    def newborn(
        self,
        template: Template | None = None,
        admission: float = 0.0,
        toward: Tensor | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Expert:
        """A fresh expert with the next id; it does not yet belong to the layer.

        Args:
            template: its kind; the layer's first if left out.
            admission: 0 lets it in over `warmup` forwards, 1 at once.
            toward: [D], the mean of the inputs it is born for; its router entries turn there.
        """
        body = self._build(self._template[0] if template is None else template, device, dtype)
        expert = fresh_expert(
            self.next_id,
            body,
            self._entries,
            list(self.experts.values()) if hasattr(self, "experts") else [],
            self.d_model,
            self.evidence_rows,
            self.generator,
            toward=toward,
            device=device,
            dtype=dtype,
        )
        expert.admission = admission
        expert.train(self.training)
        self.next_id += 1
        return expert

    def _build(self, template: Template, device: Any = None, dtype: Any = None) -> nn.Module:
        living = self.experts if hasattr(self, "experts") else nn.Module()
        if dtype is None:
            example = next(living.parameters(), None)
            dtype = torch.get_default_dtype() if example is None else example.dtype
        if device is None:  # living experts have records, if not parameters
            record = next(living.buffers(), None)
            device = torch.get_default_device() if record is None else record.device
        return build_body(
            template, self.d_model, self.d_out, self.generator, torch.device(device), dtype
        )

    @property
    def router_entries(self) -> dict[str, Any]:
        """What the router keeps on each expert, by name (`growmoe.routers.Entry`)."""
        return self._entries

    # State.

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_aux"] = None
        state["generator"] = self.generator.get_state()
        del state["_entries"]  # functions, which cannot be pickled; the router gives them again
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator()
        generator.set_state(state["generator"])
        super().__setstate__({**state, "generator": generator})
        self._entries = self.router.entries(self.d_model)

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "next_id": self.next_id,
            "steps": self.steps,
            "generator": self.generator.get_state(),
            "lineage": [event.to_json() for event in self.lineage],
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.next_id, self.steps = state["next_id"], state["steps"]
        self.generator.set_state(state["generator"].cpu())
        self.lineage = Lineage(Event.from_json(data) for data in state["lineage"])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # before torch loads the children: there must be an expert for each saved id
        whole = prefix + "_extra_state" in state_dict  # not some experts of a layer alone
        saved = saved_structure(state_dict, prefix + "experts.") if whole else {}
        if saved and differs(self.experts, saved):
            refuse_unseen_optimizers(self, [])
            self.restructure(saved)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def restructure(
        self, saved: Saved, factories: dict[str, Callable[[], nn.Module]] | None = None
    ) -> None:
        """Hold an expert for each saved id, of the saved kind; its weights are still to be loaded.

        Args:
            saved: id -> `Expert.get_extra_state`.
            factories: kind -> a function that builds a body, for kinds other than `FFN` and those
                of the layer's own template and experts.

        Raises:
            ValueError: a kind that nothing here can build, or too few experts for the router;
                nothing has changed then.
        """
        if len(saved) < self.router.min_experts:
            raise ValueError(
                f"{self.name}: {self.router} needs at least {self.router.min_experts} experts, "
                f"the saved state has {len(saved)}"
            )
        before = (self.next_id, self.generator.get_state())
        try:
            experts = experts_for(saved, self.experts, self._template, factories, self.newborn)
        except BaseException:
            self.next_id = before[0]
            self.generator.set_state(before[1])
            raise
        self.experts.replace(experts)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_out={self.d_out}, experts={list(self.experts)}"


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The MoE layers of a model by name; one that is the model itself is called "moe"."""
    return {
        name or "moe": module for name, module in model.named_modules() if isinstance(module, MoE)
    }


def aux_loss(model: nn.Module) -> Tensor:
    """The sum of the auxiliary losses of all MoE layers' last training forwards.

    Add it to the task's loss before backward. Each forward's loss is given once.

    Raises:
        RuntimeError: a layer ran without gradients although it trains, as under activation
            checkpointing with use_reentrant=True: its auxiliary loss would silently be lost.
    """
    total: Tensor | None = None
    for name, layer in moe_layers(model).items():
        aux = layer.aux_loss()
        if aux is None:
            continue
        learns = any(
            p.requires_grad for e in layer.experts.values() for p in e.entries.parameters()
        )
        if torch.is_grad_enabled() and learns and not aux.requires_grad:
            raise RuntimeError(
                f"layer {name!r} ran without gradients; with activation checkpointing, pass "
                "use_reentrant=False"
            )
        total = aux if total is None else total + aux.to(total.device)
    if total is None:
        example = next(model.parameters(), torch.empty(0))
        return torch.zeros((), device=example.device)
    return total


def _check_choice(router: Router, capacity: Capacity | None, causal: bool) -> None:
    if capacity is not None:
        if not isinstance(capacity, Capacity):
            raise ValueError(f"capacity must be a growmoe.Capacity, got {capacity!r}")
        if not router.capped:
            raise ValueError(f"capacity: {router} sets the load of its experts by itself")
    for name, part in (("router", router), ("capacity", capacity)):
        if causal and part is not None and part.sees_future:
            raise ValueError(
                f"{name}: what {part} decides for a token depends on later tokens, which a causal "
                "model does not have when it generates; choose another, or insist with causal=False"
            )
