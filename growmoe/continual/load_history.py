"""Writes down, now and then, each expert's share of what was learned."""

from __future__ import annotations

from typing import Any

from growmoe.continual.classifier import GrowingClassifier


class LoadHistory:
    """Each expert's share of the inputs since the entry before, by "layer:id".

    An entry for every tenth batch below 1,000, then for every hundredth.

    Attributes:
        entries: [{"step": int, "load": {"layer:id": share}}].
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._recorded, self._rows = -1, dict[str, float]()

    def note(self, classifier: GrowingClassifier) -> None:
        """Look at the classifier after a batch; make an entry if it is time to."""
        if classifier.organizer is None:
            return
        step = classifier.organizer.steps
        if step == self._recorded or step % (10 if step < 1000 else 100):
            return
        rows = classifier.rows()
        new = {id: max(0.0, n - self._rows.get(id, 0.0)) for id, n in rows.items()}
        total = max(sum(new.values()), 1.0)
        load = {id: round(n / total, 4) for id, n in new.items()}
        self.entries.append({"step": step, "load": load})
        self._recorded, self._rows = step, rows
