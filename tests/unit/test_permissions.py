"""A config runs no code of its own: functions are metrics only where the command line names them."""

from __future__ import annotations

import hashlib
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import ConfigError, SweepConfig, validate
from pipeline.metrics.metric import METRICS, MetricInput
from pipeline.permissions import NOTHING, Permissions, PermissionsError, array_name
from pipeline.plan import make_plan
from pipeline.samples import Sample

CODE = '''\
"""Metrics of somebody's own."""

import numpy as np

LOADED = True


def brightness(given):
    """Mean of the video. More words."""
    return given.video.mean(axis=(1, 2, 3, 4)).astype(np.float64)


def single(given):
    return np.float32(given.latents.reshape(len(given.latents), -1).mean(axis=1))


def whole(given):
    return np.zeros(len(given.video), dtype=int)


def too_many(given):
    return np.zeros((len(given.video), 2))


def as_list(given):
    return [0.0] * len(given.video)


def nothing(given):
    return None


def writes(given):
    given.clean[:] = 0
    return np.zeros(len(given.video))


def brightness_by_step(given):
    return np.zeros(len(given.video))
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A package of the user's own in the current directory, which no other test has imported."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "metrics.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("raise RuntimeError('two\\nlines')\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "needs.py").write_text("import a_package_that_nobody_has\n")
    (tmp_path / "torch.py").write_text("raise RuntimeError('taken for the installed one')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    NOTHING.apply()
    for name in ("mine", "mine.metrics", "broken", "leaves", "needs"):
        sys.modules.pop(name, None)


def allow(*names):
    permissions = Permissions(metrics=names)
    permissions.apply()
    return permissions


def raw(*metrics):
    return {
        "name": "x",
        "model": {"id": "embedded:maze"},
        "task": {"name": "maze", "mazes": 1},
        "sampler": {"steps": 2},
        "metrics": list(metrics),
        "experiments": {"map": {"kind": "patch", "step": 0, "layer": 0, "component": "attn2"}},
    }


def given(rows=3, broken=()):
    video = np.full((rows, 2, 4, 4, 3), 100.0, dtype=np.float32)
    video[list(broken)] = np.nan
    latents = np.ones((rows, 3, 2, 4, 4), dtype=np.float32)
    sample = Sample(index=0, prompt="p", seed=0, pair="a/b", clean_prompt="a", corrupted_prompt="b")
    return MetricInput(video=video, latents=latents, clean=latents[0], corrupted=latents[0] * 0, sample=sample)


class TestConfig:
    def test_a_function_is_refused_with_the_words_that_allow_it(self, mine):
        with pytest.raises(ConfigError) as error:
            validate(raw("mine.metrics:brightness"), {("metrics", 0): 4}, "c.yaml")
        assert str(error.value) == (
            "c.yaml:4: metrics.0: 'mine.metrics:brightness' is a function of the user's own, and a config alone may "
            "not run code; if you trust it, add to the command: --allow-metric mine.metrics:brightness"
        )
        assert "mine" not in sys.modules

    def test_another_function_of_an_allowed_module_is_refused(self, mine):
        allow("mine.metrics:single")
        with pytest.raises(ConfigError, match=r"--allow-metric mine\.metrics:brightness"):
            validate(raw("mine.metrics:brightness"), {}, "c.yaml")

    def test_an_allowed_function_is_a_metric(self, mine):
        allow("mine.metrics:brightness")
        config = validate(raw("goal_evidence", "mine.metrics:brightness"), {}, "c.yaml")
        assert [m.name for m in make_plan(config).metrics] == ["goal_evidence", "mine_metrics_brightness"]

    def test_what_is_no_longer_allowed_is_no_metric(self, mine):
        allow("mine.metrics:brightness", "mine.metrics:single")
        allow("mine.metrics:single")
        assert [name for name in METRICS if name.startswith("mine")] == ["mine.metrics:single"]

    def test_the_metrics_of_this_package_stay(self, mine):
        before = set(METRICS)
        allow("mine.metrics:brightness")
        NOTHING.apply()
        assert set(METRICS) == before

    @pytest.mark.parametrize("name", ["os.system", "goal_evidenc", "mine:", ":f", "a b:c", "mine.metrics:f.g"])
    def test_what_names_no_function_is_an_unknown_metric(self, name):
        with pytest.raises(ConfigError, match="unknown metric"):
            validate(raw(name), {}, "c.yaml")


class TestIdentity:
    def config(self):
        return SweepConfig.model_validate(raw("mine.metrics:brightness"))

    def test_name_and_source_belong_to_it(self, mine):
        allow("mine.metrics:brightness")
        identity = self.config().identity()
        assert identity["metrics"] == ["mine.metrics:brightness"]
        source = hashlib.sha256((mine / "mine" / "metrics.py").read_bytes()).hexdigest()
        assert identity["metric_sources"] == {"mine.metrics:brightness": source}

    def test_a_changed_function_is_another_sweep(self, mine):
        allow("mine.metrics:brightness")
        before = self.config().hash()
        (mine / "mine" / "metrics.py").write_text(CODE.replace("mean(", "sum("))
        NOTHING.apply()
        del sys.modules["mine.metrics"]
        allow("mine.metrics:brightness")
        assert self.config().hash() != before

    def test_without_functions_nothing_is_added(self):
        assert "metric_sources" not in SweepConfig.model_validate(raw("solved")).identity()

    def test_the_definition_says_where_it_comes_from(self, mine):
        allow("mine.metrics:brightness")
        metric = METRICS["mine.metrics:brightness"]
        assert metric.description.startswith("Mean of the video. More words. Function mine.metrics:brightness of the")
        assert metric.source in metric.description
        assert metric.long_name == "brightness"

    def test_a_function_from_another_module_counts_with_both_files(self, mine):
        (mine / "mine" / "front.py").write_text("from mine.metrics import brightness\n")
        allow("mine.front:brightness")
        first = METRICS["mine.front:brightness"].source
        (mine / "mine" / "metrics.py").write_text(CODE + "\n")
        NOTHING.apply()
        allow("mine.front:brightness")
        assert METRICS["mine.front:brightness"].source != first
        sys.modules.pop("mine.front")


REFUSED = [
    pytest.param("mine", r"'mine' names no function\. Write it as package\.module:function\.", id="no-function"),
    pytest.param("a-b:c", "names no function", id="no-identifier"),
    pytest.param("nowhere.at_all:f", r"there is no module nowhere\.at_all, neither installed nor in /", id="no-module"),
    pytest.param("mine.nothing:f", r"there is no module mine\.nothing", id="no-submodule"),
    pytest.param("needs:f", r"needs a_package_that_nobody_has, which is not installed", id="missing-dependency"),
    pytest.param("broken:f", r"importing broken raised RuntimeError: two lines\. Import it", id="raises"),
    pytest.param("leaves:f", r"importing leaves raised SystemExit: 3", id="exits"),
    pytest.param("mine.metrics:brightnes", r"brightnes is not there .* Did you mean 'brightness'\?", id="typo"),
    pytest.param("mine.metrics:LOADED", r"LOADED is no function in mine\.metrics", id="no-callable"),
]


@pytest.mark.parametrize(("name", "message"), REFUSED)
def test_what_cannot_be_allowed_is_one_sentence(mine, name, message):
    with pytest.raises(PermissionsError, match=message) as error:
        allow(name)
    assert "\n" not in str(error.value)


def test_a_file_that_lies_there_is_not_taken_for_an_installed_module(mine):
    allow("mine.metrics:brightness")
    assert sys.path[-1] == str(mine)
    assert not str(sys.modules["torch"].__file__).startswith(str(mine))


def test_modules_are_found_where_the_command_ran(mine, tmp_path_factory, monkeypatch):
    """A replica's own directory is another one."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    Permissions(metrics=("mine.metrics:brightness",), folder=str(mine)).apply()
    assert "mine.metrics:brightness" in METRICS


class TestValues:
    def compute(self, name, rows=3, broken=()):
        allow(name)
        return METRICS[name].compute(given(rows, broken))

    @pytest.mark.parametrize(("name", "value"), [("brightness", 100.0), ("single", 1.0)], ids=["double", "single"])
    def test_one_number_a_row(self, mine, name, value):
        values = self.compute(f"mine.metrics:{name}")
        assert values.dtype == np.float64
        assert values.tolist() == [value] * 3

    def test_rows_that_are_not_finite_are_left_out(self, mine):
        values = self.compute("mine.metrics:brightness", rows=4, broken=(1,))
        assert np.isnan(values).tolist() == [False, True, False, False]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("whole", r"metric mine\.metrics:whole returned shape \(3,\) of int64 for 3 rows\. Return one floating"),
            ("too_many", r"returned shape \(3, 2\) of float64 for 3 rows"),
            ("as_list", r"returned list, not an array\. Return one floating number a row"),
            ("nothing", r"returned NoneType, not an array"),
            ("writes", r"read-only"),
        ],
    )
    def test_anything_else_is_refused(self, mine, name, message):
        with pytest.raises(ValueError, match=message):
            self.compute(f"mine.metrics:{name}")


class TestArrays:
    def test_colon_and_dots_become_underscores(self):
        assert array_name("a.b_c:d") == "a_b_c_d"

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            pytest.param(
                ("mine.metrics:brightness", "mine.metrics:brightness_by_step"),
                "mine_metrics_brightness_by_step, which is the name of mine.metrics:brightness",
                id="by-step-array",
            ),
            pytest.param(("goal:evidence",), "goal_evidence, which is the name of goal_evidence", id="own-metric"),
            pytest.param(("donor:sample",), "donor_sample, which is the name of an array of every store", id="axis"),
        ],
    )
    def test_two_arrays_of_one_name_are_refused(self, mine, names, message):
        (mine / "goal.py").write_text("def evidence(given): ...\n")
        (mine / "donor.py").write_text("def sample(given): ...\n")
        with pytest.raises(PermissionsError, match=message):
            allow(*names)
        for name in ("goal", "donor"):
            sys.modules.pop(name, None)

    def test_the_same_function_under_two_spellings_is_refused(self, mine):
        (mine / "mine_metrics.py").write_text("def brightness(given): ...\n")
        with pytest.raises(PermissionsError, match=r"which is the name of mine\.metrics:brightness"):
            allow("mine.metrics:brightness", "mine_metrics:brightness")
        sys.modules.pop("mine_metrics")


class TestPermissions:
    def test_nothing_is_allowed_by_default(self):
        assert (NOTHING.metrics, NOTHING.pickled_weights) == ((), False)

    def test_they_travel(self):
        permissions = Permissions(metrics=("a:b",), pickled_weights=True, folder="/x")
        assert pickle.loads(pickle.dumps(permissions)) == permissions

    @pytest.mark.parametrize(
        ("permissions", "words"),
        [
            (NOTHING, []),
            (Permissions(pickled_weights=True), ["--allow-pickled-weights"]),
            (Permissions(metrics=("a:b", "c:d")), ["--allow-metric", "a:b", "--allow-metric", "c:d"]),
        ],
        ids=["nothing", "weights", "metrics"],
    )
    def test_as_the_words_of_a_command(self, permissions, words):
        assert permissions.options() == words

    def test_a_plan_carries_them(self, mine):
        permissions = replace(allow("mine.metrics:brightness"), folder=str(mine))
        config = validate(raw("mine.metrics:brightness"), {}, "c.yaml")
        assert make_plan(config, permissions=permissions).permissions is permissions
