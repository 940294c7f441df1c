"""Language models that grow a path for each new kind of text and do not forget the old.

model = GrowingLM(d_model=64)
learner = StreamLearner(model)
for token_BS1 in stream:              # int64 [B, S + 1], of whatever domain
    for event in learner.step(token_BS1):
        print(event)                  # step 303: layer spawned 1 from 0: novel text: …
model(token_BS)                       # log-probabilities; no domain is told
"""

from growmoe.lm.growing.learner import StreamLearner
from growmoe.lm.growing.model import GrowingLM
from growmoe.lm.growing.novelty import Suspicion
from growmoe.lm.growing.path import LowRankPath, Path
from growmoe.lm.growing.router import PathRouter
from growmoe.lm.growing.stream import TextStream

__all__ = [
    "GrowingLM",
    "LowRankPath",
    "Path",
    "PathRouter",
    "StreamLearner",
    "Suspicion",
    "TextStream",
]
