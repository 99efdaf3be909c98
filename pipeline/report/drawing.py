"""The look of every figure: colours, type, axes with sigma on top, labelled reference lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.report.views import SIGMA, ticks

CSS_PIXELS = 96
"""CSS pixels an inch; figures are saved at twice that, for dense screens."""

INK, MUTED, GRID, PAPER, NO_DATA = "#22262b", "#6b7280", "#e6e4df", "#ffffff", "#eceae5"
RUN_COLOURS = {"clean": "#2b6ca3", "corrupted": "#c2542d"}
LINE_COLOURS = ("#2b6ca3", "#c2542d", "#3f8f6b", "#8a5fa8", "#b8860b", "#4f5d6b")
DIVERGING = "RdBu_r"

STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#a3a6ab",
    "axes.linewidth": 0.7,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "text.color": INK,
    # A dollar in a prompt is a dollar.
    "text.parse_math": False,
    "hatch.linewidth": 0.5,
    "hatch.color": "#c9c6bf",
    "figure.facecolor": PAPER,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A finished figure.

    Attributes
    ----------
    name : file name without ending. png : the file. width : CSS pixels it should take. alt : what it shows.
    """

    name: str
    png: bytes
    width: int
    alt: str


def styled() -> Any:
    """Return the context in which figures are drawn."""
    return mpl.rc_context(STYLE)


def save(figure: Figure, name: str, alt: str) -> Picture:
    """Render a figure at twice the CSS resolution."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=2 * CSS_PIXELS, metadata={"Software": None})
    return Picture(name=name, png=buffer.getvalue(), width=round(figure.get_figwidth() * CSS_PIXELS), alt=alt)


def sigma_axis(axes: Axes, positions: Sequence[float], sigma: NDArray[np.float64], *, most: int) -> None:
    """Show sigma above an axis whose data positions are given."""
    top = axes.secondary_xaxis("top")
    chosen = ticks(len(sigma), most)
    top.set_xticks([positions[i] for i in chosen], [_short(float(sigma[i])) for i in chosen])
    top.tick_params(labelsize=7, length=2, pad=1, colors=MUTED)
    top.spines["top"].set_visible(False)
    axes.annotate(
        SIGMA, (0, 1), (-10, 3.5), xycoords="axes fraction", textcoords="offset points", fontsize=8, color=MUTED
    )


def plain_axes(axes: Axes) -> None:
    """Take away frames that carry nothing and add a faint grid for reading values."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def reference_lines(axes: Axes, lines: Iterable[tuple[str, float, str]], *, label: bool) -> None:
    """Draw horizontal lines (label, value, dash) and, if asked, name them at the right, kept apart from each other."""
    drawn = sorted((line for line in lines if np.isfinite(line[1])), key=lambda line: line[1])
    for _, value, dash in drawn:
        axes.axhline(value, color=MUTED, linewidth=0.9, linestyle=dash, zorder=1)
    if not label or not drawn:
        return
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    heights = [value for _, value, _ in drawn]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for (name, value, _), height in zip(drawn, heights, strict=True):
        text = f"{name} {value:.2f}"
        axes.annotate(text, (1.01, height), xycoords=("axes fraction", "data"), va="center", fontsize=7, color=MUTED)


def mark_no_data(axes: Axes) -> None:
    """Give an axes the background that shows through where a map has no value."""
    axes.patch.set_facecolor(NO_DATA)
    axes.patch.set_hatch("////")
    axes.patch.set_edgecolor("#d2cfc8")


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
