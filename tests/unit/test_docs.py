"""What the documents show works: YAML validates, code compiles, commands parse, links, tests and rooms exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from pipeline import yaml_source
from pipeline.cli import app
from pipeline.config import ModelConfig, RunConfig, load_config, validate
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


def test_named_tests_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text()))
    defined = {m for f in (ROOT / "tests").rglob("*.py") for m in re.findall(r"def (test_\w+)", f.read_text())}
    assert len(named) > 5
    assert named <= defined


def commands_of(page: Path) -> list[list[str]]:
    """Return the words of every command line of stepscope that a page shows, in a block or in a sentence."""
    text = page.read_text().replace("\\\n", " ")
    blocked = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line for block in blocked for line in block.splitlines()] + spans
    found = [re.search(r"(?:^|-- |\$ )stepscope (.+)", line) for line in lines]
    return [shlex.split(match.group(1), comments=True) for match in found if match]


def parse(words: list[str]) -> None:
    """Parse a command line; a command alone, as sentences name it, only has to exist."""
    if len(words) == 1:
        assert words[0] in [name for names in app for name in names.split()], words
    else:
        app.parse_args(words, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("page", ["README", "docs/cluster"])
def test_command_lines_parse(page):
    found = commands_of(ROOT / f"{page}.md")
    whole = [words for words in found if len(words) > 1]
    assert len(whole) >= 10
    for words in found:
        parse(words)


def test_pages_show_each_command_of_a_sweeps_life():
    for page in ("README", "docs/cluster"):
        shown = {words[0] for words in commands_of(ROOT / f"{page}.md")}
        assert {"submit", "status", "cancel", "verify", "export"} <= shown


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("```sh\nstepscope run x.yaml  # why\n```\n", [["run", "x.yaml"]]),
        ("```\nstepscope run x.yaml \\\n  --set a=1\n```\n", [["run", "x.yaml", "--set", "a=1"]]),
        ("```\nray job submit -- stepscope run 'x y.yaml'\n```\n", [["run", "x y.yaml"]]),
        ("Give `stepscope cancel STORE` or `ray stop`.", [["cancel", "STORE"]]),
        ("```\nkubectl delete rayjob stepscope\n```\nand stepscope run", []),
    ],
    ids=["comment", "continued", "after-dashes", "in-a-sentence", "none"],
)
def test_commands_are_found(tmp_path, text, commands):
    (tmp_path / "page.md").write_text(text)
    assert commands_of(tmp_path / "page.md") == commands


@pytest.mark.parametrize(
    "words", [["run", "x.yaml", "--sett", "a=1"], ["submit", "x.yaml"], ["submitt"], ["vanish", "x"]]
)
def test_commands_that_do_not_exist_are_seen(words):
    with pytest.raises((AssertionError, CycloptsError)):
        parse(words)


def test_cluster_page_is_short_and_names_every_file_for_clusters():
    text = (ROOT / "docs" / "cluster.md").read_text()
    assert len(text.splitlines()) < 150
    for file in (ROOT / "configs" / "cluster").iterdir():
        assert f"configs/cluster/{file.name}" in text
    for file in ("rayjob.yaml", "ray_up.yaml", "slurm.sh"):
        assert "docs/cluster.md" in (ROOT / "configs" / "cluster" / file).read_text()


def test_settings_on_the_cluster_page_exist():
    named = re.findall(r"\b(run|model)\.(\w+)", (ROOT / "docs" / "cluster.md").read_text())
    assert len(set(named)) >= 6
    for section, name in named:
        assert name in {"run": RunConfig, "model": ModelConfig}[section].model_fields, name


def rooms() -> set[str]:
    """Return the files and folders that the table of rooms names; a bare name lies beside the one before it."""
    found, folder = set(), ""
    for cell in re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", cell):
            path = name if "/" in name else f"{folder}/{name}"
            folder = path.rsplit("/", 1)[0] if path.endswith(".py") else folder
            found.add(path.rstrip("/"))
    return found


def test_rooms_exist():
    assert [room for room in sorted(rooms()) if not (ROOT / room).exists()] == []


@pytest.mark.parametrize("folder", ["cluster", "interventions", "pipeline", "pipeline/store"])
def test_every_module_has_its_room(folder):
    there = {path for path in (ROOT / folder).iterdir() if path.name != "__pycache__"}
    modules = {path for path in there if path.suffix == ".py" and path.name != "__init__.py"}
    packages = {path for path in there if (path / "__init__.py").exists()} - {ROOT / "pipeline" / "store"}
    assert {str(path.relative_to(ROOT)) for path in modules | packages} <= rooms()


def test_make_targets_of_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"(?:^    |`)make ([\w-]+)", page.read_text(), flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_card_page_is_the_card():
    card = json.loads((ROOT / "pipeline" / "embedded" / "maze" / "model_card.json").read_text())
    assert (ROOT / "docs" / "model_card.md").read_text() == render(card)
