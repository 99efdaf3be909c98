"""The report: complete and self-contained on a whole store, honest on an incomplete one, right about what it draws."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from pipeline.effects import compute_effects
from pipeline.report import films, tables, write_report
from pipeline.report.content import Sweep, in_order
from pipeline.report.figures import experiment_pictures, file_name, run_levels, symmetric_norm
from pipeline.report.views import combinations, main_estimand, reference_of, strongest, ticks, view_of
from tests.store_fixture import PAIRS, Planted, Shape, write_store

SMALL = Shape(prompts=6, seeds=2, steps=5, layers=3, frames=4)
METRIC = "goal_match"
PNG = b"\x89PNG\r\n\x1a\n"


class Outline(HTMLParser):
    """Collects what the tests ask of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.summaries = re.findall(r"<summary>(.*?)</summary>", page)
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if found.get("id"):
            self.ids.add(str(found["id"]))
        if tag == "a":
            self.links.append(str(found["href"]))
        if tag == "img":
            self.images.append(found)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A noisy store with failed and pending units, and its effects."""
    found = write_store(tmp_path_factory.mktemp("store") / "run.zarr", SMALL)
    compute_effects(found.path, replicates=200)
    return found


@pytest.fixture(scope="module")
def report(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of that store."""
    return write_report(planted.path, tmp_path_factory.mktemp("report") / "out")


@pytest.fixture(scope="module")
def outline(report: Path) -> Outline:
    return Outline(report.read_text(encoding="utf-8"))


@pytest.fixture
def sweep(planted: Planted) -> Sweep:
    return Sweep.read(planted.path)


def without(planted: Planted, target: Path, *groups: str) -> Path:
    """Copy the store and take groups away."""
    shutil.copytree(planted.path, target)
    for group in groups:
        shutil.rmtree(target / group)
    return target


def test_the_page_needs_nothing_else(report: Path, outline: Outline) -> None:
    page = report.read_text(encoding="utf-8")
    assert report.name == "report.html"
    assert not {"script", "link", "iframe"} & set(outline.tags)
    assert "http://" not in page
    assert "https://" not in page
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in outline.images)


def test_every_figure_is_embedded_described_and_lies_beside_the_page(report: Path, outline: Outline) -> None:
    files = {f.read_bytes() for f in report.parent.glob("*.png")}
    embedded = [base64.b64decode(str(i["src"]).split(",", 1)[1]) for i in outline.images]
    assert set(embedded) == files
    assert len(files) >= 8
    assert all(data.startswith(PNG) for data in embedded)
    assert all(len(str(image["alt"])) > 20 for image in outline.images)


def test_every_link_leads_somewhere(outline: Outline) -> None:
    assert {link.removeprefix("#") for link in outline.links} <= outline.ids


def test_every_experiment_has_its_section_formula_and_numbers(report: Path, outline: Outline) -> None:
    page = report.read_text(encoding="utf-8")
    assert {"x-patch_map", "x-patch_direction", "x-skip", "x-noise_frame"} <= outline.ids
    assert "h &lt;- (1 - alpha) h_recipient + alpha h_donor" in page
    assert page.count('class="headline"') >= 4
    assert "n = 6 prompts per cell" in page


def test_the_first_configured_metric_leads_and_the_others_fold_away(outline: Outline) -> None:
    assert outline.summaries.count("Path length") == 4
    assert "Goal match" not in outline.summaries


def test_pending_and_failed_work_is_said(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert "4 units are still pending" in page
    assert re.search(r"patch_map</td>.*?goal match: 9, path length: 9", page)


def test_definitions_and_provenance_are_on_the_page(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    for words in (
        "share of frames in which the marker",
        "ratio of means",
        "sign-flip test",
        "9f" * 32,
        "guidance: 1.0",
    ):
        assert words in page


def test_film_strip_names_prompts_and_patch(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert "clean prompt “go to red”, corrupted prompt “go to blue”" in page
    assert "direction denoising, step 3, layer 2, component attn1" in page


def test_text_from_the_store_is_escaped(planted: Planted, tmp_path: Path) -> None:
    store = without(planted, tmp_path / "run.zarr", "effects", "previews")
    zarr.open_group(str(store), mode="r+", use_consolidated=False).attrs["title"] = "<script>alert(1)</script>"
    page = write_report(store, tmp_path / "out").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ("effects", "Experiment skip has no effects yet: run `stepscope effects`."),
        ("previews", "The store has no previews group, so there are no film strips."),
        ("baseline", "The store has no baseline group"),
        ("samples", "The store has no samples group"),
    ],
)
def test_missing_parts_are_named_not_refused(planted: Planted, tmp_path: Path, group: str, words: str) -> None:
    others = ("patch_map", "patch_direction", "noise_frame")
    store = without(planted, tmp_path / "run.zarr", group, *others)
    page = write_report(store, tmp_path / "out").read_text(encoding="utf-8")
    assert "This report is incomplete." in page
    assert words in page


def test_a_store_that_has_not_started_still_gives_a_page(tmp_path: Path) -> None:
    zarr.open_group(str(tmp_path / "run.zarr"), mode="w", zarr_format=3)
    page = write_report(tmp_path / "run.zarr", tmp_path / "out").read_text(encoding="utf-8")
    assert "The store has no experiments." in page


def test_pending_effects_give_a_page_without_numbers(planted: Planted, tmp_path: Path) -> None:
    store = without(planted, tmp_path / "run.zarr", "effects", "patch_direction", "noise_frame", "previews")
    for name in ("skip", "patch_map"):
        group = zarr.open_group(str(store / name), mode="r+", use_consolidated=False)
        group["status"][:] = 0
        for metric in (METRIC, "path_length"):
            group[metric][:] = np.nan
    compute_effects(store, replicates=50)
    page = write_report(store, tmp_path / "out").read_text(encoding="utf-8")
    assert page.count("No cell has a value yet.") == 4


def test_no_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no store at"):
        write_report(tmp_path / "nothing", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "x", "y", "shape"),
    [
        ("patch_map", "step", "layer", "map"),
        ("patch_direction", "step", None, "curve"),
        ("skip", "step", None, "curve"),
        ("noise_frame", "frame", None, "curve"),
    ],
)
def test_axes_choose_the_picture(sweep: Sweep, name: str, x: str, y: str | None, shape: str) -> None:
    view = view_of(sweep.effects[name], METRIC)
    assert (view.x, view.y, view.shape) == (x, y, shape)


def effects_over(**axes: list[object]) -> xr.Dataset:
    """Build a hollow effects group over given axes and both pair kinds."""
    sizes = (3, *(len(v) for v in axes.values()))
    dims = ("pair", *axes)
    coords = {k: np.array(v, dtype=object if isinstance(v[0], str) else None) for k, v in axes.items()}
    names = ("difference", "difference_low", "difference_high", "p_fwer", "p_fdr", "n")
    variables = {f"{METRIC}_{n}": (dims, np.full(sizes, 0.1)) for n in names}
    runs = {f"{METRIC}_{n}": ("pair", np.full(3, 0.5)) for n in ("clean", "corrupted")}
    pairs = np.array(["all", *PAIRS], dtype=object)
    return xr.Dataset({**variables, **runs}, coords={"pair": pairs, **coords}, attrs={"recipient": "clean"})


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ({"mode": ["a", "b"]}, "points"),
        ({}, "points"),
        ({"alpha": [0.0, 0.5, 1.0]}, "curve"),
        ({"step": [3], "layer": [0, 1]}, "curve"),
        ({"frame": [1, 2], "layer": [0, 1], "component": ["ffn"]}, "map"),
        ({"step": [0, 1], "frame": [1, 2], "layer": [0, 1]}, "map"),
        ({"step": [0, 1], "mode": ["a", "b", "c"], "path": ["x", "y", "z"]}, "curve"),
    ],
    ids=["category", "single cell", "strength", "one step", "frame by layer", "three numeric", "many lines"],
)
def test_any_axes_can_be_drawn(sweep: Sweep, axes: dict[str, list[object]], shape: str) -> None:
    effects = effects_over(**axes)
    assert view_of(effects, METRIC).shape == shape
    sweep.effects["other"] = effects
    pictures = experiment_pictures(sweep, "other", METRIC, "difference", sweep.pairs)
    assert pictures
    assert all(p.png.startswith(PNG) for p in pictures)


def test_a_map_without_any_change_says_so(sweep: Sweep) -> None:
    effects = effects_over(step=[0, 1], layer=[0, 1])
    effects[f"{METRIC}_difference"][:] = 0
    sweep.effects["self"] = effects
    assert "No cell changes goal match" in tables.headline(sweep, "self", METRIC)


def test_one_prompt_gives_numbers_without_intervals(tmp_path: Path) -> None:
    one = Shape(prompts=1, seeds=1, steps=3, layers=2, frames=3)
    store = write_store(tmp_path / "run.zarr", one, failures=False, previews=False).path
    compute_effects(store, replicates=50)
    page = write_report(store, tmp_path / "out").read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b", re.sub(r"data:image/png;base64,[^\"]*", "", page))
    assert "n = 1 prompt per cell" in page


def test_many_components_go_to_several_figures_with_distinct_names(sweep: Sweep) -> None:
    sweep.effects["wide"] = effects_over(step=[0, 1], layer=[0, 1], component=[f"c{i}" for i in range(8)])
    pictures = experiment_pictures(sweep, "wide", METRIC, "difference", ["all"])
    assert len({p.name for p in pictures}) == 2


def test_panels_are_named_by_their_values() -> None:
    effects = effects_over(alpha=[0.5, 1.0], path=["off_path"])
    assert [label for label, _ in combinations(effects, ("alpha", "path"))] == [
        "alpha 0.5, off path",
        "alpha 1, off path",
    ]


def test_each_line_stands_on_its_recipient(sweep: Sweep) -> None:
    effects = sweep.effects["patch_direction"]
    named = {str(d): i for i, d in enumerate(effects["direction"].values)}
    runs = {d: reference_of(effects, METRIC, "all", {"direction": i})[0] for d, i in named.items()}
    assert runs == {"denoising": "corrupted", "noising": "clean", "self": "clean"}


def test_maps_show_recovery_only_where_zero_means_no_change(sweep: Sweep) -> None:
    estimands = {name: main_estimand(effects, METRIC) for name, effects in sweep.effects.items()}
    assert estimands == {
        "patch_map": "recovery",
        "patch_direction": "difference",
        "skip": "difference",
        "noise_frame": "difference",
    }


def test_an_unclear_gap_takes_recovery_off_the_page(sweep: Sweep) -> None:
    effects = sweep.effects["patch_map"]
    assert "recovery <b>" in tables.headline(sweep, "patch_map", METRIC)
    effects[f"{METRIC}_gap_low"][:] = -0.1
    assert main_estimand(effects, METRIC) == "difference"
    assert "recovery <b>" not in tables.headline(sweep, "patch_map", METRIC)


def test_reference_lines_hold_both_runs_and_the_floor(sweep: Sweep) -> None:
    effects = sweep.effects["skip"]
    levels = {name: value for name, value, _ in run_levels(sweep, effects, METRIC, "all")}
    assert levels["floor"] == pytest.approx(0.25)
    assert levels["clean"] > levels["corrupted"]
    assert [name for name, _, _ in run_levels(sweep, effects, "path_length", "all")] == ["clean", "corrupted"]


def test_the_strongest_cell_is_the_planted_one(sweep: Sweep, planted: Planted) -> None:
    best = np.unravel_index(int(planted.recovery.argmax()), planted.recovery.shape)
    found = strongest(sweep.effects["patch_map"], METRIC, 3)
    assert found[0]["cell"].startswith(f"step {best[0]} (")
    assert f"layer {best[1]}, attn1" in found[0]["cell"]
    sizes = [abs(row["difference"]) for row in found]
    assert sizes == sorted(sizes, reverse=True)


def test_the_strongest_of_both_directions_is_no_unchanged_cell(sweep: Sweep) -> None:
    top = strongest(sweep.effects["patch_direction"], METRIC, 1)[0]
    assert abs(top["difference"]) > 0.3


def test_a_weak_gap_is_marked(sweep: Sweep) -> None:
    assert "mean little here" not in tables.baselines(sweep)
    assert sweep.baseline is not None
    sweep.baseline[METRIC][:, 1] = sweep.baseline[METRIC][:, 0] + np.tile([0.01, -0.01], 6).astype(np.float32)
    sweep.baseline[METRIC][::4, 1] += 0.02
    assert "mean little here" in tables.baselines(sweep)


def test_few_prompts_are_admitted(sweep: Sweep) -> None:
    assert "no cell can be significant: red / blue, green / yellow." in tables.fine_print(sweep, "skip", METRIC)


def test_the_colour_scale_is_centred_and_resists_outliers() -> None:
    norm, extend = symmetric_norm(np.array([-0.2, 0.5, np.nan]))
    assert (norm.vmin, norm.vmax, extend) == (-0.5, 0.5, "neither")
    wild = np.append(np.linspace(-1, 1, 500), 90.0)
    norm, extend = symmetric_norm(wild)
    assert norm.vmax is not None
    assert norm.vmax <= 1.0
    assert extend == "both"
    assert symmetric_norm(np.array([np.nan]))[0].vmax == 1


def test_replayed_steps_of_the_patched_film_show_the_recipient(sweep: Sweep) -> None:
    video = np.zeros((3, 4, 2, 3, 3, 3), np.uint8)
    video[0], video[1], video[2, 2:] = 10, 20, 30
    dims = ("preview", "run", "step", "frame", "y", "x", "rgb")
    runs = np.array(["clean", "corrupted", "patched"], dtype=object)
    previews = xr.Dataset({"x0_hat": (dims, video[None])}, coords={"run": runs})
    assert films.replayed_steps(previews, 0) == 2
    films._fill_replayed(video, list(runs), "corrupted", 2)
    assert (video[2, :2] == 20).all()
    assert (video[2, 2:] == 30).all()
    assert sweep.previews is not None
    assert films.recipient_of(sweep.previews) == "corrupted"


@pytest.mark.parametrize(
    ("patched", "run"),
    [({"direction": "noising"}, "clean"), ({"kind": "noise", "run": "corrupted"}, "corrupted"), (None, "clean")],
)
def test_the_patched_film_knows_where_it_starts(patched: object, run: str) -> None:
    assert films.recipient_of(xr.Dataset(attrs={"patched": json.dumps(patched)})) == run


def test_film_steps_include_both_ends() -> None:
    assert films.chosen_steps(50)[0] == 0
    assert films.chosen_steps(50)[-1] == 49
    assert films.chosen_steps(3) == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 5, 20, 50, 1000, 12345])
def test_ticks_start_at_zero_and_stay_few(count: int) -> None:
    found = ticks(count, 5)
    assert found[0] == 0
    assert 1 <= len(found) <= 5
    assert found[-1] < count


def test_file_names_are_safe() -> None:
    assert file_name("skip", "a/b", ["red/blue", "x y"]) == "skip_a-b_red-blue-x-y"


def test_config_order_comes_first() -> None:
    assert in_order({"b", "a", "c"}, ["c", "missing", "a"]) == ["c", "a", "b"]
