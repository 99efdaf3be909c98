"""Words and numbers of a report: summary, tables, captions, provenance."""

from __future__ import annotations

import html
import json
from typing import Any

import numpy as np
import xarray as xr
import yaml

from pipeline.effects.experiment import FAILED, PENDING, recipients
from pipeline.effects.inference import Interval
from pipeline.fields import axes_of
from pipeline.report.content import Sweep, as_mapping
from pipeline.report.figures import SIGNIFICANT, floor_of, pair_label
from pipeline.report.views import SIGMA, gap_is_clear, strongest, view_of

STRONGEST = 10
NO_CHANGE = 1e-9
FEWEST = 6
"""Units below which a sign-flip test cannot reach 0.05."""
ERROR_RATE = f"family-wise error rate {SIGNIFICANT:.0%}"


def summary(sweep: Sweep) -> list[tuple[str, str]]:
    """Return the label and number of each summary card."""
    found: list[tuple[str, str]] = []
    if sweep.samples is not None:
        found.append(("samples", f"{sweep.samples.sizes['sample']:,}"))
        found.append(("prompt" if sweep.prompts() == 1 else "prompts", f"{sweep.prompts():,}"))
        kinds = len(sweep.pairs) - 1
        found.append(("pair kind" if kinds == 1 else "pair kinds", f"{kinds}"))
    found.append(("experiments", f"{len(sweep.experiments)}"))
    cells = sum(_cells(d) * d.sizes.get("sample", 0) for d in sweep.experiments.values())
    found.append(("cells", f"{cells:,}"))
    units = [unit_counts(d) for d in sweep.experiments.values()]
    found.append(("units done", f"{sum(u['done'] for u in units):,} of {sum(sum(u.values()) for u in units):,}"))
    return found


def counted(count: int, noun: str) -> str:
    """Count something in words."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def model_name(sweep: Sweep) -> str:
    """Return what the store calls its model."""
    raw = sweep.attrs.get("model", "")
    model = as_mapping(raw)
    return str(model.get("id") or model.get("name") or ("" if model else raw))


def unit_counts(dataset: xr.Dataset) -> dict[str, int]:
    """Count units of work by status."""
    if "status" not in dataset:
        return {"done": 0, "failed": 0, "pending": 0}
    status = np.asarray(dataset["status"].values)
    failed, pending = int((status == FAILED).sum()), int((status == PENDING).sum())
    return {"done": status.size - failed - pending, "failed": failed, "pending": pending}


def baselines(sweep: Sweep) -> str:
    """Tabulate both recorded runs, their gap and the floor, per metric and pair kind."""
    baseline = sweep.baseline
    assert baseline is not None
    rows = []
    weak = False
    for metric in sweep.metrics:
        if metric not in baseline:
            continue
        runs = {str(r): baseline[metric].isel(run=i) for i, r in enumerate(baseline["run"].values)}
        for pair in sweep.pairs if len(sweep.pairs) > 2 else sweep.pairs[:1]:
            both = [sweep.over_prompts(runs[r], pair) for r in ("clean", "corrupted")]
            gap = sweep.over_prompts(runs["clean"] - runs["corrupted"], pair)
            floor = floor_of(sweep, metric, pair)
            unclear = bool(gap.low <= 0 <= gap.high)
            weak |= unclear
            label = sweep.long_name(metric) if pair == "all" else ""
            cells = [_interval(v) for v in both] + [_interval(gap) + (" *" if unclear else "")]
            rows.append([_text(label), _text(pair_label(pair)), *cells, "" if floor is None else f"{floor:.3g}"])
    head = ["metric", "pair kind", "clean run", "corrupted run", "gap", "floor"]
    note = '<p class="fine">Mean over prompts with 95% bootstrap intervals, which need two prompts.'
    if weak:
        note += " * The interval of the gap includes 0, so recoveries of this metric mean little here."
    return _table(head, rows, numeric=2) + note + "</p>"


def headline(sweep: Sweep, name: str, metric: str) -> str:
    """Say in one sentence what the strongest cell is and how many cells differ from their recipient run."""
    effects = sweep.effects[name]
    found = strongest(effects, metric, 1)
    if not found:
        return "<p>No cell has a value yet.</p>"
    top = found[0]
    if abs(top["difference"]) < NO_CHANGE:
        return f'<p class="headline">No cell changes {_text(sweep.long_name(metric))}: every difference is 0.</p>'
    p = effects[f"{metric}_p_fwer"].sel(pair="all").values
    known, marked = int(np.isfinite(p).sum()), int((p <= SIGNIFICANT).sum())
    share = f"{marked} of {known} cells differ from the recipient run ({ERROR_RATE})."
    value = f"<b>{_estimate(top, 'difference')}</b>"
    if "recovery" in top and gap_is_clear(effects, metric):
        value += f", recovery <b>{_estimate(top, 'recovery')}</b>,"
    what = f"Strongest change of {sweep.long_name(metric)}"
    return f'<p class="headline">{_text(what)}: {value} at {_text(top["cell"])}. {share}</p>'


def recipient_sentence(effects: xr.Dataset) -> str:
    """Say which run the experiment changes."""
    run = recipients(effects)
    if isinstance(run, str):
        return f"It changes the {run} run."
    (axis, runs), *_ = run.items()
    named = dict(zip((str(v) for v in effects[axis].values), runs, strict=True))
    return "It changes " + ", ".join(f"the {r} run ({v})" for v, r in named.items()) + "."


def caption(sweep: Sweep, name: str, metric: str, estimand: str) -> str:
    """Explain one experiment figure."""
    effects = sweep.effects[name]
    level = f"{float(effects.attrs.get('level', 0.95)):.0%}"
    if view_of(effects, metric).shape == "map":
        scale = "0 is as the corrupted run, 1 as the clean run" if estimand == "recovery" else "0 is no change"
        return (
            f"{estimand.capitalize()} of {sweep.long_name(metric)}; {scale}. Dots: the cell differs from the recipient "
            f"run ({ERROR_RATE}). Hatched: no value. Above: {SIGMA}, the noise level entering the step."
        )
    return (
        f"{sweep.long_name(metric).capitalize()} under intervention: recipient's mean plus the paired difference, with "
        f"the {level} interval of that difference. Grey lines: recorded runs and floor."
    )


def fine_print(sweep: Sweep, name: str, metric: str) -> str:
    """State sample sizes and method under a figure."""
    effects = sweep.effects[name]
    unit = effects.attrs.get("experimental_unit", "prompt")
    counts = effects[f"{metric}_n"].sel(pair="all").values
    n = f"{counts.max()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    names = list(effects["pair"].values)
    few = [p for p in names if effects[f"{metric}_n"].sel(pair=p).max() < FEWEST]
    where = "" if len(few) == len(names) else f": {', '.join(map(pair_label, few))}"
    note = f" With fewer than {FEWEST} {unit}s no cell can be significant{where}." if few else ""
    drawn = f", {effects.attrs.get('replicates', '?')} replicates" if "looks" not in effects.attrs else ""
    seed = f", seed {effects.attrs.get('seed', '?')}" if drawn else ""
    return (
        f"n = {n} {unit if n == '1' else unit + 's'} per cell (seeds of a {unit} averaged first); "
        f"{effects.attrs.get('method_interval', '')}{drawn}, "
        f"level {effects.attrs.get('level', '?')}{seed}. "
        f"The strongest of many cells overstates its own effect; trust its interval less.{note}"
    )


def adjustment(effects: xr.Dataset) -> str:
    """Name how family-wise p-values were adjusted."""
    return "Holm" if "looks" in effects.attrs else "max-T"


def strongest_cells(sweep: Sweep, name: str, metric: str) -> str:
    """Tabulate the strongest cells over all pairs."""
    effects = sweep.effects[name]
    estimands = [e for e in ("difference", "recovery") if f"{metric}_{e}" in effects]
    rows = [
        [
            _text(row["cell"]),
            *(_estimate(row, e) for e in estimands),
            *(f"{row[p]:.2g}" for p in ("p_fwer", "p_fdr")),
            f"{row['n']:.0f}",
        ]
        for row in strongest(effects, metric, STRONGEST)
    ]
    head = [
        "cell",
        *(f"{e} of {sweep.long_name(metric)}" for e in estimands),
        f"p ({adjustment(effects)})",
        "p (FDR)",
        "n",
    ]
    return _table(head, rows, numeric=1)


def failures(sweep: Sweep) -> str:
    """Tabulate units by status and failed cells per experiment."""
    rows = []
    for name, dataset in sweep.experiments.items():
        units = unit_counts(dataset)
        failed = "not computed"
        if name in sweep.effects:
            effects = sweep.effects[name]
            per = {m: int(effects[f"{m}_failed"].sel(pair="all").sum()) for m in _counted_metrics(effects)}
            failed = ", ".join(f"{sweep.long_name(m)}: {k:,}" for m, k in per.items() if k) or "0"
        cells = f"{_cells(dataset) * dataset.sizes.get('sample', 0):,}"
        rows.append([_text(name), cells, *(f"{units[k]:,}" for k in ("done", "failed", "pending")), _text(failed)])
    head = ["experiment", "cells", "units done", "units failed", "units pending", "failed cells"]
    note = "A failed cell was due and has no finite value. Its estimate leaves it out and rests on fewer prompts."
    return f"<p>{note}</p>" + _table(head, rows, numeric=1, last_text=True)


def _counted_metrics(effects: xr.Dataset) -> list[str]:
    return [str(n).removesuffix("_failed") for n in effects.data_vars if str(n).endswith("_failed")]


def film_caption(sweep: Sweep, position: int) -> str:
    """Say which sample a film strip shows and what was done to the patched run."""
    previews = sweep.previews
    assert previews is not None
    number = int(previews["preview"].values[position]) if "preview" in previews.coords else position
    parts = [f"Sample {number}"]
    if sweep.samples is not None and number < sweep.samples.sizes["sample"]:
        sample = sweep.samples.isel(sample=number)
        clean, corrupted = (_quoted(sample, f"{run}_prompt") for run in ("clean", "corrupted"))
        parts.append(f"{sample['prompt'].item()}, clean prompt {clean}, corrupted prompt {corrupted}")
    patched = as_mapping(previews.attrs.get("patched"))
    if patched:
        parts.append("patched run: " + ", ".join(f"{k} {v}" for k, v in patched.items() if v is not None))
    return _text("; ".join(parts) + ".")


def provenance(sweep: Sweep) -> list[tuple[str, str]]:
    """Return where the numbers come from, as label and text."""
    wanted = ("title", "created", "code_version", "schema_version", "model", "hardware", "libraries", "config_sha256")
    return [(key.replace("_", " "), _flat(sweep.attrs[key])) for key in wanted if key in sweep.attrs]


def config_text(sweep: Sweep) -> str:
    """Return the sweep config as YAML, in its own order."""
    return str(yaml.safe_dump(sweep.config, sort_keys=False, allow_unicode=True, width=100))


def _cells(dataset: xr.Dataset) -> int:
    metric = next((v for v in dataset.data_vars.values() if v.dims[:1] == ("sample",) and v.dtype.kind == "f"), None)
    return 0 if metric is None else int(np.prod([metric.sizes[d] for d in axes_of(metric.dims[1:])], dtype=np.int64))


def _quoted(sample: xr.Dataset, name: str) -> str:
    return f"“{sample[name].item()}”" if name in sample else "unknown"


def _flat(value: object) -> str:
    try:
        parsed = json.loads(str(value))
    except (TypeError, ValueError):
        return str(value)
    return ", ".join(f"{k} {v}" for k, v in parsed.items()) if isinstance(parsed, dict) else str(parsed)


def _interval(value: Interval) -> str:
    if not np.isfinite(value.low):
        return f"{float(value.value):.3g}"
    return f"{float(value.value):.3g} <small>[{float(value.low):.3g}, {float(value.high):.3g}]</small>"


def _estimate(row: dict[str, Any], estimand: str) -> str:
    low, high = row[f"{estimand}_low"], row[f"{estimand}_high"]
    sign = "+" if estimand == "difference" else ""
    if not np.isfinite(low):
        return f"{row[estimand]:{sign}.3f}"
    return f"{row[estimand]:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(head: list[str], rows: list[list[str]], *, numeric: int, last_text: bool = False) -> str:
    """Lay out a table whose cells are HTML already; columns from ``numeric`` on are numbers."""

    def mark(i: int) -> str:
        return ' class="number"' if i >= numeric and not (last_text and i == len(head) - 1) else ""

    top = "".join(f"<th{mark(i)}>{_text(h)}</th>" for i, h in enumerate(head))
    body = "".join("<tr>" + "".join(f"<td{mark(i)}>{c}</td>" for i, c in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
