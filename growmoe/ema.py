"""An exponential moving average of weights that knows experts by their id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """A moving average of a model's parameters, kept by name.

    `torch.optim.swa_utils` pairs parameters by position and so mixes up experts after a birth or a
    death. Names hold the experts' ids: here a newborn's average begins at its own weights, and the
    dead are forgotten.

    Args:
        model: whose parameters are averaged.
        decay: a ← decay · a + (1 − decay) · p at each `update`.

    Raises:
        ValueError: decay is not in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must be in [0, 1), got {decay!r}")
        self.model, self.decay = model, decay
        self.average: dict[str, Tensor] = {}
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current weights; call it after the optimizer's step."""
        parameters = dict(self.model.named_parameters())
        self.average = {name: a for name, a in self.average.items() if name in parameters}
        for name, p in parameters.items():
            if name not in self.average:
                # in bfloat16 steps of 1 - decay would be rounded away
                dtype = torch.promote_types(p.dtype, torch.float32)
                self.average[name] = p.detach().to(dtype, copy=True)
            else:
                self.average[name].lerp_(p.detach().to(self.average[name]), 1 - self.decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[nn.Module]:
        """Inside, the model has the averaged weights; after, its own again.

        A parameter that was born since the last update keeps its own.
        """
        own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        try:
            for name, p in self.model.named_parameters():
                if name in self.average:
                    p.copy_(self.average[name])
            yield self.model
        finally:
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    if name in own:
                        p.copy_(own[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of the model."""
        return {name: a.clone() for name, a in self.average.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError if a name or shape is not the model's."""
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        for name, a in state.items():
            if shapes.get(name) != a.shape:
                raise ValueError(f"EMA: {name} {tuple(a.shape)} does not fit the model")
        self.average = {name: a.clone() for name, a in state.items()}
