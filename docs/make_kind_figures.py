"""Draw the figure of every intervention kind and write its caption: ``python -m docs.make_kind_figures [KIND ...]``.

For each kind: ``stepscope run`` and ``stepscope effects`` on ``configs/kinds/KIND.yaml`` into ``runs/kinds``, one PNG
drawn by the report's own functions, and what the caption states in ``docs/interventions/figures.json``. The text
between the figure marks of a page is written from that file, so no number in it is typed by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import re
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import yaml

from interventions import kinds as _kinds  # noqa: F401  (registers every kind)
from interventions.base import KINDS
from pipeline.cli import main as stepscope
from pipeline.effects.experiment import recipients
from pipeline.report import tables
from pipeline.report.content import Sweep
from pipeline.report.drawing import Picture
from pipeline.report.figures import experiment_pictures
from pipeline.report.views import main_estimand, reference_of, value_label, view_of

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "interventions"
CONFIGS = ROOT / "configs" / "kinds"
FACTS = PAGES / "figures.json"
BEGIN, END = "<!-- figure: begin, written by `make kind-figures` -->", "<!-- figure: end -->"

Cell = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """What must come out equal, sample by sample, in every metric of the sweep.

    Attributes
    ----------
    what : the claim. ours : cells of the figure's experiment that take part; None compares ``other`` with the recorded
        run that it changes. other : name of the second experiment. theirs : its cells.
    """

    what: str
    ours: Cell | None = None
    other: str = "control"
    theirs: Cell = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plate:
    """The figure of one kind: metric, cells whose numbers the caption reads out, as (metric, cell), and the control."""

    metric: str
    reading: tuple[tuple[str, Cell], ...]
    control: Control


PLATES = {
    "ablate": Plate(
        metric="goal_evidence",
        reading=(
            ("goal_evidence", {"value": "zero", "layer": 3}),
            ("goal_evidence", {"value": "resample", "layer": 4}),
            ("goal_evidence", {"value": "zero", "layer": 4}),
            ("trajectory", {"value": "zero", "layer": 4}),
        ),
        control=Control(what="`zero` on `update` and `block_skip` with `mode: skip`", ours={"value": "zero"}),
    ),
    "block_skip": Plate(
        metric="trajectory",
        reading=(
            ("trajectory", {"mode": "skip", "step": 6, "layer": 3}),
            ("trajectory", {"mode": "skip", "step": 6, "layer": 5}),
            ("trajectory", {"mode": "repeat", "step": 6, "layer": 5}),
        ),
        control=Control(what="`skip` and `ablate` with `value: zero, component: update`", ours={"mode": "skip"}),
    ),
    "compose": Plate(
        metric="goal_evidence",
        reading=(
            ("goal_evidence", {"step": 4, "layer": 0}),
            ("goal_evidence", {"step": 4, "layer": 1}),
            ("goal_evidence", {"step": 1, "layer": 2}),
        ),
        control=Control(what="only `2_restore`, with nothing broken, and the recorded clean run"),
    ),
    "frame_shuffle": Plate(
        metric="trajectory",
        reading=(
            ("trajectory", {"mode": "reverse", "step": 16, "steps": 1}),
            ("trajectory", {"mode": "reverse", "step": 16, "steps": 2}),
            ("trajectory", {"mode": "permute", "step": 16, "steps": 2}),
        ),
        control=Control(what="`mode: freeze` at the last frame, which moves none, and the recorded clean run"),
    ),
    "hidden_noise": Plate(
        metric="latent_distance",
        reading=(
            ("latent_distance", {"strength": 2.0, "step": 6, "layer": 0}),
            ("latent_distance", {"strength": 2.0, "step": 6, "layer": 5}),
            ("latent_distance", {"strength": 0.5, "step": 6, "layer": 0}),
            ("latent_distance", {"strength": 2.0, "step": 2, "layer": 0}),
        ),
        control=Control(what="`strength: 0` and the recorded clean run"),
    ),
    "knockout": Plate(
        metric="goal_evidence",
        reading=(
            ("goal_evidence", {"pattern": "text", "step": 2, "layer": 0}),
            ("trajectory", {"pattern": "text", "step": 2, "layer": 0}),
            ("goal_evidence", {"pattern": "anti_causal", "step": 4, "layer": 1}),
            ("trajectory", {"pattern": "anti_causal", "step": 4, "layer": 1}),
            ("goal_evidence", {"pattern": "causal", "step": 4, "layer": 1}),
        ),
        control=Control(what="`pattern: local` with a reach of all frames, which cuts nothing, and the recorded run"),
    ),
    "latent_noise": Plate(
        metric="trajectory",
        reading=(
            ("trajectory", {"form": "additive", "step": 12, "steps": 4}),
            ("trajectory", {"form": "additive", "step": 12, "steps": 1}),
            ("trajectory", {"form": "on_path", "step": 12, "steps": 4}),
        ),
        control=Control(what="`form: additive` with `strength: 0` and the recorded clean run"),
    ),
    "latent_swap": Plate(
        metric="goal_evidence",
        reading=(
            ("goal_evidence", {"step": 12, "frames": "1-5"}),
            ("goal_evidence", {"step": 15, "frames": "1-2"}),
            ("goal_evidence", {"step": 15, "frames": "1-5"}),
            ("goal_evidence", {"step": 19, "frames": "3-5"}),
        ),
        control=Control(what="`alpha: 0` and the recorded clean run"),
    ),
    "noise": Plate(
        metric="trajectory",
        reading=(
            ("trajectory", {"path": "off_path", "step": 16}),
            ("trajectory", {"path": "on_path", "step": 16}),
            ("trajectory", {"path": "off_path", "step": 8}),
        ),
        control=Control(
            what="both paths at step 0, where the level is pure noise",
            ours={"path": "off_path", "step": 0},
            other="noise",
            theirs={"path": "on_path", "step": 0},
        ),
    ),
    "patch": Plate(
        metric="goal_evidence",
        reading=(
            ("goal_evidence", {"component": "attn2", "step": 3, "layer": 0}),
            ("goal_evidence", {"component": "attn2", "step": 3, "layer": 1}),
            ("goal_evidence", {"component": "attn1", "step": 3, "layer": 1}),
        ),
        control=Control(what="`direction: self` and the recorded clean run"),
    ),
    "prompt_swap": Plate(
        metric="goal_evidence",
        reading=(
            ("goal_evidence", {"run": "clean", "step": 10}),
            ("goal_evidence", {"run": "clean", "step": 15}),
            ("goal_evidence", {"run": "clean", "step": 18}),
        ),
        control=Control(
            what="the clean run of the figure and the corrupted run given the clean latents (`latent_swap`)",
            ours={"run": "clean"},
        ),
    ),
    "seed_ensemble": Plate(
        metric="latent_distance",
        reading=(
            ("latent_distance", {"component": "residual", "layers": 1, "layer": 2}),
            ("latent_distance", {"component": "residual", "layers": 3, "layer": 0}),
            ("latent_distance", {"component": "update", "layers": 1, "layer": 2}),
            ("latent_distance", {"component": "update", "layers": 3, "layer": 0}),
        ),
        control=Control(what="`seeds: 1` and the recorded clean run"),
    ),
    "steer": Plate(
        metric="goal_evidence",
        reading=(
            ("goal_evidence", {"component": "update", "per_token": True, "strength": 10.0}),
            ("trajectory", {"component": "update", "per_token": True, "strength": 10.0}),
            ("goal_evidence", {"component": "update", "per_token": False, "strength": 10.0}),
            ("trajectory", {"component": "update", "per_token": False, "strength": 10.0}),
        ),
        control=Control(what="`strength: 0` and the recorded corrupted run"),
    ),
    "step_skip": Plate(
        metric="latent_distance",
        reading=(
            ("latent_distance", {"mode": "freeze", "step": 4}),
            ("latent_distance", {"mode": "drop", "step": 4}),
            ("latent_distance", {"mode": "repeat", "step": 3}),
            ("latent_distance", {"mode": "swap", "step": 3}),
        ),
        control=Control(
            what="`reuse` and `drop`, which a first-order solver cannot tell apart",
            ours={"mode": "reuse"},
            other="step_skip",
            theirs={"mode": "drop"},
        ),
    ),
}
"""By kind. A kind without one fails the command and the tests."""


def make(kind: str, store: Path, *, redraw: bool = False) -> tuple[Picture, dict[str, Any]]:
    """Run one kind's config and return its figure and the facts of its caption.

    Parameters
    ----------
    store : where the sweep goes; what is there is replaced. redraw : use what is there instead.

    Raises
    ------
    SystemExit : the sweep or its effects failed.
    """
    config = CONFIGS / f"{kind}.yaml"
    if not redraw:
        shutil.rmtree(store, ignore_errors=True)
        for command in (["run", str(config), "--store", str(store)], ["effects", str(store)]):
            if code := stepscope(command):
                raise SystemExit(f"stepscope {' '.join(command)} ended with code {code}")
    sweep = Sweep.read(store)
    plate = PLATES[kind]
    pair = sweep.pairs[1]
    estimand = main_estimand(sweep.effects[kind], plate.metric)
    (picture,) = experiment_pictures(sweep, kind, plate.metric, estimand, [pair])
    return picture, {
        "config": config_digest(kind),
        "png": hashlib.sha256(picture.png).hexdigest(),
        "alt": picture.alt,
        "caption": tables.caption(sweep, kind, plate.metric, estimand),
        "headline": _plain(tables.headline(sweep, kind, plate.metric)),
        "n": int(sweep.effects[kind][f"{plate.metric}_n"].sel(pair=pair).min()),
        "reading": [_read(sweep, kind, metric, pair, cell) for metric, cell in plate.reading],
        "control": plate.control.what,
        "largest_difference": largest_difference(sweep, kind, plate.control),
    }


def config_digest(kind: str) -> str:
    """Return the sha256 of what a kind's config says, comments and layout aside."""
    said = yaml.safe_load((CONFIGS / f"{kind}.yaml").read_text())
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _plain(text: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", text))


def _read(sweep: Sweep, kind: str, metric: str, pair: str, cell: Cell) -> dict[str, Any]:
    """Return what the figure shows at one cell: its colour in a map, the height of its point on a curve."""
    effects = sweep.effects[kind]
    at = {dim: int(np.flatnonzero(effects[dim].values == value)[0]) for dim, value in cell.items()}
    is_map = view_of(effects, metric).shape == "map"
    estimand = main_estimand(effects, metric) if is_map else "difference"
    zero = 0.0 if is_map else reference_of(effects, metric, pair, at)[1]
    bounds = (float(effects[f"{metric}_{estimand}{b}"].sel(pair=pair).isel(at)) for b in ("", "_low", "_high"))
    value, low, high = (zero + bound for bound in bounds)
    what = f"{estimand} of {sweep.long_name(metric)}" if is_map else sweep.long_name(metric)
    where = ", ".join(value_label(effects, dim, i) for dim, i in at.items())
    return {"what": what, "cell": where, "value": value, "low": low, "high": high}


def largest_difference(sweep: Sweep, kind: str, control: Control) -> float:
    """Return the largest difference, over samples, cells and metrics, between what a control says is equal."""
    other = sweep.experiments[control.other]
    found = []
    for metric in sweep.metrics:
        theirs = other[metric].sel(control.theirs)
        if control.ours is not None:
            ours = sweep.experiments[kind][metric].sel(control.ours)
            # Only shared places are compared, and there must be some.
            ours, theirs = xr.align(ours, theirs, join="inner")
        else:
            assert sweep.baseline is not None
            run = recipients(sweep.effects[control.other])
            ours = sweep.baseline[metric].isel(run=list(sweep.baseline["run"].values).index(run))
        found.append(float(np.abs(ours.drop_vars("run", errors="ignore") - theirs).max()))
    return max(found)


def figure_block(kind: str, facts: Mapping[str, Any]) -> str:
    """Return what stands between the figure marks of a page, marks included."""
    largest = float(facts["largest_difference"])
    equal = "exactly 0" if largest == 0 else f"{largest:.0e}"
    made = (
        f"Made by `make kind-figures` from [`configs/kinds/{kind}.yaml`](../../configs/kinds/{kind}.yaml); "
        f"this one alone: `python -m docs.make_kind_figures {kind}`."
    )
    lines = [
        BEGIN,
        f"![{facts['alt']}]({kind}.png)",
        "",
        _wrapped(f"*{facts['caption']} n = {facts['n']} mazes a cell.* {made}"),
        "",
        _wrapped(f"{facts['headline']} Read off:"),
        "",
        "| where | what | value | 95% interval |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['cell']} | {r['what']} | {_number(r['value'])} | {_number(r['low'])} to {_number(r['high'])} |"
        for r in facts["reading"]
    ]
    control = f"Control, from the same sweep: {facts['control']}. Largest difference in any metric: {equal}."
    lines += ["", _wrapped(control), END]
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _number(value: float) -> str:
    # Rounding must not leave a minus before nothing.
    return f"{round(value, 3) + 0.0:.3f}"


def write_block(page: Path, block: str) -> None:
    """Replace what is between the figure marks of a page.

    Raises
    ------
    ValueError : the page has no figure marks.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for its figure: add the lines {BEGIN!r} and {END!r}")
    page.write_text(before + block + after)


def main() -> None:
    """Make the figures of the kinds named on the command line, of all if none is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="which kinds; all by default")
    parser.add_argument("--redraw", action="store_true", help="draw from the sweeps in runs/kinds, run nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(sorted(KINDS))}")
    for kind in arguments.kinds or sorted(KINDS):
        picture, facts = make(kind, ROOT / "runs" / "kinds" / f"{kind}.zarr", redraw=arguments.redraw)
        (PAGES / f"{kind}.png").write_bytes(picture.png)
        known = json.loads(FACTS.read_text()) if FACTS.exists() else {}
        known[kind] = facts
        FACTS.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        write_block(PAGES / f"{kind}.md", figure_block(kind, facts))
        print(f"{kind}: {facts['headline']}", flush=True)


if __name__ == "__main__":
    main()
