"""Attribution screening: first-order estimates of what patches do at their step, from one forward and one backward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from interventions.kinds.patch import Patch
from interventions.record import Record
from interventions.run import Gradient
from interventions.sites import Site

if TYPE_CHECKING:
    from interventions.engine import Engine

FORMULA = "estimate = alpha * sum over tokens and channels of (h_donor - h_recipient) * d objective / d h_recipient"
PASSES = 3
"""What screening a step costs in forwards of the recorded runs: one forward, and a backward of about two."""

Objective = Callable[[torch.Tensor], torch.Tensor]
"""From clean estimates (runs, C, F, H, W) to one value a run."""


class NotScreenableError(ValueError):
    """A patch whose effect has no estimate from the recorded runs of one step; the message says why."""


def require_screenable(patch: Patch) -> None:
    """Check that the effect of a patch can be estimated.

    Raises
    ------
    NotScreenableError : it spans several steps, or its donor is a run of another sample or seed.
    """
    if patch.steps != 1:
        raise NotScreenableError(f"a patch of {patch.steps} steps cannot be screened: a gradient is that of one step")
    if any(len(source) != 1 or not source[0].own for source in patch.sources()):
        raise NotScreenableError(
            "a patch from another sample or seed cannot be screened: its donor is not recorded here"
        )


def screen(engine: Engine, record: Record, patches: Sequence[Patch], objective: Objective) -> list[float]:
    """Estimate by how much each patch changes an objective of its own step's clean estimate.

    The derivative of the objective along the patch, at alpha 0, times alpha (attribution patching: Nanda 2023; Syed et
    al. 2023, arXiv 2310.10348), on the whole graph of the step: every path from the site to the estimate counts, in
    both guidance branches. Costs one forward of the recorded runs and one backward for each distinct step.

    Parameters
    ----------
    objective : of the clean estimates of all recorded runs; a run's value must depend on its own estimate alone.

    Returns
    -------
    One estimate a patch, in the objective's units.

    Raises
    ------
    NotScreenableError : see ``require_screenable``.
    """
    by_step: dict[int, list[int]] = defaultdict(list)
    for i, patch in enumerate(patches):
        require_screenable(patch)
        by_step[patch.step].append(i)
    estimates = [0.0] * len(patches)
    for step, members in sorted(by_step.items()):
        sites = {site for i in members for site in patches[i].points(record.geometry)}
        found = engine.gradients(record, step, sorted(sites), lambda x0_hat: objective(x0_hat).sum())
        terms = _Terms(record, found)
        for i in members:
            estimates[i] = terms.estimate(patches[i])
    return estimates


@dataclass(slots=True)
class _Terms:
    """The summands of estimates, token by token, each computed once however many patches share it."""

    record: Record
    found: Gradient
    known: dict[tuple[Site, int, int], torch.Tensor] = field(default_factory=dict)

    def estimate(self, patch: Patch) -> float:
        geometry = self.record.geometry
        recipient, donor = self.record.row(patch.recipient), self.record.row(patch.donor)
        mask = None if patch.whole else patch.mask(geometry).flatten()
        total = 0.0
        for site in patch.points(geometry):
            tokens = self._tokens(site, recipient, donor)
            total += float((tokens if mask is None else tokens[mask]).sum())
        return patch.alpha * total

    def _tokens(self, site: Site, recipient: int, donor: int) -> torch.Tensor:
        key = site, recipient, donor
        if key not in self.known:
            values, slopes = self.found.values[site].float(), self.found.slopes[site].float()
            product = (values[donor] - values[recipient]) * slopes[recipient]
            # Thousands of terms of either sign nearly cancel.
            self.known[key] = product.sum(dim=-1, dtype=torch.float64).cpu()
        return self.known[key]
