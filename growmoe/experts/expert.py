"""One expert: an identity around any module, with what the routers and the signals keep of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from growmoe.experts.ffn import FFN
from growmoe.experts.statistics import Statistics


class Expert(nn.Module):
    """An expert as a thing you can hold: id, body, router entries, statistics.

    Attributes:
        id: given once by its layer, never reused, never renumbered.
        body: the network, any module that maps [R, D] to [R, O].
        entries: what the layer's router keeps about it (parameters and buffers by name).
        statistics: what it lived through; its `record` never changes dtype with the model.
        admission: in [0, 1], how far the gate lets it in; 0 for a newborn.
        frozen: whether its parameters, entries and buffers stand still. A frozen body is in eval
            mode, so that dropout and running statistics stand still too.
    """

    def __init__(
        self,
        id: int,
        body: nn.Module,
        entries: dict[str, Tensor],
        statistics: Statistics,
        admission: float = 1.0,
    ) -> None:
        super().__init__()
        self.id = id
        self.body = body
        self.entries = nn.Module()
        for name, value in entries.items():
            if isinstance(value, nn.Parameter):
                self.entries.register_parameter(name, value)
            else:
                self.entries.register_buffer(name, value)
        self.statistics = statistics
        self.admission = admission  # a host float: routers size by it
        self.frozen = False
        self.touches = 0  # backward passes that reached it
        self._trainable: list[str] = []  # what thaw makes trainable again

    def forward(self, x_RD: Tensor) -> Tensor:
        """[R, D] -> [R, O]."""
        return self.body(x_RD)

    def learned(self) -> dict[str, nn.Parameter]:
        """Its parameters by name, ``body.…`` and ``entries.…``."""
        return dict(self.named_parameters())

    def freeze(self) -> None:
        """Stop its weights and entries; a pending gradient is dropped. Freezing twice is once."""
        if self.frozen:
            return
        parameters = self.learned()
        self._trainable = [name for name, p in parameters.items() if p.requires_grad]
        for p in parameters.values():
            p.requires_grad_(False)
            p.grad = None
        self.frozen = True
        self.body.eval()

    def thaw(self) -> None:
        """Let what was trainable before `freeze` train again."""
        if not self.frozen:
            return
        parameters = self.learned()
        for name in self._trainable:
            parameters[name].requires_grad_(True)
        self.frozen = False
        self.body.train(self.training)

    def train(self, mode: bool = True) -> Expert:
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    def get_extra_state(self) -> dict[str, Any]:
        config = cast(Any, self.body).config() if hasattr(self.body, "config") else {}
        trainable = self._trainable
        if not self.frozen:
            trainable = [name for name, p in self.learned().items() if p.requires_grad]
        return {
            "kind": kind_of(self.body),
            "config": config,
            "admission": self.admission,
            "frozen": self.frozen,
            "trainable": list(trainable),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.admission = state["admission"]
        self.thaw()
        for name, p in self.learned().items():
            p.requires_grad_(name in state["trainable"])
        if state["frozen"]:
            self.freeze()

    def extra_repr(self) -> str:
        return f"id={self.id}" + (", frozen" if self.frozen else "")


def kind_of(body: nn.Module) -> str:
    """The name under which a checkpoint knows a body's class."""
    cls = type(body)
    return "FFN" if cls is FFN else f"{cls.__module__}.{cls.__qualname__}"


def merge_group(body: nn.Module) -> str:
    """Bodies of one group can be merged: same class and settings, same shapes."""
    if isinstance(body, FFN):
        return f"FFN {body.config()}"
    shapes = {name: tuple(t.shape) for name, t in body.named_parameters()}
    return f"{kind_of(body)} {getattr(body, 'merge_key', shapes)}"


@runtime_checkable
class Kind(Protocol):
    """What a body may define to take part in surgery; `FFN` does. All else has the defaults."""

    def fresh(
        self,
        d_model: int,
        d_out: int,
        *,
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> nn.Module:
        """Another of this kind, with new weights drawn from `generator`."""
        ...

    def merged(self, others: Sequence[Any], weights: Sequence[float]) -> nn.Module:
        """One made of this and the others, each counting by its weight, this one's first."""
        ...


def fresh_body(
    template: nn.Module,
    d_model: int,
    d_out: int,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """A new body of the template's kind with random weights, drawn from `generator`.

    Raises:
        ValueError: a plain module holds parameters that no `reset_parameters` re-draws.
    """
    if isinstance(template, Kind):
        return template.fresh(d_model, d_out, generator=generator, device=device, dtype=dtype)
    for name, module in template.named_modules():
        own = list(module.parameters(recurse=False))
        if own and not hasattr(module, "reset_parameters"):
            raise ValueError(
                f"expert: {type(module).__name__} ({name or 'the module itself'}) has parameters "
                "but no reset_parameters(), so a new expert cannot be drawn from it; define one, "
                "or pass a function that builds a new module"
            )
    body = copy.deepcopy(template).to(device=device, dtype=dtype)
    body.requires_grad_(True)
    with seeded(generator):
        for module in body.modules():
            if hasattr(module, "reset_parameters"):
                cast(Any, module).reset_parameters()
    return body


class seeded:
    """Draw from torch's global generators as `generator` says, then put them back."""

    def __init__(self, generator: torch.Generator) -> None:
        self.seed = int(torch.randint(2**62, (), generator=generator))
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        self.fork = torch.random.fork_rng(devices=devices)

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)


@torch.no_grad()
def clone_body(body: nn.Module, noise: float, generator: torch.Generator) -> nn.Module:
    """A copy whose weights are perturbed by Gaussian noise of `noise` times each one's own RMS.

    A kind with a `cloned(noise, generator)` of its own decides for itself.
    """
    if hasattr(body, "cloned"):
        return cast(Any, body).cloned(noise, generator)
    clone = copy.deepcopy(body)
    for p in clone.parameters():
        p.grad = None
        if noise and p.is_floating_point():
            draw = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            p.add_(draw.to(p) * (noise * p.float().square().mean().sqrt()).to(p.dtype))
    return clone


def check_alike(bodies: Sequence[nn.Module]) -> None:
    """Raise ValueError if bodies are of different kinds or shapes, so that none is their mean.

    A kind that has a `merge_key` says by it what can be merged, whatever the shapes.
    """
    base, others = bodies[0], list(bodies[1:])
    if hasattr(base, "merge_key"):
        if len({merge_group(body) for body in bodies}) > 1:
            raise ValueError(
                f"merge: experts of different kinds: {sorted({merge_group(b) for b in bodies})}"
            )
        return
    shapes = {name: tuple(t.shape) for name, t in base.state_dict().items() if hasattr(t, "shape")}
    for other in others:
        other_shapes = {
            n: tuple(t.shape) for n, t in other.state_dict().items() if hasattr(t, "shape")
        }
        if type(other) is not type(base) or other_shapes != shapes:
            raise ValueError(f"merge: experts of different kinds or shapes: {base!r} and {other!r}")
        if isinstance(base, FFN) and base.config() != cast(FFN, other).config():
            raise ValueError(f"merge: experts of different kinds: {base!r} and {other!r}")


@torch.no_grad()
def merged_body(bodies: Sequence[nn.Module], weights: Sequence[float]) -> nn.Module:
    """One body for several: by the kind's own `merged`, else the weighted mean of its tensors.

    The first body is the one the others are aligned to.

    Raises:
        ValueError: bodies of different classes or shapes.
    """
    check_alike(bodies)
    base, others = bodies[0], list(bodies[1:])
    if hasattr(base, "merged"):
        return cast(Kind, base).merged(others, weights)
    result = copy.deepcopy(base)
    total = sum(weights)
    states = [body.state_dict() for body in bodies]
    for name, target in result.state_dict(keep_vars=True).items():
        if isinstance(target, Tensor) and target.is_floating_point():
            mean = sum(s[name].double() * (w / total) for s, w in zip(states, weights, strict=True))
            target.data.copy_(mean)
    for p in result.parameters():
        p.grad = None
    return result
