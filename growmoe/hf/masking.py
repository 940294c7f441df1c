"""Adds to the logits of a router that is not ours."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class OffsetLogits(TorchFunctionMode):
    """Within, the linear map with this weight gives its result plus an offset: float [E]."""

    def __init__(self, weight: Tensor, offset_E: Tensor) -> None:
        super().__init__()
        self.weight, self.offset_E = weight, offset_E

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and self._is_mine(args[1] if len(args) > 1 else kwargs["weight"]):
            result = result + self.offset_E.to(result)
        return result

    def _is_mine(self, weight: Tensor) -> bool:
        # a cast of it is no longer the same tensor, but it has its shape
        return weight is self.weight or weight.shape == self.weight.shape
