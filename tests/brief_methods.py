"""The methods as they run online, and their bound in few steps."""

from __future__ import annotations

from collections.abc import Mapping

from growmoe.continual.methods import METHODS, Method, online


def briefly(batch_size: int, chosen: Mapping[str, Method] = METHODS) -> dict[str, Method]:
    """As `online`, which leaves joint at its 300 steps an experience."""
    methods = online(batch_size, chosen)
    joint = methods["joint"]
    assert joint.again is not None
    return {**methods, "joint": joint.again(min_steps=20)}
