"""The library's own snapshots, under the name that the tests know them by."""

from growmoe.testing.snapshots import (  # noqa: F401
    bits,
    copied,
    differences,
    of_everything,
    of_expert,
    of_experts,
)
