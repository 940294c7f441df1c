"""Runs a mixture whose experts do not fit on the device: the hot ones are there, the rest is not.

A router's choice is known before any expert runs, so only the experts it chose need to be on the
device, and which of them are missing is known at once. Each layer keeps as many as its cache
allows. In a forward those that are there run first, while a thread of its own (on CUDA, a stream of
its own too) brings the missing in the order in which they will run. This is how Mixtral was run on
small GPUs (Eliseev & Mazur 2023, arXiv 2312.17238, section 3), with their second idea as an option:
the next layer's router is asked early, on this layer's input, and what it seems to want is loaded
ahead. A wrong guess costs a load and never changes a result.

What an expert computes does not depend on where it came from: outputs are bit for bit those of
`growmoe.experts.bank.run_each` on the model at rest, which differ from those of the pooled path by
rounding alone.
"""

from growmoe.offload.cache import Stats
from growmoe.offload.offloaded import Offloaded, offload

__all__ = ["Offloaded", "Stats", "offload"]
