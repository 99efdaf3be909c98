"""Experiments: which fields are fixed and which swept, how ranges resolve, what is refused and in which words."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interventions.base import KINDS
from interventions.sites import Geometry
from pipeline.experiment import ExperimentError, Grid, parse, unknown

GEOMETRY = Geometry(steps=4, blocks=6, frames=5, given_frames=1, height=2, width=2)
RICH = replace(
    GEOMETRY,
    calls=(("cond",), ("uncond",)),
    heads=4,
    head_components=("attn1", "attn2"),
    knockout=("attn1", "attn2"),
)
"""A model that has what every kind's example asks for."""
GUIDED = Geometry(steps=4, blocks=6, frames=5, given_frames=0, height=2, width=2, calls=(("cond",), ("uncond",)))
PATCH = {"kind": "patch", "step": 0, "layer": 0}


def bind(raw: dict, geometry: Geometry = GEOMETRY) -> Grid:
    return parse("map", raw).bind(geometry)


def problems(raw: object, geometry: Geometry = GEOMETRY) -> list[tuple[str, str]]:
    with pytest.raises(ExperimentError) as caught:
        bind(raw, geometry)  # type: ignore[arg-type]
    return [(".".join(map(str, loc)), text) for loc, text in caught.value.problems]


class TestRanges:
    @pytest.mark.parametrize(
        ("text", "indices"),
        [
            pytest.param("all", (0, 1, 2, 3, 4, 5), id="all"),
            pytest.param(":", (0, 1, 2, 3, 4, 5), id="bare-colon"),
            pytest.param("2:", (2, 3, 4, 5), id="from"),
            pytest.param(":2", (0, 1), id="to"),
            pytest.param("2:4", (2, 3), id="from-to"),
            pytest.param("::2", (0, 2, 4), id="stride"),
            pytest.param("1:6:3", (1, 4), id="from-to-stride"),
            pytest.param("-2:", (4, 5), id="last-two"),
            pytest.param(":-4", (0, 1), id="all-but-last-four"),
            pytest.param("4:100", (4, 5), id="end-beyond-the-model"),
            pytest.param("::02", (0, 2, 4), id="stride-with-zero-in-front"),
        ],
    )
    def test_slice_of_layers(self, text, indices):
        assert bind({**PATCH, "layer": text}).axes == (("layer", indices),)

    @pytest.mark.parametrize(
        ("text", "indices"),
        [
            pytest.param("all", (1, 2, 3, 4), id="all-leaves-out-given-frames"),
            pytest.param(":", (1, 2, 3, 4), id="bare-colon-leaves-out-given-frames"),
            pytest.param("2:4", (2, 3), id="numbers-are-frame-indices"),
            pytest.param("0:2", (1,), id="given-frame-is-left-out"),
            pytest.param("-1:", (4,), id="last-frame"),
            pytest.param("::2", (1, 3), id="stride-from-the-first-generated"),
        ],
    )
    def test_slice_of_frames_is_in_frame_numbers(self, text, indices):
        assert bind({**PATCH, "frame": text}).axes == (("frame", indices),)

    @given(st.integers(-7, 7), st.integers(-7, 7), st.integers(1, 4))
    def test_slice_of_steps_agrees_with_python(self, start, stop, stride):
        expected = tuple(range(GEOMETRY.steps))[start:stop:stride]
        raw = {**PATCH, "step": f"{start}:{stop}:{stride}"}
        if expected:
            assert bind(raw).axes == (("step", expected),)
        else:
            assert problems(raw) == [("experiments.map.step", "selects nothing of steps 0 to 3")]

    @pytest.mark.parametrize("text", ["every", "1-3", "::0", "0:3:0", "1:2:3:4", "a:b", "::-1", "ALL"])
    def test_word_that_is_no_range_is_refused(self, text):
        (found,) = problems({**PATCH, "step": text})
        assert found[0] == "experiments.map.step"
        assert repr(text) in found[1]
        assert "`all` or a slice such as `2:8`" in found[1]

    def test_range_along_a_word_field_is_no_range(self):
        (found,) = problems({**PATCH, "component": "all"})
        assert found[1].startswith("Input should be 'residual', 'update'")


class TestGrid:
    def test_single_values_are_no_axes(self):
        grid = bind(PATCH)
        assert (grid.dims, grid.shape, grid.cells) == ((), (), 1)
        assert grid.intervention(()).model_dump()["layer"] == 0

    def test_list_of_one_is_an_axis(self):
        grid = bind({**PATCH, "layer": [3]})
        assert (grid.dims, grid.shape) == (("layer",), (1,))

    @pytest.mark.parametrize("order", list(itertools.permutations(["step", "layer", "component"])), ids="-".join)
    def test_axes_have_one_order_whatever_the_file_has(self, order):
        swept = {"step": "all", "layer": [1, 0], "component": ["ffn", "attn1"]}
        assert bind({"kind": "patch", **{k: swept[k] for k in order}}).dims == ("step", "layer", "component")

    def test_step_leads_even_if_another_field_comes_first_in_the_kind(self):
        assert bind({"kind": "step_skip", "mode": ["freeze", "drop"], "step": "all"}).dims == ("step", "mode")

    def test_values_keep_the_order_of_the_list(self):
        assert bind({**PATCH, "layer": [4, 0, 2]}).axes == (("layer", (4, 0, 2)),)

    def test_interventions_come_in_c_order(self):
        grid = bind({"kind": "patch", "step": [0, 1], "layer": [0, 1, 2]})
        assert [(i.step, i.layer) for i in grid.interventions()] == list(itertools.product([0, 1], [0, 1, 2]))

    def test_window_of_the_first_axis(self):
        grid = bind({"kind": "patch", "step": "all", "layer": [0, 1]})
        assert [(i.step, i.layer) for i in grid.interventions(range(1, 3))] == [(1, 0), (1, 1), (2, 0), (2, 1)]

    def test_position_and_iteration_agree(self):
        grid = bind({"kind": "patch", "step": "all", "layer": [5, 2], "alpha": [0, 0.5, 1]})
        by_position = [grid.intervention(i) for i in itertools.product(*(range(n) for n in grid.shape))]
        assert by_position == list(grid.interventions())
        assert len(by_position) == grid.cells == 24

    def test_whole_number_is_a_value_of_a_real_field(self):
        assert bind({**PATCH, "alpha": [0, 1]}).axes == (("alpha", (0.0, 1.0)),)

    @pytest.mark.parametrize("kind", sorted(KINDS))
    def test_example_of_every_kind_parses(self, kind):
        import yaml

        ((name, raw),) = yaml.safe_load(KINDS[kind].example).items()
        assert raw["kind"] == kind
        assert parse(name, raw).bind(RICH).cells > 1


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "where", "what"),
        [
            pytest.param(
                {"kind": "pach"}, ".kind", "unknown intervention 'pach': did you mean 'patch'?", id="kind-typo"
            ),
            pytest.param(
                {"kind": "zzz"},
                ".kind",
                "unknown intervention 'zzz': allowed: ablate, block_skip, compose",
                id="kind-unlike-any",
            ),
            pytest.param({"kind": ["patch"]}, ".kind", "unknown intervention ['patch']", id="kind-list"),
            pytest.param({"kind": {"a": 1}}, ".kind", "unknown intervention {'a': 1}", id="kind-mapping"),
            pytest.param({"kind": 3}, ".kind", "unknown intervention 3", id="kind-number"),
            pytest.param({"kind": None}, "", "kind is missing; allowed: ablate, block_skip, compose", id="kind-null"),
            pytest.param({"layr": 3}, ".layr", "unknown key 'layr': did you mean 'layer'?", id="key-typo"),
            pytest.param({"layer": "three"}, ".layer", "valid integer, got 'three'", id="word-for-integer"),
            pytest.param({"layer": 1.5}, ".layer", "valid integer, got 1.5", id="fraction-for-integer"),
            pytest.param({"layer": True}, ".layer", "valid integer, got True", id="boolean-for-integer"),
            pytest.param({"layer": "1"}, ".layer", "valid integer, got '1'", id="quoted-for-integer"),
            pytest.param({"layer": None}, ".layer", "valid integer, got None", id="null-for-required"),
            pytest.param({"layer": {"a": 1}}, ".layer", "valid integer, got {'a': 1}", id="mapping-for-integer"),
            pytest.param({"layer": [0, "x"]}, ".layer.1", "valid integer, got 'x'", id="word-in-a-list"),
            pytest.param({"layer": [0, True]}, ".layer.1", "valid integer, got True", id="boolean-in-a-list"),
            pytest.param({"layer": [[0]]}, ".layer.0", "valid integer, got [0]", id="list-in-a-list"),
            pytest.param({"layer": ["all"]}, ".layer.0", "valid integer, got 'all'", id="range-in-a-list"),
            pytest.param(
                {"layer": []}, ".layer", "an empty list sweeps nothing; give at least one value", id="empty-list"
            ),
            pytest.param({"layer": [2, 2]}, ".layer", "a value is listed twice: [2, 2]", id="value-twice"),
            pytest.param({"frame": [None, 1]}, ".frame", "null cannot be swept", id="null-in-a-list"),
            pytest.param({"alpha": 3}, ".alpha", "less than or equal to 2, got 3", id="above-a-bound"),
            pytest.param({"alpha": [-2, 1]}, ".alpha.0", "greater than or equal to -1, got -2", id="below-a-bound"),
            pytest.param({"alpha": True}, ".alpha", "valid number, got True", id="boolean-for-number"),
            pytest.param({"alpha": float("nan")}, ".alpha", "got nan", id="not-a-number"),
            pytest.param(
                {"alpha": "strong"}, ".alpha", "valid number, got 'strong'; a list sweeps it", id="word-for-number"
            ),
            pytest.param(
                {"component": "atn1"}, ".component", "'attn1', 'attn2' or 'ffn', got 'atn1'", id="component-typo"
            ),
            pytest.param(
                {"direction": "up"}, ".direction", "'denoising', 'noising' or 'self', got 'up'", id="direction"
            ),
            pytest.param({"step": -1}, ".step", "greater than or equal to 0, got -1", id="negative-step"),
            pytest.param(
                {"step": 4}, ".step", "4 is out of range; this model and sampler have steps 0 to 3", id="step-beyond"
            ),
            pytest.param({"step": [0, 9]}, ".step", "9 is out of range", id="step-beyond-in-a-list"),
            pytest.param({"step": "9:"}, ".step", "selects nothing of steps 0 to 3", id="slice-beyond"),
            pytest.param(
                {"layer": 6},
                ".layer",
                "6 is out of range; this model and sampler have layers 0 to 5",
                id="layer-beyond",
            ),
            pytest.param({"frame": 5}, ".frame", "have frames 1 to 4 (frame 0 is given)", id="frame-beyond"),
            pytest.param({"frame": 0}, ".frame", "0 is out of range", id="given-frame"),
            pytest.param(
                {"branch": "uncond"},
                ".branch",
                "branch 'uncond' is not computed by this sampler; it has cond, both",
                id="branch",
            ),
        ],
    )
    def test_one_fault_is_one_problem_at_its_key(self, change, where, what):
        (found,) = problems({**PATCH, **change})
        assert found[0] == f"experiments.map{where}"
        assert what in found[1]
        assert "\n" not in found[1]

    @pytest.mark.parametrize("raw", [None, 3, "patch", ["patch"]], ids=["nothing", "number", "word", "list"])
    def test_entry_that_is_no_mapping(self, raw):
        assert problems(raw) == [("experiments.map", f"expected a mapping with `kind`, got {raw!r}")]

    def test_missing_field_shows_an_example_of_the_kind(self):
        (found,) = problems({"kind": "patch", "step": 0})
        assert found[0] == "experiments.map"
        assert found[1] == f"layer is missing; example:\n{KINDS['patch'].example}"

    @pytest.mark.parametrize(
        ("raw", "what"),
        [
            pytest.param({"kind": "noise", "at": "step"}, "give step with `at: step`", id="noise-at-step-without-step"),
            pytest.param(
                {"kind": "noise", "at": "frame", "step": 0}, "give step with `at: step`", id="noise-at-frame-with-step"
            ),
            pytest.param(
                {"kind": "noise", "at": "step", "step": 0, "frame": 1},
                "and not the other",
                id="noise-with-step-and-frame",
            ),
            pytest.param(
                {"kind": "noise", "at": ["step", "frame"], "step": 0},
                "give step with `at: step`",
                id="noise-in-one-cell-of-two",
            ),
            pytest.param(
                {"kind": "frame_shuffle", "mode": "freeze", "step": 0},
                "frame is needed with `mode: freeze`",
                id="freeze-without-frame",
            ),
            pytest.param(
                {"kind": "frame_shuffle", "mode": "permute", "step": 0, "frame": 1},
                "has no meaning with the other modes",
                id="permute-with-frame",
            ),
            pytest.param(
                {"kind": "frame_shuffle", "mode": "reverse", "step": 0, "space": "hidden"},
                "layer is needed with `space: hidden`",
                id="hidden-without-layer",
            ),
            pytest.param(
                {"kind": "frame_shuffle", "mode": "reverse", "step": 0, "layer": 1},
                "no meaning with `space: latents`",
                id="latents-with-layer",
            ),
            pytest.param({"kind": "step_skip", "mode": "reuse", "step": 0}, "start at step 1", id="reuse-at-step-0"),
            pytest.param({"kind": "step_skip", "mode": "reuse", "step": "all"}, "start at step 1", id="reuse-at-all"),
        ],
    )
    def test_fields_that_do_not_fit_together_are_one_problem(self, raw, what):
        (found,) = problems(raw)
        assert found[0] == "experiments.map"
        assert what in found[1]

    def test_all_problems_come_at_once(self):
        found = problems({"kind": "patch", "stp": 1, "layer": ["x", "y"], "alpha": 9, "component": []})
        assert [where.removeprefix("experiments.map") for where, _ in found] == [
            ".stp", ".layer.0", ".layer.1", ".alpha", ".component", ""
        ]  # fmt: skip

    def test_all_indices_out_of_range_come_at_once(self):
        found = problems({"kind": "patch", "step": [0, 7, 8], "layer": 9})
        assert [text.split()[0] for _, text in found] == ["7", "8", "9"]

    def test_message_of_the_error_holds_every_problem(self):
        with pytest.raises(
            ExperimentError, match=r"experiments\.map\.step: 7 is out .*; experiments\.map\.layer: 9 is out"
        ):
            bind({"kind": "patch", "step": 7, "layer": 9})

    def test_branch_of_a_guided_sampler_is_accepted(self):
        assert bind({**PATCH, "branch": ["cond", "uncond", "both"]}, GUIDED).cells == 3

    def test_component_that_a_family_lacks(self):
        bare = Geometry(
            steps=4, blocks=2, frames=2, given_frames=0, height=1, width=1, components=("update", "residual")
        )
        (found,) = problems({**PATCH, "component": "ffn"}, bare)
        assert found == ("experiments.map.component", "unknown component 'ffn': allowed: update, residual")

    def test_several_given_frames_are_named(self):
        two = Geometry(steps=1, blocks=1, frames=4, given_frames=2, height=1, width=1)
        (found,) = problems({**PATCH, "frame": 1}, two)
        assert found[1].endswith("frames 2 to 3 (frames 0 to 1 are given)")

    def test_model_without_frames_of_its_own(self):
        still = Geometry(steps=1, blocks=1, frames=1, given_frames=1, height=1, width=1)
        (found,) = problems({**PATCH, "frame": 1}, still)
        assert found[1].endswith("this model and sampler have no frames")


@pytest.mark.parametrize(
    ("value", "known", "text"),
    [
        pytest.param(
            "stpes", ["steps", "seeds"], "unknown key 'stpes': did you mean 'steps'? allowed: steps, seeds", id="near"
        ),
        pytest.param("zzz", ["steps", "seeds"], "unknown key 'zzz': allowed: steps, seeds", id="far"),
        pytest.param(3, ["3d"], "unknown key 3: did you mean '3d'? allowed: 3d", id="number"),
    ],
)
def test_unknown_name_is_answered_with_the_nearest(value, known, text):
    assert unknown("key", value, known) == text
