"""The report page: one HTML file that carries its figures inside and needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from pathlib import Path

from pipeline.effects.maps import ALL_PAIRS, ESTIMANDS
from pipeline.report import tables
from pipeline.report.content import Sweep, effect_metrics
from pipeline.report.drawing import Picture
from pipeline.report.figures import decision_curve, experiment_pictures
from pipeline.report.films import film_strip, recipient_of, replayed_steps
from pipeline.report.stylesheet import CSS
from pipeline.report.views import SIGMA, fixed_text, main_estimand, view_of
from pipeline.store import Place

PAIRS_INLINE = 3
FILMS_INLINE = 1


class Page:
    """Collects the page's parts and the PNG files that lie beside it."""

    def __init__(self, folder: Path) -> None:
        """Start an empty page that keeps its figures in ``folder``."""
        self.folder = folder
        self.parts: list[str] = []

    def add(self, *parts: str) -> None:
        """Append pieces of HTML."""
        self.parts += parts

    def figure(self, picture: Picture, caption: str = "") -> str:
        """Write a picture beside the page and return it as HTML with the bytes inside."""
        (self.folder / f"{picture.name}.png").write_bytes(picture.png)
        data = base64.b64encode(picture.png).decode()
        note = f"<figcaption>{caption}</figcaption>" if caption else ""
        return (
            f'<figure><img src="data:image/png;base64,{data}" width="{picture.width}" alt="{text(picture.alt)}">'
            f"{note}</figure>"
        )


def write_report(place: Place, out_dir: str | Path) -> Path:
    """Write ``report.html`` with its figures, and the figures as PNG files beside it.

    Parts of the store that are missing or pending are named on the page, not refused.

    Returns
    -------
    The path of the page.

    Raises
    ------
    FileNotFoundError : there is no store at the path.
    """
    sweep = Sweep.read(place)
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(folder)
    title = str(sweep.attrs.get("title", "Sweep"))
    page.add(_header(sweep, title), "<main>")
    if sweep.missing:
        items = "".join(f"<li>{text(line)}</li>" for line in sweep.missing)
        page.add(f'<div class="notice">This report is incomplete.<ul>{items}</ul></div>')
    _add_baseline(page, sweep)
    _add_films(page, sweep)
    for name in sweep.effects:
        _add_experiment(page, sweep, name)
    page.add(_failures(sweep), _definitions(sweep), _provenance(sweep), "</main>", _footer(sweep))
    path = folder / "report.html"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{text(title)}</title>'
    body = "\n".join(page.parts)
    document = (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{CSS}</style></head><body>\n{body}\n</body></html>\n'
    )
    path.write_text(document, encoding="utf-8")
    return path


def text(value: object) -> str:
    """Escape anything for HTML."""
    return html.escape(str(value))


def _header(sweep: Sweep, title: str) -> str:
    cards = "".join(f'<div class="card"><b>{text(v)}</b><span>{text(k)}</span></div>' for k, v in tables.summary(sweep))
    links = [("baseline", "Recorded runs"), *(["films", "Film strips"] for _ in [0] if sweep.previews is not None)]
    links += [(f"x-{name}", name.replace("_", " ")) for name in sweep.effects]
    links += [("failures", "Failed cells"), ("definitions", "Definitions"), ("provenance", "Provenance")]
    nav = "".join(f'<a href="#{text(anchor)}">{text(label)}</a>' for anchor, label in links)
    model = tables.model_name(sweep)
    lead = ", ".join(p for p in (model, f"created {sweep.attrs['created']}" if "created" in sweep.attrs else "") if p)
    return (
        f'<header><div class="inner"><h1>{text(title)}</h1><p class="lead">{text(lead)}</p>'
        f'<div class="cards">{cards}</div><nav>{nav}</nav></div></header>'
    )


def _shown_pairs(sweep: Sweep) -> tuple[list[str], list[str]]:
    """Split pair kinds into those shown at once and those folded away."""
    kinds = sweep.pairs[1:]
    if len(kinds) == 1:
        return [ALL_PAIRS], []
    if len(sweep.pairs) <= PAIRS_INLINE:
        return sweep.pairs, []
    return [ALL_PAIRS], kinds


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{content}</details>" if content else ""


def _add_baseline(page: Page, sweep: Sweep) -> None:
    if sweep.baseline is None or sweep.samples is None:
        return
    shown, folded = _shown_pairs(sweep)
    page.add('<h2 id="baseline">Recorded runs</h2>')
    page.add(
        "<p>Every effect below is measured against these two runs of a sample: the <b>clean</b> run and the "
        "<b>corrupted</b> run, which share everything but the prompt. The floor is the score of a video that does "
        "nothing.</p>"
    )
    page.add(tables.baselines(sweep))
    metrics = sweep.metrics
    for i, metric in enumerate(metrics):
        drawn = [decision_curve(sweep, metric, shown), decision_curve(sweep, metric, folded[:3]) if folded else None]
        content = "".join(page.figure(p) for p in drawn if p is not None)
        if i == 0 and content:
            page.add("<h3>When is the outcome decided?</h3>", content)
            page.add(
                f'<p class="fine">{text(sweep.long_name(metric).capitalize())} of the decoded clean estimate (x0_hat) '
                f"that the model holds at each step. Bands: {_bands(sweep)}. Above: {SIGMA}, the noise level entering "
                "the step.</p>"
            )
        elif i:
            page.add(_details(f"By step: {sweep.long_name(metric)}", content))


def _bands(sweep: Sweep) -> str:
    return f"95% bootstrap intervals over {tables.counted(sweep.prompts(), 'prompt')}, seeds of a prompt averaged first"


def _add_films(page: Page, sweep: Sweep) -> None:
    if sweep.previews is None or "x0_hat" not in sweep.previews:
        return
    pictures = [film_strip(sweep, i) for i in range(sweep.previews.sizes["preview"])]
    figures = [page.figure(p, tables.film_caption(sweep, i)) for i, p in enumerate(pictures) if p is not None]
    page.add('<h2 id="films">Film strips</h2>')
    if not figures:
        page.add("<p>No preview has been computed yet.</p>")
        return
    note = (
        "Each cell shows the last frame of the decoded clean estimate (x0_hat) at a step, above frames from first to "
        "last."
    )
    if any(replayed_steps(sweep.previews, i) for i in range(sweep.previews.sizes["preview"])):
        run = recipient_of(sweep.previews)
        note += f" Faded cells lie before the intervention, where the patched run equals the {run} run."
    page.add(f"<p>{text(note)}</p>", *figures[:FILMS_INLINE])
    page.add(_details(f"More samples: {len(figures) - FILMS_INLINE}", "".join(figures[FILMS_INLINE:])))


def _add_experiment(page: Page, sweep: Sweep, name: str) -> None:
    effects = sweep.effects[name]
    metrics = [m for m in sweep.metrics if m in effect_metrics(effects)]
    page.add(f'<h2 id="x-{text(name)}">{text(name.replace("_", " "))}</h2>')
    fixed = fixed_text(effects.attrs)
    kind = f"Intervention <b>{text(effects.attrs.get('kind', 'unknown'))}</b>" + (
        f" with {text(fixed)}" if fixed else ""
    )
    page.add(f"<p>{kind}. {text(tables.recipient_sentence(effects))}</p>")
    if effects.attrs.get("formula"):
        page.add(f'<div class="formula">{text(effects.attrs["formula"])}</div>')
    if sweep.fields.get(name):
        page.add(f'<p class="fine">{text(_fields_sentence(sweep, name))}</p>')
    if not metrics:
        page.add("<p>No metric of this experiment has effects that can be drawn.</p>")
        return
    pending = int(effects.attrs.get("units_pending", 0))
    if pending:
        page.add(
            f'<div class="notice">{pending} units are still pending; their cells are not in these estimates.</div>'
        )
    page.add(tables.headline(sweep, name, metrics[0]))
    page.add(*_figures(page, sweep, name, metrics[0], _main_estimand(sweep, name, metrics[0])))
    page.add(f'<p class="fine">{text(tables.fine_print(sweep, name, metrics[0]))}</p>')
    page.add(_details("Strongest cells", tables.strongest_cells(sweep, name, metrics[0])))
    for summary, content in _folded(page, sweep, name, metrics):
        page.add(_details(summary, content))


def _fields_sentence(sweep: Sweep, name: str) -> str:
    shown = "; ".join(f"{metric} over {', '.join(dims)}" for metric, dims in sweep.fields[name].items())
    return f"Not drawn, as each cell has a field: {shown}. Their maps are in effects/{name} of the store."


def _main_estimand(sweep: Sweep, name: str, metric: str) -> str:
    return main_estimand(sweep.effects[name], metric)


def _figures(page: Page, sweep: Sweep, name: str, metric: str, estimand: str) -> list[str]:
    shown, _ = _shown_pairs(sweep)
    pictures = experiment_pictures(sweep, name, metric, estimand, shown)
    caption = text(tables.caption(sweep, name, metric, estimand))
    return [page.figure(p, caption if p is pictures[-1] else "") for p in pictures]


def _folded(page: Page, sweep: Sweep, name: str, metrics: list[str]) -> Iterator[tuple[str, str]]:
    """Yield what is not the first look: pair kinds, the other estimand, the other metrics."""
    _, folded = _shown_pairs(sweep)
    first = metrics[0]
    estimand = _main_estimand(sweep, name, first)
    if folded:
        pictures = experiment_pictures(sweep, name, first, estimand, folded)
        yield "By pair kind", "".join(page.figure(p) for p in pictures)
    other = "difference" if estimand == "recovery" else "recovery"
    if f"{first}_{other}" in sweep.effects[name] and view_of(sweep.effects[name], first).shape == "map":
        summary = f"{other.capitalize()} of {sweep.long_name(first)}"
        yield summary, "".join(_figures(page, sweep, name, first, other))
    for metric in metrics[1:]:
        figures = _figures(page, sweep, name, metric, _main_estimand(sweep, name, metric))
        yield sweep.long_name(metric).capitalize(), tables.headline(sweep, name, metric) + "".join(figures)


def _failures(sweep: Sweep) -> str:
    return f'<h2 id="failures">Failed cells</h2>{tables.failures(sweep)}'


def _definitions(sweep: Sweep) -> str:
    rows = [(sweep.long_name(m), sweep.description(m) or "The store records no definition.") for m in sweep.metrics]
    method: dict[str, str] = {}
    for effects in sweep.effects.values():
        labels = {
            "sign_convention": "sign",
            "experimental_unit": "experimental unit",
            "method_interval": "interval",
            "method_p_fwer": f"p ({tables.adjustment(effects)})",
            "method_p_fdr": "p (FDR)",
            "caveat": "caveat",
        }
        for key, label in labels.items():
            own = ", experiments in rounds" if "looks" in effects.attrs and key.startswith(("method", "caveat")) else ""
            if key in effects.attrs:
                method.setdefault(label + own, str(effects.attrs[key]))
    rows += [*ESTIMANDS.items(), *method.items()]
    items = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in rows)
    return f'<h2 id="definitions">Definitions</h2><dl>{items}</dl>'


def _provenance(sweep: Sweep) -> str:
    items = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in tables.provenance(sweep))
    config = f"<pre>{text(tables.config_text(sweep))}</pre>" if sweep.config else "<p>The store records no config.</p>"
    return f'<h2 id="provenance">Provenance</h2><dl>{items}</dl>{_details("Sweep config", config)}'


def _footer(sweep: Sweep) -> str:
    version = sweep.attrs.get("code_version", "")
    return f"<footer><main>Written by stepscope {text(version)} from the store alone.</main></footer>"
