"""Film strips: how the clean estimate of a clean, a corrupted and a patched run forms along the steps."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.report.content import Sweep, as_mapping
from pipeline.report.drawing import MUTED, RUN_COLOURS, Picture, save, styled
from pipeline.report.figures import WIDTH, file_name
from pipeline.report.views import SIGMA, sigma_of

STEPS_SHOWN, FRAMES_SHOWN = 6, 6
WIDEST_CELL = 1.7
"""Inches; small videos gain nothing from more."""
Image = NDArray[np.uint8]


def film_strip(sweep: Sweep, position: int) -> Picture | None:
    """Draw one preview: rows are runs, columns steps; each cell the last frame above a strip of frames."""
    previews = sweep.previews
    if previews is None or "x0_hat" not in previews or position >= previews.sizes["preview"]:
        return None
    films = previews["x0_hat"].isel(preview=position).transpose("run", "step", "frame", "y", "x", "rgb").values
    if not films.any():
        return None
    runs = [str(r) for r in previews["run"].values] if "run" in previews.coords else ["clean", "corrupted", "patched"]
    replayed = replayed_steps(previews, position)
    _fill_replayed(films, runs, recipient_of(previews), replayed)
    kept = [r for r in range(len(runs)) if films[r].any()]
    with styled():
        figure = _draw(films, runs, kept, replayed, previews)
        number = int(previews["preview"].values[position]) if "preview" in previews.coords else position
        alt = f"Film strip of sample {number}: last frame and frames of the clean estimate by step and run"
        return save(figure, file_name("film", number), alt)


def replayed_steps(previews: xr.Dataset, position: int) -> int:
    """Count the first steps for which the patched film holds nothing, because the run was still its recipient."""
    if "run" not in previews.coords or "patched" not in previews["run"].values:
        return 0
    film = previews["x0_hat"].isel(preview=position).sel(run="patched").transpose("step", ...).values
    computed = film.reshape(len(film), -1).any(axis=1)
    return int(computed.argmax())


def recipient_of(previews: xr.Dataset) -> str:
    """Return the run that the patched film starts from."""
    patched = as_mapping(previews.attrs.get("patched"))
    if "direction" in patched:
        return "corrupted" if patched["direction"] == "denoising" else "clean"
    return str(patched.get("run", "clean"))


def _fill_replayed(films: Image, runs: list[str], recipient: str, replayed: int) -> None:
    """Show the recipient's film in the steps that the patched run did not compute again."""
    if replayed and recipient in runs:
        films[runs.index("patched"), :replayed] = films[runs.index(recipient), :replayed]


def chosen_steps(count: int) -> list[int]:
    """Choose the steps shown: evenly spaced, first and last included."""
    return sorted({round(float(s)) for s in np.linspace(0, count - 1, min(count, STEPS_SHOWN))})


def _draw(films: Image, runs: list[str], kept: list[int], replayed: int, previews: xr.Dataset) -> Figure:
    steps = chosen_steps(films.shape[1])
    sigma = sigma_of(previews, "step")
    ratio = films.shape[3] / films.shape[4]
    cell = min(WIDEST_CELL, (WIDTH - 0.9) / len(steps))
    strip = _strip(films[0, 0])
    heights = [cell * ratio * 0.94, cell * 0.94 * strip.shape[0] / strip.shape[1], 0.1]
    figure = Figure(figsize=(WIDTH, 0.45 + len(kept) * (sum(heights) + 0.02)))
    total = figure.get_figheight()
    for row, r in enumerate(kept):
        top = total - 0.42 - row * (sum(heights) + 0.02)
        for column, s in enumerate(steps):
            left = 0.85 + column * cell
            faded = runs[r] == "patched" and s < replayed
            for k, image in enumerate((films[r, s, -1], _strip(films[r, s]))):
                bottom = top - sum(heights[: k + 1]) - 0.03 * k
                box = (left / WIDTH, bottom / total, cell * 0.94 / WIDTH, heights[k] / total)
                axes = figure.add_axes(box)
                axes.imshow(image, interpolation="nearest", aspect="auto", alpha=0.35 if faded else 1.0)
                axes.set_axis_off()
            if row == 0:
                label = f"step {previews['step'].values[s]}" if "step" in previews.coords else f"step {s}"
                figure.text(left / WIDTH, (total - 0.2) / total, label, fontsize=8, fontweight="bold")
                if sigma is not None:
                    figure.text(
                        left / WIDTH, (total - 0.35) / total, f"{SIGMA} {sigma[s]:.2f}", fontsize=7, color=MUTED
                    )
        figure.text(
            0,
            (top - heights[0] / 2) / total,
            runs[r],
            fontsize=8.5,
            fontweight="bold",
            color=RUN_COLOURS.get(runs[r], "#22262b"),
            va="center",
        )
    return figure


def _strip(video: Image) -> Image:
    """Lay frames side by side with a gap between them."""
    last = len(video) - 1
    shown = sorted({round(float(f)) for f in np.linspace(0, last, min(len(video), FRAMES_SHOWN))})
    gap = max(1, round(video.shape[2] * 0.1))
    paper = np.full((video.shape[1], gap, 3), 255, np.uint8)
    parts = [part for f in shown for part in (video[f], paper)][:-1]
    return np.concatenate(parts, axis=1)
