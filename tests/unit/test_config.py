"""The config: what is refused and in which words, all at once with file and line, and what its identity is."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import ConfigError, SweepConfig, load_config, validate
from pipeline.metrics.metric import METRICS
from pipeline.plan import make_plan

DEMO = Path(__file__).parents[2] / "configs" / "maze_demo.yaml"

TINY = """\
name: tiny
model:
  id: embedded:maze
task:
  name: maze
  mazes: 1
sampler:
  steps: 3
metrics: [goal_evidence]
experiments:
  map:
    kind: patch
    step: all
    layer: [0]
previews:
  samples: [0]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def bound(folder: Path, text: str, *overrides: str) -> SweepConfig:
    """Load and bind to the model, as every command does."""
    path = write(folder, text)
    config = load_config(path, overrides)
    make_plan(config, path, overrides)
    return config


def refusal(folder: Path, text: str, *overrides: str) -> list[str]:
    """Return the lines of the error, with ``c.yaml`` for the path."""
    with pytest.raises(ConfigError) as caught:
        bound(folder, text, *overrides)
    return str(caught.value).replace(str(folder / "c.yaml"), "c.yaml").splitlines()


ONE_FAULT = [
    pytest.param("name: tiny", "nam: tiny", [1, 0], "unknown key 'nam': did you mean 'name'?", id="key-typo-top"),
    pytest.param(
        "  steps: 3",
        "  stpes: 3",
        [8],
        "sampler.stpes: unknown key 'stpes': did you mean 'steps'?",
        id="key-typo-sampler",
    ),
    pytest.param(
        "  mazes: 1", "  maze: 1", [6], "task.maze: unknown key 'maze': did you mean 'mazes'?", id="key-typo-task"
    ),
    pytest.param(
        "  id: e",
        "  dtyp: float32\n  id: e",
        [3],
        "model.dtyp: unknown key 'dtyp': did you mean 'dtype'?",
        id="key-typo-model",
    ),
    pytest.param(
        "    layer",
        "    layr: 3\n    layer",
        [14],
        "experiments.map.layr: unknown key 'layr'",
        id="key-typo-experiment",
    ),
    pytest.param(
        "  steps: 3",
        "  steps: many",
        [8],
        "sampler.steps: Input should be a valid integer, got 'many'",
        id="word-for-integer",
    ),
    pytest.param(
        "  steps: 3",
        "  steps: '3'",
        [8],
        "sampler.steps: Input should be a valid integer, got '3'",
        id="quoted-for-integer",
    ),
    pytest.param(
        "  steps: 3",
        "  steps: true",
        [8],
        "sampler.steps: Input should be a valid integer, got True",
        id="boolean-for-integer",
    ),
    pytest.param(
        "  steps: 3",
        "  steps: 3.5",
        [8],
        "sampler.steps: Input should be a valid integer, got 3.5",
        id="fraction-for-integer",
    ),
    pytest.param("  steps: 3", "  steps: 12:30", [8], "got '12:30'", id="clock-time-for-integer"),
    pytest.param(
        "  steps: 3",
        "  steps:",
        [8],
        "sampler.steps: Input should be a valid integer, got None",
        id="nothing-for-integer",
    ),
    pytest.param(
        "  steps: 3",
        "  steps: 0",
        [8],
        "sampler.steps: Input should be greater than or equal to 1, got 0",
        id="no-steps",
    ),
    pytest.param(
        "  steps: 3", "  steps: 1001", [8], "sampler.steps: Input should be less than or equal to 1000", id="many-steps"
    ),
    pytest.param("  steps: 3", "  guidance_scale: no", [8], "valid number, got 'no'", id="no-is-not-zero"),
    pytest.param(
        "sampler:\n  steps: 3",
        "sampler: 3",
        [7],
        "sampler: expected a mapping of settings, got 3",
        id="number-for-section",
    ),
    pytest.param(
        "sampler:\n  steps: 3",
        "sampler: [3]",
        [7],
        "sampler: expected a mapping of settings, got [3]",
        id="list-for-section",
    ),
    pytest.param(
        "sampler:\n  steps: 3",
        "sampler:",
        [7],
        "sampler: expected a mapping of settings, got None",
        id="nothing-for-section",
    ),
    pytest.param(
        "  id: embedded:maze", "  id: 3", [3], "model.id: Input should be a valid string, got 3", id="number-for-word"
    ),
    pytest.param(
        "  id: e", "  dtype: float8\n  id: e", [3], "'float32', 'bfloat16' or 'float16', got 'float8'", id="dtype"
    ),
    pytest.param("  id: e", "  device: gpu\n  id: e", [3], "'auto', 'cpu' or 'cuda', got 'gpu'", id="device"),
    pytest.param("model:\n  id: embedded:maze\n", "", [0], "config: model is missing", id="model-missing"),
    pytest.param("  id: embedded:maze", "  dtype: float32", [2], "model: id is missing", id="model-id-missing"),
    pytest.param("name: tiny", "name: a/b", [1], "name: String should match pattern", id="name-with-slash"),
    pytest.param("name: tiny", "name: 12:30", [1], "name: String should match pattern", id="name-clock-time"),
    pytest.param("name: tiny", "name: 3", [1], "name: Input should be a valid string, got 3", id="name-number"),
    pytest.param(
        "  name: maze\n",
        "  name: mase\n",
        [5],
        "task.name: unknown task 'mase': did you mean 'maze'? allowed: maze",
        id="task-typo",
    ),
    pytest.param("  name: maze\n", "  name: [maze]\n", [5], "task.name: unknown task ['maze']", id="task-list"),
    pytest.param("  name: maze\n", "  name: {a: 1}\n", [5], "task.name: unknown task {'a': 1}", id="task-mapping"),
    pytest.param("  name: maze\n", "", [4], "task: name is missing; allowed: maze", id="task-name-missing"),
    pytest.param("task:\n  name: maze\n  mazes: 1\n", "", [0], "config: task is missing", id="task-missing"),
    pytest.param(
        "  mazes: 1",
        "  mazes: 0",
        [6],
        "task.mazes: Input should be greater than or equal to 1, got 0",
        id="zero-samples",
    ),
    pytest.param(
        "  mazes: 1",
        "  seeds: 0",
        [6],
        "task.seeds: Input should be greater than or equal to 1, got 0",
        id="zero-seeds",
    ),
    pytest.param("  mazes: 1", "  pairs: []", [6], "task.pairs: give at least one, got []", id="zero-pairs"),
    pytest.param(
        "  mazes: 1", "  pairs: red/blue", [6], "task.pairs: expected a list, got 'red/blue'", id="pairs-word"
    ),
    pytest.param("  mazes: 1", "  pairs: [red/red]", [6], "pair 'red/red' is not clean/corrupted", id="pair-of-one"),
    pytest.param("  mazes: 1", "  pairs: [any/red]", [6], "for example red/blue or red/any", id="pair-ambiguous-clean"),
    pytest.param("  mazes: 1", "  pairs: [red]", [6], "pair 'red' is not clean/corrupted", id="pair-half"),
    pytest.param(
        "  mazes: 1",
        "  first_maze: -1",
        [6],
        "task.first_maze: Input should be greater than or equal to 0",
        id="first-maze",
    ),
    pytest.param("  mazes: 1", "  balanced: off", [6], "'yes', 'no' or 'either', got 'off'", id="balanced-off"),
    pytest.param("  mazes: 1", "  balanced: true", [6], "'yes', 'no' or 'either', got True", id="balanced-true"),
    pytest.param(
        "[goal_evidence]",
        "[goal_evidnce]",
        [9],
        "metrics.0: unknown metric 'goal_evidnce': did you mean 'goal_evidence'?",
        id="metric-typo",
    ),
    pytest.param("[goal_evidence]", "[3]", [9], "metrics.0: Input should be a valid string, got 3", id="metric-number"),
    pytest.param("[goal_evidence]", "[]", [9], "metrics: give at least one, got []", id="no-metrics"),
    pytest.param(
        "[goal_evidence]", "goal_evidence", [9], "metrics: expected a list, got 'goal_evidence'", id="metrics-word"
    ),
    pytest.param("[goal_evidence]", "[solved, solved]", [9], "metrics: a metric is listed twice", id="metric-twice"),
    pytest.param("metrics: [goal_evidence]\n", "", [0], "config: metrics is missing", id="metrics-missing"),
    pytest.param(
        "kind: patch",
        "kind: pach",
        [12],
        "experiments.map.kind: unknown intervention 'pach': did you mean 'patch'?",
        id="kind-typo",
    ),
    pytest.param(
        "kind: patch", "kind: [patch]", [12], "experiments.map.kind: unknown intervention ['patch']", id="kind-list"
    ),
    pytest.param("    kind: patch\n", "", [11], "experiments.map: kind is missing; allowed:", id="kind-missing"),
    pytest.param(
        "  map:", "  effects:", [11], "an experiment cannot be named 'effects'", id="experiment-reserved-name"
    ),
    pytest.param("  map:", "  a/b:", [11], "an experiment cannot be named 'a/b'", id="experiment-with-slash"),
    pytest.param("  map:", "  __map:", [11], "an experiment cannot be named '__map'", id="experiment-zarr-reserved"),
    pytest.param("  map:", "  größe:", [11], "an experiment cannot be named 'größe'", id="experiment-umlaut"),
    pytest.param(
        "step: all",
        "step: 3",
        [13],
        "experiments.map.step: 3 is out of range; this model and sampler have steps 0 to 2",
        id="step-range",
    ),
    pytest.param(
        "step: all",
        "step: every",
        [13],
        "got 'every'; a list sweeps it, `all` or a slice such as `2:8` too",
        id="step-word",
    ),
    pytest.param(
        "step: all", "step: '5:'", [13], "experiments.map.step: selects nothing of steps 0 to 2", id="step-slice-beyond"
    ),
    pytest.param(
        "[0]\np", "[0, 99]\np", [14], "99 is out of range; this model and sampler have layers 0 to 5", id="layer-range"
    ),
    pytest.param("[0]\np", "[]\np", [14], "experiments.map.layer: an empty list sweeps nothing", id="empty-axis"),
    pytest.param("[0]\np", "[0]\n    frame: 9\np", [15], "have frames 1 to 5 (frame 0 is given)", id="frame-range"),
    pytest.param(
        "[0]\np",
        "[0]\n    branch: uncond\np",
        [15],
        "branch 'uncond' is not computed by this sampler",
        id="branch-without-guidance",
    ),
    pytest.param(
        "[0]\np", "[0]\n    component: atn1\np", [15], "'attn1', 'attn2' or 'ffn', got 'atn1'", id="component-typo"
    ),
    pytest.param(
        "patch\n    step: all\n    layer: [0]",
        "noise\n    at: step",
        [11],
        "give step with `at: step`",
        id="noise-without-step",
    ),
    pytest.param(
        "patch\n    step: all\n    layer: [0]",
        "frame_shuffle\n    mode: freeze\n    step: 0",
        [11],
        "frame is needed with `mode: freeze`",
        id="freeze-without-frame",
    ),
    pytest.param(
        "patch\n    step: all\n    layer: [0]",
        "step_skip\n    mode: reuse\n    step: all",
        [11],
        "start at step 1",
        id="reuse-at-step-0",
    ),
    pytest.param(
        "samples: [0]",
        "samples: [1]",
        [16],
        "previews.samples.0: sample 1 does not exist; there are samples 0 to 0",
        id="preview-beyond",
    ),
    pytest.param(
        "samples: [0]",
        "samples: [-1]",
        [16],
        "previews.samples.0: Input should be greater than or equal to 0",
        id="preview-negative",
    ),
    pytest.param(
        "samples: [0]",
        "samples: [0, 0]",
        [16],
        "previews.samples: a sample is listed twice: [0, 0]",
        id="preview-twice",
    ),
    pytest.param("samples: [0]", "samples: 0", [16], "previews.samples: expected a list, got 0", id="preview-number"),
    pytest.param(
        "samples: [0]",
        "patched: 3",
        [16],
        "previews.patched: expected a mapping of settings, got 3",
        id="patched-number",
    ),
    pytest.param(
        "samples: [0]",
        "patched: {kind: pach}",
        [16],
        "previews.patched.kind: unknown intervention 'pach'",
        id="patched-kind",
    ),
    pytest.param(
        "samples: [0]",
        "patched: {kind: patch, step: 9, layer: 0}",
        [16],
        "previews.patched.step: 9 is out of range",
        id="patched-step",
    ),
    pytest.param(
        "samples: [0]",
        "patched: {kind: patch, step: all, layer: 0}",
        [16],
        "describes 3 interventions; give exactly one",
        id="patched-many",
    ),
    pytest.param(
        "name: tiny",
        "name: tiny\nunit_cells: 0",
        [2],
        "unit_cells: Input should be greater than or equal to 1",
        id="unit-cells",
    ),
    pytest.param(
        "name: tiny",
        "name: tiny\nengine: {batch_rows: 0}",
        [2],
        "engine.batch_rows: use a whole number from 1 on, or auto, got 0",
        id="batch-rows",
    ),
    *(
        pytest.param(
            "name: tiny",
            f"name: tiny\nengine: {{batch_rows: {given}}}",
            [2],
            f"engine.batch_rows: use a whole number from 1 on, or auto, got {got}",
            id=f"batch-rows-{name}",
        )
        for given, got, name in (("many", "'many'", "word"), ("2.0", "2.0", "fraction"), ("true", "True", "truth"))
    ),
    pytest.param(
        "name: tiny",
        "name: tiny\nrun: {replicas: -1}",
        [2],
        "run.replicas: Input should be greater",
        id="replicas-negative",
    ),
    pytest.param(
        "name: tiny",
        "name: tiny\nrun: {max_attempts: 0}",
        [2],
        "run.max_attempts: Input should be greater",
        id="no-attempts",
    ),
    pytest.param(
        "name: tiny",
        "name: tiny\nrun: {gpus_per_replica: 1.5}",
        [2],
        "run.gpus_per_replica: use a share of one GPU or whole ones, got 1.5",
        id="one-gpu-and-a-half",
    ),
    pytest.param(
        "name: tiny",
        "name: tiny\nrun: {gpus_per_replica: .inf}",
        [2],
        "run.gpus_per_replica: use a share of one GPU or whole ones, got inf",
        id="endless-gpus",
    ),
    pytest.param(
        "name: tiny",
        "name: tiny\nrun: {drain_s: .inf}",
        [2],
        "run.drain_s: Input should be less than or equal to 1000000, got inf",
        id="drain-for-ever",
    ),
    pytest.param(
        "name: tiny",
        "name: tiny\nrun: {notices: [aws, azur]}",
        [2],
        "run.notices.1: no source of notices is called 'azur'. Use aws, gcp, azure or file:PATH.",
        id="notice-typo",
    ),
]


@pytest.mark.parametrize(("old", "new", "lines", "message"), ONE_FAULT)
def test_one_fault_is_named_with_line_and_key_path(tmp_path, old, new, lines, message):
    assert TINY.count(old) == 1, "the fault must be put in exactly one place"
    found = refusal(tmp_path, TINY.replace(old, new))
    assert len(found) == len(lines)
    assert any(message in text for text in found)
    assert sorted(text.split(": ")[0] for text in found) == sorted(f"c.yaml:{n}" if n else "c.yaml" for n in lines)


def test_tiny_config_is_good(tmp_path):
    assert bound(tmp_path, TINY).sampler.steps == 3


def test_demo_config_is_good():
    plan = make_plan(load_config(DEMO), DEMO)
    assert [g.experiment.name for g in plan.grids] == list(plan.config.experiments)
    assert len(plan.samples) == 16


# ruff: noqa: E501 (messages as they are)
GOLDEN = """\
--set: run.replicas: Input should be greater than or equal to 0, got -3
c.yaml: config: metrics is missing
c.yaml:1: nmae: unknown key 'nmae': did you mean 'name'? allowed: name, model, task, sampler, engine, metrics, experiments, previews, unit_cells, run
c.yaml:4: model.dtype: Input should be 'float32', 'bfloat16' or 'float16', got 'float8'
c.yaml:7: task.mazes: Input should be greater than or equal to 1, got 0
c.yaml:8: task.pairs: pair 'red/green' is not clean/corrupted with clean in red, blue and corrupted another of red, blue, any; \
for example red/blue or red/any, got ['red/green']
c.yaml:10: sampler.steps: Input should be a valid integer, got 'many'
c.yaml:13: experiments.map.kind: unknown intervention 'pach': did you mean 'patch'? allowed: ablate, block_skip, compose, frame_shuffle, hidden_noise, knockout, latent_noise, latent_swap, noise, patch, prompt_swap, seed_ensemble, steer, step_skip
c.yaml:17: experiments.skip.step.1: Input should be a valid integer, got 'x'; a list sweeps it, `all` or a slice such as `2:8` too
c.yaml:19: experiments.shuffle.mode: an empty list sweeps nothing; give at least one value"""

FAULTY = """\
nmae: tiny
model:
  id: embedded:maze
  dtype: float8
task:
  name: maze
  mazes: 0
  pairs: [red/green]
sampler:
  steps: many
experiments:
  map:
    kind: pach
  skip:
    kind: step_skip
    mode: [drop]
    step: [0, x]
  shuffle: {kind: frame_shuffle, step: 0,
    mode: []}
"""


def test_all_faults_are_reported_at_once_in_the_order_of_the_file(tmp_path):
    found = refusal(tmp_path, FAULTY, "run.replicas=-3", "name=again")
    assert "\n".join(found) == GOLDEN


def test_all_indices_and_previews_out_of_range_are_reported_at_once(tmp_path):
    text = TINY.replace("step: all", "step: 7").replace("[0]\np", "[8]\np").replace("samples: [0]", "samples: [3, 4]")
    text += "  patched: {kind: patch, step: 9, layer: 0}\n"
    keys = [line.split(": ")[1] for line in refusal(tmp_path, text)]
    assert keys == [
        "experiments.map.step",
        "experiments.map.layer",
        "previews.samples.0",
        "previews.samples.1",
        "previews.patched.step",
    ]


def test_an_unknown_task_does_not_make_its_metrics_unknown(tmp_path):
    (found,) = refusal(tmp_path, TINY.replace("  name: maze\n", "  name: mase\n"))
    assert "metric" not in found


def test_faults_of_a_missing_section_do_not_hide_others(tmp_path):
    found = refusal(
        tmp_path, TINY.replace("  mazes: 1", "  mazes: 0").replace("experiments:\n  map:", "experiments:\n  Map!:")
    )
    assert [text.split(": ")[1] for text in found] == ["task.mazes", "experiments.Map!"]


def test_config_is_frozen(tmp_path):
    config = bound(tmp_path, TINY)
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"


def test_settings_without_a_file_are_refused_with_the_given_name():
    with pytest.raises(ConfigError) as caught:
        validate({}, {}, "here")
    assert "here: config: name is missing" in str(caught.value).splitlines()


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_for_mazes_can_be_asked_for(tmp_path, name):
    assert bound(tmp_path, TINY, f"metrics=[{name}]").metrics == (name,)


def test_missing_config_file_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=rf"^cannot read config {tmp_path}/no\.yaml: No such file or directory$"):
        load_config(tmp_path / "no.yaml")
