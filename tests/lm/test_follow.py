"""What a run shows of itself is what its log says, and showing it changes nothing."""

from __future__ import annotations

import json

from growmoe.glimpse import Glimpse
from growmoe.lineage import Event
from growmoe.lm import TrainConfig, train
from growmoe.lm.follow import Follower, LogReader
from growmoe.rules import Proposal


class Always:
    """A birth whenever it is asked."""

    def propose(self, signals):
        return [Proposal("spawn", (signals.ids[0],), "always")]


def test_the_curves_are_those_of_the_log(texts) -> None:
    config = TrainConfig(
        domains=texts, steps=12, d_model=16, layers=2, heads=2, experts=3, batch_size=4,
        sequence_length=16, windows=4, log_every=4, evaluate_every=6, grow=True, organize_every=2,
        device="cpu",
    )  # fmt: skip
    seen: list[Glimpse] = []
    follower, said = Follower(config, seen.append), []
    run = train(
        config, rules=[Always()], listen=follower.line, happened=follower.happened, say=said.append
    )
    losses = [line["loss"] for line in run.history if line["kind"] == "train"]
    last = seen[-1]
    assert last.curves["loss"] == losses and last.fraction == 1.0
    assert last.curves["words, bits per byte"] == [
        line["bits_per_byte"]["words"] for line in run.history if line["kind"] == "evaluation"
    ]
    assert last.experts == run.results["experts"]
    born = [event for event in run.events if event.act == "spawn" and event.accepted]
    assert born and len(last.events) == min(6, len(born))
    assert not any("spawned" in line for line in said)
    plain = train(config, rules=[Always()])
    assert [line["loss"] for line in plain.history if line["kind"] == "train"] == losses


def test_a_folder_that_others_write_is_told_once_and_whole(tmp_path) -> None:
    heard, lives = [], []
    reader = LogReader(tmp_path, heard.append, lives.append)
    reader.read()  # nothing is there yet
    log = tmp_path / "metrics.jsonl"
    line = '{"kind": "train", "step": %d}\n'
    log.write_text(line % 1 + line % 2 + '{"kind": "tr')
    reader.read()
    log.write_text(line % 1)  # the run went back
    reader.read()
    log.write_text(line % 1 + line % 2 + line % 3 + '{"kind": "evaluation", "step": 3}\n')
    event = Event(2, "a", "prune", (1,), reason="idle")
    (tmp_path / "lineage.jsonl").write_text(json.dumps(event.to_json()) + "\n")
    reader.read()
    reader.read()
    assert [(one["kind"], one["step"]) for one in heard] == [
        ("train", 1), ("train", 2), ("train", 3), ("evaluation", 3),
    ]  # fmt: skip
    assert lives == [[event]]
    seen: list[Glimpse] = []
    Follower(TrainConfig(), seen.append).lived([event])
    assert list(seen[-1].events) == [str(event)]
