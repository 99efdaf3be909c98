"""Figures of a sweep: effect maps, curves with bands, when a run is decided, and film strips."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.report.content import Sweep
from pipeline.report.drawing import (
    DIVERGING,
    INK,
    LINE_COLOURS,
    MUTED,
    PAPER,
    RUN_COLOURS,
    Picture,
    mark_no_data,
    plain_axes,
    reference_lines,
    save,
    sigma_axis,
    styled,
)
from pipeline.report.views import AXIS_LABELS, View, combinations, reference_of, sigma_of, ticks, view_of

WIDTH = 10.6
"""Widest figure in inches; at 96 CSS pixels an inch it fits the page."""

LONGEST_NAME = 150
"""Bytes of a file name without its ending."""
COLUMNS, LINES, PANELS = 6, 6, 3
SIGNIFICANT = 0.05
DARK = 0.36
"""Distance from the middle of the colour scale, which is 1 long, beyond which it is dark."""


def experiment_pictures(sweep: Sweep, name: str, metric: str, estimand: str, pairs: Sequence[str]) -> list[Picture]:
    """Draw one experiment in one metric: a map, curves or points, whatever its axes ask for."""
    effects = sweep.effects[name]
    view = view_of(effects, metric)
    with styled():
        if view.shape == "map":
            return heat_maps(sweep, name, metric, estimand, pairs)
        draw = curves if view.shape == "curve" else points
        return [draw(sweep, name, metric, pairs[i : i + PANELS]) for i in range(0, len(pairs), PANELS)]


def heat_maps(sweep: Sweep, name: str, metric: str, estimand: str, pairs: Sequence[str]) -> list[Picture]:
    """Draw maps with a row for each pair kind and a column for each remaining value, one scale for all."""
    effects = sweep.effects[name]
    view = view_of(effects, metric)
    values = effects[f"{metric}_{estimand}"]
    norm, extend = symmetric_norm(values.sel(pair=list(pairs)).values)
    panels = combinations(effects, view.others)
    pictures = []
    for start in range(0, len(panels), COLUMNS):
        figure = _map_figure(effects, metric, view, panels[start : start + COLUMNS], pairs, values, norm)
        bar = figure.colorbar(
            ScalarMappable(norm, DIVERGING),
            ax=figure.axes[: len(pairs) * len(panels[start : start + COLUMNS])],
            extend=extend,
            shrink=0.9,
            aspect=18,
            pad=0.13 / figure.get_figwidth(),
        )
        bar.set_label(scale_label(sweep.long_name(metric), estimand))
        bar.outline.set_visible(False)
        alt = f"Maps of the {estimand} of {sweep.long_name(metric)} in {name}, {view.x} along x and {view.y} along y"
        pictures.append(save(figure, file_name(name, metric, estimand, pairs, start // COLUMNS), alt))
    return pictures


def symmetric_norm(values: NDArray[np.float64]) -> tuple[Normalize, str]:
    """Return a scale centred on 0 that a few wild cells cannot stretch, and whether values lie beyond it.

    Effects are sparse, so the strongest cells set the scale unless they are far beyond all others, as a recovery is
    where its gap nearly vanishes.
    """
    finite = np.abs(values[np.isfinite(values)])
    if not finite.size or not finite.max():
        return Normalize(-1, 1), "neither"
    limit = float(finite.max())
    typical = float(np.quantile(finite, 0.99))
    clipped = limit > 8 * typical > 0
    limit = typical if clipped else limit
    return Normalize(-limit, limit), "both" if clipped else "neither"


def scale_label(long_name: str, estimand: str) -> str:
    """Name what the colours of a map mean."""
    if estimand == "recovery":
        return f"recovery of\n{fill(long_name, 24)}"
    return f"change of\n{fill(long_name, 24)}"


def _map_figure(
    effects: xr.Dataset,
    metric: str,
    view: View,
    panels: Sequence[tuple[str, dict[str, int]]],
    pairs: Sequence[str],
    values: xr.DataArray,
    norm: Normalize,
) -> Figure:
    assert view.x is not None
    assert view.y is not None
    rows, columns = len(pairs), len(panels)
    height = float(np.clip(0.24 * effects.sizes[view.y], 1.9 if rows == 1 else 1.1, 3.4))
    width = min(WIDTH, 1.5 + columns * float(np.clip(0.2 * effects.sizes[view.x], 2.2, 4.6)))
    figure = Figure(figsize=(width, 0.75 + rows * (height + 0.2)), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    sigma = sigma_of(effects, view.x)
    for r, pair in enumerate(pairs):
        for c, (label, position) in enumerate(panels):
            axes = grid[r, c]
            cell = values.sel(pair=pair).isel(position).transpose(view.y, view.x).values
            mark_no_data(axes)
            axes.imshow(cell, cmap=DIVERGING, norm=norm, origin="lower", aspect="auto", interpolation="nearest")
            p = effects[f"{metric}_p_fwer"].sel(pair=pair).isel(position).transpose(view.y, view.x).values
            _mark_significant(axes, p, norm(cell))
            most = max(3, int(5 * (width - 1.5) / columns / 2.6))
            _index_ticks(axes, effects, view.x, view.y, most)
            if r == 0 and sigma is not None:
                sigma_axis(axes, range(len(sigma)), sigma, most=most)
            if r == 0 and label:
                axes.set_title(label)
            if r == rows - 1:
                axes.set_xlabel(AXIS_LABELS.get(view.x, view.x))
            if c == 0:
                axes.set_ylabel(f"{pair_label(pair)}\n{AXIS_LABELS.get(view.y, view.y)}")
    return figure


def _mark_significant(axes: Axes, p: NDArray[np.float64], shade: NDArray[np.float64]) -> None:
    y, x = np.nonzero(p <= SIGNIFICANT)
    size = float(np.clip(500 / max(p.size, 1), 0.6, 4))
    # A dark dot is lost on either dark end of the scale.
    colours = [PAPER if abs(shade[at] - 0.5) > DARK else INK for at in zip(y, x, strict=True)]
    axes.scatter(x, y, s=size, color=colours, linewidths=0, zorder=3)


def _index_ticks(axes: Axes, effects: xr.Dataset, x: str, y: str, most: int) -> None:
    chosen = ticks(effects.sizes[x], most)
    axes.set_xticks(chosen, [f"{effects[x].values[i]:g}" for i in chosen])
    chosen = ticks(effects.sizes[y], 8)
    axes.set_yticks(chosen, [f"{effects[y].values[i]:g}" for i in chosen])
    axes.tick_params(length=2)
    for spine in axes.spines.values():
        spine.set_visible(False)


def curves(sweep: Sweep, name: str, metric: str, pairs: Sequence[str]) -> Picture:
    """Draw the metric under intervention against step, frame, layer or strength, with bands and references."""
    effects = sweep.effects[name]
    view = view_of(effects, metric)
    assert view.x is not None
    lines = combinations(effects, view.others)
    facets, lines = _facets(effects, view, lines)
    columns = len(pairs)
    width = min(WIDTH, 1.6 + 4.3 * columns) if columns > 1 else 7.6
    figure = Figure(figsize=(width, 0.6 + 2.7 * len(facets)), layout="constrained")
    grid = figure.subplots(len(facets), columns, sharex=True, sharey=True, squeeze=False)
    for r, (facet, fixed) in enumerate(facets):
        for c, pair in enumerate(pairs):
            _draw_lines(grid[r, c], effects, metric, view.x, pair, [(n, fixed | p) for n, p in lines])
            grid[r, c].set_title(", ".join(t for t in (facet, pair_label(pair)) if t), loc="left")
    _finish_curves(sweep, grid, effects, metric, view.x, pairs)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=_legend_columns(labels, width), frameon=False)
    alt = f"Curves of {sweep.long_name(metric)} under {name} against {view.x}, with intervals and reference lines"
    return save(figure, file_name(name, metric, "curve", pairs, 0), alt)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Return how many entries stand side by side in rows of equal length."""
    inches = 0.66 + 0.066 * max(map(len, labels))  # of a key and of letters of average width
    rows = -(-len(labels) // max(1, min(6, int(width / inches))))
    return -(-len(labels) // rows)


def _facets(
    effects: xr.Dataset, view: View, lines: list[tuple[str, dict[str, int]]]
) -> tuple[list[tuple[str, dict[str, int]]], list[tuple[str, dict[str, int]]]]:
    if len(lines) <= LINES or len(view.others) < 2:
        return [("", {})], lines
    return combinations(effects, view.others[:1]), combinations(effects, view.others[1:])


def _draw_lines(
    axes: Axes, effects: xr.Dataset, metric: str, x: str, pair: str, lines: list[tuple[str, dict[str, int]]]
) -> None:
    at = effects[x].values
    chosen = effects.sel(pair=pair)
    for i, (label, position) in enumerate(lines):
        _, reference = reference_of(effects, metric, pair, position)
        middle, low, high = (
            reference + chosen[f"{metric}_difference{bound}"].isel(position).values for bound in ("", "_low", "_high")
        )
        colour = LINE_COLOURS[i % len(LINE_COLOURS)]
        dash = "-" if i < len(LINE_COLOURS) else "--"
        axes.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(
            at, middle, dash, color=colour, linewidth=1.5, marker="o", markersize=2.6, label=label or "intervened"
        )


def _finish_curves(
    sweep: Sweep, grid: NDArray[Any], effects: xr.Dataset, metric: str, x: str, pairs: Sequence[str]
) -> None:
    sigma = sigma_of(effects, x)
    for (r, c), axes in np.ndenumerate(grid):
        plain_axes(axes)
        if r == 0 and sigma is not None:
            sigma_axis(axes, list(effects[x].values), sigma, most=6)
        if r == len(grid) - 1:
            axes.set_xlabel(AXIS_LABELS.get(x, x))
            _whole_ticks(axes, effects[x].values)
        if c == 0:
            axes.set_ylabel(sweep.long_name(metric))
        axes.margins(y=0.08)
    # Limits are shared and must include every reference before labels are spaced.
    for axes, pair in zip(grid.T.ravel(), np.repeat(list(pairs), len(grid)), strict=True):
        reference_lines(axes, run_levels(sweep, effects, metric, str(pair)), label=True)


def run_levels(sweep: Sweep, effects: xr.Dataset, metric: str, pair: str) -> list[tuple[str, float, str]]:
    """List the recorded runs' means and the floor as (label, value, dash)."""
    chosen = effects.sel(pair=pair)
    found = [
        ("clean", float(chosen[f"{metric}_clean"]), "--"),
        ("corrupted", float(chosen[f"{metric}_corrupted"]), "-."),
    ]
    floor = floor_of(sweep, metric, pair)
    return found if floor is None else [*found, ("floor", floor, ":")]


def floor_of(sweep: Sweep, metric: str, pair: str) -> float | None:
    """Return the mean floor of a metric over the prompts of a pair kind, None if it has no floor."""
    if sweep.baseline is None or sweep.samples is None or f"{metric}_floor" not in sweep.baseline:
        return None
    return float(sweep.over_prompts(sweep.baseline[f"{metric}_floor"], pair).value)


def points(sweep: Sweep, name: str, metric: str, pairs: Sequence[str]) -> Picture:
    """Draw one value with its interval for each cell of an experiment without a numeric axis."""
    effects = sweep.effects[name]
    rows = combinations(effects, view_of(effects, metric).others)
    figure = Figure(figsize=(min(WIDTH, 2 + 3.6 * len(pairs)), 1.2 + 0.3 * len(rows)), layout="constrained")
    grid = figure.subplots(1, len(pairs), sharex=True, sharey=True, squeeze=False)[0]
    for axes, pair in zip(grid, pairs, strict=True):
        for i, (_, position) in enumerate(rows):
            _, reference = reference_of(effects, metric, pair, position)
            cell = effects.sel(pair=pair).isel(position)
            middle, low, high = (reference + float(cell[f"{metric}_difference{b}"]) for b in ("", "_low", "_high"))
            axes.plot([low, high], [i, i], color=LINE_COLOURS[0], linewidth=1.5)
            axes.plot(middle, i, "o", color=LINE_COLOURS[0], markersize=4)
        for label, value, dash in run_levels(sweep, effects, metric, pair):
            if np.isfinite(value):
                axes.axvline(value, color=MUTED, linewidth=0.9, linestyle=dash, label=f"{label} {value:.2f}")
        axes.set_yticks(range(len(rows)), [label or "intervened" for label, _ in rows])
        axes.set_title(pair_label(pair), loc="left")
        axes.set_xlabel(sweep.long_name(metric))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, loc="best")
    alt = f"{sweep.long_name(metric)} under {name}, one point with its interval for each cell"
    return save(figure, file_name(name, metric, "points", pairs, 0), alt)


def decision_curve(sweep: Sweep, metric: str, pairs: Sequence[str]) -> Picture | None:
    """Draw the metric of the clean estimate at every step, for both recorded runs: when is the outcome decided?"""
    baseline = sweep.baseline
    if baseline is None or sweep.samples is None or f"{metric}_by_step" not in baseline:
        return None
    by_step = baseline[f"{metric}_by_step"]
    steps = baseline["step"].values if "step" in baseline.coords else np.arange(by_step.sizes["step"])
    sigma = sigma_of(baseline, "step")
    with styled():
        width = min(WIDTH, 1.6 + 4.3 * len(pairs)) if len(pairs) > 1 else 7.6
        figure = Figure(figsize=(width, 3.3), layout="constrained")
        grid = figure.subplots(1, len(pairs), sharex=True, sharey=True, squeeze=False)[0]
        for axes, pair in zip(grid, pairs, strict=True):
            band = sweep.over_prompts(by_step, pair)
            for r, run in enumerate(map(str, baseline["run"].values)):
                colour = RUN_COLOURS.get(run, INK)
                axes.fill_between(steps, band.low[r], band.high[r], color=colour, alpha=0.16, linewidth=0)
                axes.plot(
                    steps, band.value[r], color=colour, linewidth=1.6, label=f"{run} run", marker="o", markersize=2.6
                )
            axes.set_title(pair_label(pair), loc="left")
            axes.set_xlabel("denoising step")
            _whole_ticks(axes, steps)
            plain_axes(axes)
            if sigma is not None:
                sigma_axis(axes, list(steps), sigma, most=6)
        for axes, pair in zip(grid, pairs, strict=True):
            floor = floor_of(sweep, metric, pair)
            reference_lines(axes, [("floor", floor, ":")] if floor is not None else [], label=True)
        grid[0].set_ylabel(f"{sweep.long_name(metric)}\nof the clean estimate")
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        alt = f"{sweep.long_name(metric)} of the clean estimate at every step, clean and corrupted run"
        return save(figure, file_name("baseline", metric, "by_step", pairs, 0), alt)


def _whole_ticks(axes: Axes, values: NDArray[Any]) -> None:
    if values.dtype.kind in "iu":
        chosen = ticks(len(values), 11)
        axes.set_xticks([values[i] for i in chosen])


def pair_label(pair: str) -> str:
    """Name a pair kind in a figure."""
    return "all pairs" if pair == "all" else pair.replace("/", " / ")


def file_name(*parts: object) -> str:
    """Join parts into a file name that every system accepts."""
    flat = [" ".join(map(str, p)) if isinstance(p, (list, tuple)) else str(p) for p in parts]
    text = "_".join(flat)
    name = "".join(ch if ch.isalnum() or ch in "_-" else "-" for ch in text)
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{zlib.crc32(text.encode()):08x}"
