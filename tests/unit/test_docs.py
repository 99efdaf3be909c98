"""What the documents show works: YAML validates, code compiles, links and named tests exist, the card is current."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline import yaml_source
from pipeline.cli import app
from pipeline.config import load_config, validate
from pipeline.embedded.evaluate import render
from pipeline.models import EMBEDDED
from pipeline.plan import make_plan

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_first_yaml_is_a_sweep():
    (text,) = blocks(ROOT / "README.md", "yaml")
    raw, lines = yaml_source.read(text, "README.md")
    plan = make_plan(validate(raw, lines, "README.md"))
    assert plan.cost().cells == 4 * (20 * 6 * 3 + 20 * 2)


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_can_be_planned(config):
    if load_config(config).model.id not in EMBEDDED:
        pytest.skip("its model is on the hub; that its settings are valid was just seen")
    assert make_plan(load_config(config), config).cost().cells > 0


def test_the_demo_is_as_large_as_promised():
    plan = make_plan(load_config(ROOT / "configs" / "maze_demo.yaml"))
    assert len(plan.samples) == 16
    assert plan.geometry.steps == 20
    patch = dict(plan.by_name["patch_map"].axes)
    assert len(patch["step"]) == 20
    assert len(patch["layer"]) == plan.geometry.blocks >= 6
    assert len(patch["component"]) >= 3
    assert {g.experiment.kind for g in plan.grids} == {"patch", "step_skip", "frame_shuffle", "noise"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_compile(page):
    for text in blocks(page, "python"):
        compile(text, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?:configs|interventions|pipeline|cluster|tests|benchmarks)/[\w/.]+\.\w+)`", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("page", ["reliability", "security"])
def test_named_tests_exist(page):
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / f"{page}.md").read_text()))
    defined = {m for f in (ROOT / "tests").rglob("*.py") for m in re.findall(r"def (test_\w+)", f.read_text())}
    assert len(named) > 5
    assert named <= defined


def test_commands_of_the_readme_parse():
    commands = "|".join(("run", "plan", "effects", "report"))
    lines = re.findall(rf"^stepscope ((?:{commands}) [^#\n]+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        app.parse_args(line.split(), exit_on_error=False, print_error=False)


def test_make_targets_of_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"(?:^    |`)make ([\w-]+)", page.read_text(), flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_card_page_is_the_card():
    card = json.loads((ROOT / "pipeline" / "embedded" / "maze" / "model_card.json").read_text())
    assert (ROOT / "docs" / "model_card.md").read_text() == render(card)
