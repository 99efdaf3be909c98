"""Which sample "another sample" is: another problem, at the same pair and seed."""

from __future__ import annotations

from collections.abc import Sequence

from interventions.base import RunRef
from pipeline.samples import Sample


class Problems:
    """The samples of a sweep by problem, so that "another sample" is another problem and never the same run again.

    Samples of one problem differ in pair or seed; the neighbour of a sample is the one at its own place there.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._problems: dict[str, list[int]] = {}
        for i, sample in enumerate(samples):
            self._problems.setdefault(sample.prompt, []).append(i)
        self._order = list(self._problems.values())
        self._place = {i: (p, k) for p, members in enumerate(self._order) for k, i in enumerate(members)}

    def __len__(self) -> int:
        return len(self._order)

    def referred(self, ref: RunRef, sample: int) -> int:
        """Return the sample that a reference means, seen from one: offsets count problems, and go round.

        Raises
        ------
        ValueError : a fixed reference beyond the last problem.
        """
        problem, place = self._place[sample]
        if ref.fixed and ref.sample >= len(self):
            raise ValueError(f"reference {ref} is beyond the {len(self)} problems of the task")
        members = self._order[ref.sample if ref.fixed else (problem + ref.sample) % len(self)]
        return members[place % len(members)]
