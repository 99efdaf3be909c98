"""The page of every intervention kind says what the class says, and its figure and numbers are the command's own."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml

from docs import make_kind_figures as figures
from interventions.base import KINDS
from pipeline import yaml_source
from pipeline.cli import app
from pipeline.config import load_config, validate
from pipeline.listing import type_name
from pipeline.plan import make_plan
from pipeline.report.figures import _legend_columns
from pipeline.report.views import value_label

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "interventions"
INDEX = ROOT / "docs" / "interventions.md"
SHIPPED = sorted(name for name, cls in KINDS.items() if cls.__module__.startswith("interventions.kinds."))
"""Other tests register kinds of their own."""
FACTS = json.loads(figures.FACTS.read_text())
each_kind = pytest.mark.parametrize("kind", SHIPPED)


def page(kind: str) -> str:
    return (PAGES / f"{kind}.md").read_text()


def table(text: str, first: str) -> list[list[str]]:
    """Return the rows of the table whose head starts with ``first``, cells stripped."""
    rows = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows if not row.startswith("|--")]


def default_text(info) -> str:
    if info.is_required():
        return "required"
    if info.default is None or isinstance(info.default, bool):
        return {None: "none", True: "true", False: "false"}[info.default]
    return info.default if isinstance(info.default, str) else f"{info.default:g}"


def test_every_kind_has_a_page_a_figure_a_config_and_a_plate_and_nothing_is_left_over():
    assert sorted(p.stem for p in PAGES.glob("*.md")) == SHIPPED
    assert sorted(p.stem for p in PAGES.glob("*.png")) == SHIPPED
    assert sorted(p.stem for p in figures.CONFIGS.glob("*.yaml")) == SHIPPED
    assert sorted(figures.PLATES) == sorted(FACTS) == SHIPPED


@each_kind
def test_the_page_states_sentence_formula_and_example_of_the_class(kind):
    cls, text = KINDS[kind], page(kind)
    assert text.startswith(f"# {kind}\n\n{cls.__doc__.strip().splitlines()[0].replace('``', '`')}\n")
    assert f"```text\n{cls.formula}\n```" in text
    assert f"```yaml\n{cls.example}\n```" in text


@each_kind
def test_the_page_lists_every_field_with_its_values_default_and_meaning(kind):
    head, *rows = table(page(kind), "field")
    assert head == ["field", "values", "default", "meaning"]
    fields = {name: info for name, info in KINDS[kind].model_fields.items() if name != "kind"}
    assert sorted(row[0] for row in rows) == sorted(f"`{name}`" for name in fields)
    for name, values, default, meaning in rows:
        info = fields[name.strip("`")]
        expected = "mapping" if name == "`parts`" else type_name(info.annotation).replace(" | ", ", ")
        assert (name, values, default) == (name, expected, default_text(info))
        assert len(meaning) > 3


@each_kind
def test_the_page_is_complete_and_short(kind):
    text = page(kind)
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert headings == ["What the number means", "Fields", "Example", "Figure", "Negative control"]
    assert "What it does not show:\n\n- " in text
    assert len(text.splitlines()) <= 80


@each_kind
def test_the_example_of_the_page_can_be_planned(kind):
    raw, lines = yaml_source.read(
        "name: example\nmodel: {id: embedded:maze}\ntask: {name: maze, mazes: 8}\nsampler: {steps: 4}\n"
        "metrics: [solved]\nexperiments:\n" + re.sub(r"(?m)^", "  ", KINDS[kind].example),
        kind,
    )
    plan = make_plan(validate(raw, lines, kind))
    assert [grid.experiment.kind for grid in plan.grids] == [kind]


@each_kind
def test_the_config_of_the_figure_is_a_small_sweep_of_the_kind_in_this_process(kind):
    config = load_config(figures.CONFIGS / f"{kind}.yaml")
    plan = make_plan(config)
    assert plan.by_name[kind].experiment.kind == kind
    assert config.run.replicas == 0
    assert config.model.id == "embedded:maze"
    assert plan.cost().row_forwards <= 4500
    assert figures.PLATES[kind].metric == config.metrics[0]


@each_kind
def test_figure_and_caption_of_the_page_are_what_the_command_made_of_the_config(kind):
    facts = FACTS[kind]
    assert facts["config"] == figures.config_digest(kind), "the config has changed: make kind-figures"
    assert facts["png"] == hashlib.sha256((PAGES / f"{kind}.png").read_bytes()).hexdigest()
    assert figures.figure_block(kind, facts) in page(kind)
    assert len(facts["reading"]) == len(figures.PLATES[kind].reading)
    assert facts["n"] >= 6


@each_kind
def test_numbers_are_not_typed_by_hand(kind):
    before, _, rest = page(kind).partition(figures.BEGIN)
    prose = re.sub(r"```.*?```|`[^`]*`|^\|.*$", "", before + rest.partition(figures.END)[2], flags=re.DOTALL | re.M)
    assert not re.findall(r"\d\.\d|\d ?%", prose)


@each_kind
def test_what_must_be_equal_is(kind):
    assert FACTS[kind]["largest_difference"] < 1e-5
    assert f"Control, from the same sweep: {FACTS[kind]['control']}" in " ".join(page(kind).split())


@each_kind
def test_links_and_named_files_exist(kind):
    for target in re.findall(r"\]\(([^)#]+)\)", page(kind)):
        assert (PAGES / target).exists(), target
    for target in re.findall(r"`((?:configs|interventions|pipeline|docs|tests)/[\w/.]+\.\w+)`", page(kind)):
        assert (ROOT / target).exists(), target


def test_the_index_has_one_line_a_kind_with_its_link():
    listed = re.findall(r"^- \[(\w+)\]\(interventions/(\w+)\.md\): .+\.$", INDEX.read_text(), flags=re.MULTILINE)
    assert sorted(name for name, _ in listed) == SHIPPED
    assert all(name == link for name, link in listed)


def test_the_index_says_how_finely_each_kind_chooses():
    head, *rows = table(INDEX.read_text().partition("## How finely")[2], "kind")
    assert sorted(row[0] for row in rows) == SHIPPED
    for kind, *marks in rows:
        given = {field for field, mark in zip(head[1:], marks, strict=True) if mark}
        assert given == set(head[1:]) & set(KINDS[kind].model_fields), kind


POINTS = {
    "Site": "activations",
    "LatentsAt": "latents",
    "PromptAt": "prompt",
    "PredictionAt": "prediction",
    "OutputAt": "denoiser output",
    "BlockAt": "blocks",
    "AttentionAt": "attention",
}
MORE = {
    "frame_shuffle": ({"space": "hidden", "mode": "reverse", "step": 1, "layer": 0},),
    "step_skip": (
        {"mode": "reuse", "step": 1},
        {"mode": "reuse_branch", "step": 1, "branch": "cond"},
        {"mode": "drop", "step": 1},
    ),
}
"""What the example of a kind does not show of where it acts."""


def test_the_index_says_where_each_kind_acts():
    head, *rows = table(INDEX.read_text().partition("## Where each")[2], "kind")
    assert head[:2] == ["kind", "acts on"]
    plan = make_plan(load_config(figures.CONFIGS / "patch.yaml"))
    for kind, acts, *_ in rows:
        if kind == "compose":
            continue  # acts where its parts do
        fields = {k: (v[0] if isinstance(v, list) else v) for k, v in next(iter(_example(kind).values())).items()}
        fields = {k: (1 if v == "all" else v) for k, v in fields.items()}
        found = set()
        for made in (fields, *({"kind": kind, **more} for more in MORE.get(kind, ()))):
            intervention = KINDS[kind](**made)
            found |= {POINTS[type(point).__name__] for point in intervention.points(plan.geometry)}
            found |= {"schedule"} if intervention.schedule else set()
        assert set(acts.split(", ")) == found, kind


def _example(kind: str) -> dict:
    return yaml.safe_load(KINDS[kind].example)


def test_the_index_links_resolve_and_its_commands_parse():
    text = INDEX.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (INDEX.parent / target).exists(), target
    for line in re.findall(r"`stepscope ([a-z]+(?: \w+)?)`", text):
        app.parse_args(line.split(), exit_on_error=False, print_error=False)
    assert re.search(r"^kind-figures:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_command_makes_the_numbers_that_the_pages_show(tmp_path):
    picture, facts = figures.make("step_skip", tmp_path / "store.zarr")
    written = FACTS["step_skip"]
    for key in ("config", "alt", "caption", "n", "control"):
        assert facts[key] == written[key]
    for now, then in zip(facts["reading"], written["reading"], strict=True):
        assert (now["what"], now["cell"]) == (then["what"], then["cell"])
        for number in ("value", "low", "high"):
            assert now[number] == pytest.approx(then[number], abs=2e-3)
    assert picture.png[:4] == b"\x89PNG"


def test_the_text_between_the_marks_is_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n")
    figures.write_block(path, figures.figure_block("step_skip", FACTS["step_skip"]))
    before, block, after = path.read_text().partition(figures.figure_block("step_skip", FACTS["step_skip"]))
    assert (before, bool(block), after) == ("before\n", True, "\nafter\n")
    path.write_text("no marks")
    with pytest.raises(ValueError, match="no place for its figure"):
        figures.write_block(path, "block")


@pytest.mark.parametrize(
    ("dim", "value", "label"),
    [
        ("frames", "1-2", "frames 1-2"),
        ("run", "clean", "clean run"),
        ("per_token", True, "per token"),
        ("per_token", False, "not per token"),
        ("donor_sample", 2, "donor sample 2"),
        ("mode", "reuse_branch", "reuse branch"),
    ],
)
def test_values_of_an_axis_are_named_so_that_they_can_be_told_apart(dim, value, label):
    values = np.array([value], dtype=object if isinstance(value, str) else None)
    assert value_label(xr.Dataset(coords={dim: values}), dim, 0) == label


def test_the_legend_of_a_figure_stays_inside_it():
    assert _legend_columns(["reuse", "drop"], 7.6) == 2
    assert _legend_columns(["residual, layers 1"] * 6, 7.6) == 3
    assert _legend_columns(["a label that is far too long for any figure of this width at all, really"] * 3, 4.0) == 1
