"""The listing commands and the check of a model, through the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from interventions.base import KINDS
from interventions.families.family import FAMILIES
from pipeline.cli import BAD_INPUT, FAILED, OK, main
from pipeline.embedded.planted import PLANTED
from pipeline.listing import type_name
from pipeline.metrics.metric import METRICS
from tests.sweep_fixture import save_tiny_model, tiny_config, write_config

ROOT = Path(__file__).parents[2]


class TestLists:
    def test_models(self, capsys):
        assert main(["models"]) == OK
        text = capsys.readouterr().out
        assert "embedded:maze: WanImageToVideoPipeline, 6 blocks" in text
        assert "  pipelines: WanPipeline, WanImageToVideoPipeline" in text
        assert "transformer.blocks: attn1, attn2, ffn, update, residual; heads of attn1, attn2" in text

    @pytest.mark.parametrize("name", sorted(FAMILIES))
    def test_every_family_says_what_it_covers_and_where_it_can_be_edited(self, name, capsys):
        main(["models"])
        text = capsys.readouterr().out
        entry = re.search(rf"^family {name}: (.+)\n((?:  .*\n)+)", text, re.MULTILINE)
        assert entry
        assert entry[1] == FAMILIES[name].title != ""
        assert all(pipeline in entry[2] for pipeline in FAMILIES[name].pipelines)

    def test_planted_models_say_what_is_planted(self, capsys):
        main(["models"])
        text = capsys.readouterr().out
        assert len(PLANTED) >= 4
        assert all(f"  {planted.name}: {planted.mechanism}" in text for planted in PLANTED.values())

    def test_tasks_with_every_setting_and_metric(self, capsys):
        assert main(["tasks"]) == OK
        text = capsys.readouterr().out
        assert "maze: 5x5 mazes" in text
        for setting in ("mazes", "pairs", "seeds", "first_maze", "balanced"):
            assert f"  {setting} = " in text
        assert all(f"  {name} (" in text for name in METRICS)

    def test_interventions_each_in_a_sentence_and_a_formula_of_one_line(self, capsys):
        assert main(["interventions"]) == OK
        lines = capsys.readouterr().out.splitlines()
        for kind, cls in KINDS.items():
            at = next(i for i, line in enumerate(lines) if line.startswith(f"{kind}: "))
            assert lines[at].endswith(".")
            assert lines[at + 1] == f"  formula: {cls.formula}"
        assert len(lines) == 2 * len(KINDS) + 1

    @pytest.mark.parametrize("kind", sorted(KINDS))
    def test_one_intervention_with_its_settings_and_an_example_that_plans(self, kind, tmp_path, capsys):
        assert main(["interventions", kind]) == OK
        text = capsys.readouterr().out
        for field in KINDS[kind].model_fields:
            assert field == "kind" or f"  {field}: " in text
        assert "Annotated" not in text
        (block,) = re.findall(r"  example:\n((?:    .*\n)+)", text)
        config = tiny_config(Path("embedded:maze"), experiments=yaml.safe_load(block))
        config |= {"task": {"name": "maze", "mazes": 9}, "sampler": {"steps": 20, "guidance_scale": 2.0}}
        path = write_config(tmp_path / "c.yaml", config)
        assert main(["plan", str(path), "--no-calibrate"]) == OK, capsys.readouterr().err

    def test_an_intervention_that_does_not_exist(self, capsys):
        assert main(["interventions", "pach"]) == BAD_INPUT
        assert "unknown intervention 'pach': did you mean 'patch'?" in capsys.readouterr().err

    @pytest.mark.parametrize("command", ["models", "tasks", "interventions"])
    def test_lists_go_to_standard_output(self, command, capsys):
        main([command])
        captured = capsys.readouterr()
        assert captured.out
        assert captured.err == ""

    def test_a_reader_that_has_seen_enough_is_no_error(self, tmp_path):
        shell = f"{sys.executable} -m pipeline.cli models | head -1"
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.stdout.startswith("embedded:maze")
        assert "BrokenPipe" not in done.stderr

    @pytest.mark.parametrize(
        ("annotation", "name"),
        [
            pytest.param(int | None, "int", id="optional"),
            pytest.param(str, "str", id="plain"),
            pytest.param(dict[str, int], "dict[str, int]", id="generic"),
        ],
    )
    def test_types_are_written_as_a_user_would(self, annotation, name):
        assert type_name(annotation) == name


class TestCheck:
    def test_a_sound_model_passes_with_guidance_and_without(self, tmp_path, capsys):
        assert main(["check", str(save_tiny_model(tmp_path / "model")), "--device", "cpu"]) == OK
        text = capsys.readouterr().out
        assert "WanImageToVideoPipeline, family wan, FlowMatchEulerDiscreteScheduler" in text
        rows = [line.split() for line in text.splitlines() if line.split()[:1] in (["on"], ["off"])]
        assert {row[0] for row in rows} == {"on", "off"}
        assert len(rows) == 20
        assert all("pass" in row for row in rows)

    def test_a_failing_control_is_in_the_table_and_in_the_exit_code(self, tmp_path, capsys, monkeypatch):
        from dataclasses import replace

        from interventions.families import family

        folder = save_tiny_model(tmp_path / "model")
        wrong = replace(FAMILIES["wan"], patch=lambda config: (1, 1, 2))
        monkeypatch.setitem(family.FAMILIES, "wan", wrong)
        assert main(["check", str(folder), "--device", "cpu"]) == FAILED
        text = capsys.readouterr().out
        assert re.search(r"one latent frame is its slice of tokens +FAIL  \d+ of 0", text)

    @pytest.mark.parametrize(
        ("model", "says"),
        [
            pytest.param("embedded:mazes", "Did you mean 'embedded:maze'", id="typo"),
            pytest.param("/no/such/folder", "unknown model", id="no-folder"),
        ],
    )
    def test_a_model_that_is_not_there(self, model, says, capsys):
        assert main(["check", model]) == BAD_INPUT
        assert says in capsys.readouterr().err
