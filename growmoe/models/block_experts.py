"""What an expert made of a user's feed-forward block is: an `FFN` where it is one, else a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from growmoe.experts.expert import kind_of, merged_body, seeded
from growmoe.experts.ffn import FFN, Activation
from growmoe.models.dense_blocks import Block, linear_width


class CopiedBlock(nn.Module):
    """The body of an expert that is a copy of a user's own block: [R, D] -> [R, O]."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_RD: Tensor) -> Tensor:
        """[R, D] -> [R, O]."""
        return cast(Tensor, self.block(x_RD))

    def config(self) -> dict[str, Any]:
        return {"block": kind_of(self.block)}

    @torch.no_grad()
    def fresh(
        self,
        d_model: int,
        d_out: int,
        *,
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> CopiedBlock:
        """A block of this kind with random weights.

        A module without `reset_parameters` draws each tensor from a normal distribution with the
        mean and standard deviation that it has now.
        """
        block = copy.deepcopy(self.block).to(device=device, dtype=dtype).requires_grad_(True)
        with seeded(generator):
            for module in block.modules():
                if hasattr(module, "reset_parameters"):
                    cast(Any, module).reset_parameters()
                    continue
                for p in module.parameters(recurse=False):
                    wide = p.float()
                    p.copy_(torch.randn(p.shape).to(wide) * wide.std(correction=0) + wide.mean())
        return CopiedBlock(block)

    def merged(self, others: Sequence[CopiedBlock], weights: Sequence[float]) -> CopiedBlock:
        """The weighted mean of this block and others."""
        return CopiedBlock(merged_body([self.block, *(o.block for o in others)], weights))


def as_ffn(dense: nn.Module) -> FFN | None:
    """The same block as an `FFN`, or None where it is none.

    Which activation it has is found by comparing the two in float64, in eval and training mode.
    """
    linear = [module for module in dense.modules() if linear_width(module) is not None]
    for candidate in _candidates(dense, linear):
        if _agree(dense, candidate):
            return candidate
    return None


def _candidates(dense: nn.Module, linear: list[nn.Module]) -> Iterator[FFN]:
    parameters = [p for module in linear for p in module.parameters(recurse=False)]
    first = parameters[0] if parameters else None
    if (
        first is None
        or {id(p) for p in parameters} != {id(p) for p in dense.parameters()}
        or len({id(p) for p in parameters}) != len(parameters)
        or any(
            type(p) is not nn.Parameter or p.dtype is not first.dtype or p.device != first.device
            for p in parameters
        )
        or any(type(module) is not nn.Linear and _plain_conv(module) is None for module in linear)
        or len({getattr(module, "bias", None) is None for module in linear}) > 1
    ):
        return
    widths = [cast("tuple[int, int]", linear_width(module)) for module in linear]
    if len(linear) == 2 and widths[0][1] == widths[1][0]:
        for activation in ("gelu", "relu"):
            yield _build(linear[:1], linear[1], cast(Activation, activation))
    elif len(linear) == 2 and widths[0][1] == 2 * widths[1][0]:
        yield _build(linear[:1], linear[1], "swiglu")
    elif len(linear) == 3 and widths[0] == widths[1] and widths[0][1] == widths[2][0]:
        for gate, up in ((0, 1), (1, 0)):
            first_two = [linear[gate], linear[up]]
            if _one([p.requires_grad for p in m.parameters(recurse=False)] for m in first_two):
                yield _build(first_two, linear[2], "swiglu")


def _plain_conv(module: nn.Module) -> nn.Module | None:
    return module if type(module).__name__ == "Conv1D" else None


def _one(values: Iterable[Any]) -> bool:
    first, *rest = values
    return all(value == first for value in rest)


@torch.no_grad()
def _build(into: Sequence[nn.Module], out: nn.Module, activation: Activation) -> FFN:
    def matrix(module: nn.Module) -> Tensor:
        weight = cast(Tensor, module.weight)
        return weight.T if isinstance(module, nn.Linear) else weight

    w_in, w_out = torch.cat([matrix(m) for m in into], 1), matrix(out)
    bias = getattr(out, "bias", None) is not None
    ffn = FFN(w_out.shape[0], activation, bias)  # a template, which draws no weights
    ffn.d_model, ffn.d_out = w_in.shape[0], w_out.shape[1]

    def parameter(value: Tensor, like: Tensor) -> nn.Parameter:
        own = value.detach().clone(memory_format=torch.contiguous_format)
        return nn.Parameter(own, requires_grad=like.requires_grad)

    first = cast(Any, into[0])
    ffn.w_in = parameter(w_in, first.weight)
    ffn.w_out = parameter(w_out, cast(Tensor, out.weight))
    if bias:
        ffn.b_in = parameter(torch.cat([cast(Tensor, m.bias) for m in into]), first.bias)
        ffn.b_out = parameter(cast(Tensor, out.bias), cast(Tensor, out.bias))
    return ffn


@torch.no_grad()
def _agree(dense: nn.Module, ffn: FFN) -> bool:
    # in float64, since the erf and the tanh GELU agree to four digits; in training mode too, since
    # an FFN has no dropout
    generator = torch.Generator().manual_seed(0)
    device = ffn.w_in.device if ffn.w_in.device.type in ("cpu", "cuda") else torch.device("cpu")
    scale_R1 = torch.tensor([0.1, 1.0, 10.0, 100.0]).repeat(8)[:, None]
    x_RD = (torch.randn(32, ffn.w_in.shape[0], generator=generator) * scale_R1).double().to(device)
    with seeded(generator), torch.autocast(device.type, enabled=False):
        try:
            exact = copy.deepcopy(dense).to(device).double()
            y_RO = copy.deepcopy(ffn).to(device).double()(x_RD)
            for mode in (False, True):
                theirs_RO = exact.train(mode)(x_RD)
                off_R = (theirs_RO - y_RO).abs().amax(1)
                if not bool((off_R <= 1e-9 * y_RO.abs().amax(1)).all()):
                    return False
        except (RuntimeError, TypeError, ValueError):
            return False  # it takes no float64: it is copied as it is
    return True


def _input_widths(dense: nn.Module, model: nn.Module) -> list[int]:
    """What D may be, the likeliest first."""
    found = []
    for module in dense.modules():
        width = linear_width(module)
        if width is not None:
            found.append(width[0])
        elif isinstance(module, nn.LayerNorm):
            found.append(module.normalized_shape[-1])
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    return list(dict.fromkeys([*found[:1], *([hidden] if isinstance(hidden, int) else [])]))


@torch.no_grad()
def probe(model: nn.Module, block: Block, place: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Random inputs and what the block makes of them: [R, D] and [R, O].

    Raises:
        ValueError: the block maps no matrix of any likely width to a matrix.
    """
    problem = "the width of its input is not known"
    for width in _input_widths(block.dense, model):
        x_RD = torch.randn(32, width, generator=torch.Generator().manual_seed(0)).to(**place)
        try:
            y_RO = run_once(block.dense, x_RD)
        except Exception as error:  # of a module we know nothing about
            problem = str(error)
            continue
        if isinstance(y_RO, Tensor) and y_RO.dim() == 2 and len(y_RO) == len(x_RD):
            return x_RD, y_RO
        problem = f"it gives {type(y_RO).__name__} {tuple(getattr(y_RO, 'shape', ()))}"
    raise ValueError(f"upcycle: {block.name!r} does not map [R, D] to [R, O]: {problem}")


@torch.no_grad()
def run_once(module: nn.Module, x: Tensor) -> Tensor:
    """One forward in eval mode that leaves modes and random state as they were."""
    with _evaluating(module), torch.random.fork_rng(devices=random_devices()):
        y: Tensor = module(x)
    return y


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def random_devices() -> Sequence[int]:
    """The accelerators whose random state a forward may move."""
    return range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
