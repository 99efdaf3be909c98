"""Effects of a store with planted answers: estimands, pairing, failures, and what is written."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from pipeline.effects import compute_effects, open_effects
from pipeline.effects.experiment import Experiment, Recorded, cell_blocks, experiment_names, recipients
from tests.store_fixture import PAIRS, Planted, Shape, consolidate, write_store

SMALL = Shape(prompts=6, seeds=2, steps=6, layers=3, frames=4)
METRIC = "goal_match"


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A store without noise or failures, with its effects."""
    planted = write_store(tmp_path_factory.mktemp("exact") / "run.zarr", SMALL, noise=0, failures=False, previews=False)
    compute_effects(planted.path, replicates=200)
    return planted


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A noisy store with one failed and four pending units, with its effects."""
    planted = write_store(tmp_path_factory.mktemp("broken") / "run.zarr", SMALL, previews=False)
    compute_effects(planted.path, replicates=200)
    return planted


def effects_of(planted: Planted, name: str) -> xr.Dataset:
    return open_effects(planted.path)[name].to_dataset().load()


def by_prompt(planted: Planted, values: np.ndarray, pair: str = "all") -> np.ndarray:
    """Average seeds within prompts, the slow way."""
    wanted = [i for i, p in enumerate(planted.pairs) if pair in ("all", p)]
    prompts = sorted({planted.prompts[i] for i in wanted})
    return np.stack([np.nanmean(values[[i for i in wanted if planted.prompts[i] == p]], axis=0) for p in prompts])


def test_every_experiment_gets_a_group(exact: Planted) -> None:
    assert experiment_names(exact.path) == ["noise_frame", "patch_direction", "patch_map", "skip"]
    assert set(open_effects(exact.path).children) == set(experiment_names(exact.path))


@pytest.mark.parametrize("pair", ["all", *PAIRS])
def test_planted_recovery_comes_back(exact: Planted, pair: str) -> None:
    effects = effects_of(exact, "patch_map").sel(pair=pair)
    np.testing.assert_allclose(effects[f"{METRIC}_recovery"], exact.recovery, atol=1e-5)
    np.testing.assert_allclose(effects[f"{METRIC}_recovery_low"], exact.recovery, atol=1e-5)


@pytest.mark.parametrize("pair", ["all", *PAIRS])
def test_planted_difference_comes_back(exact: Planted, pair: str) -> None:
    effects = effects_of(exact, "skip").sel(pair=pair)
    np.testing.assert_allclose(effects[f"{METRIC}_difference"], exact.skip, atol=1e-5)


def test_each_direction_is_compared_with_its_own_recipient(exact: Planted) -> None:
    effects = effects_of(exact, "patch_direction").sel(pair="all")
    gap = float(effects[f"{METRIC}_gap"])
    best = exact.recovery.max(axis=(1, 2))
    expected = {"denoising": gap * best, "noising": -gap * best, "self": 0 * best}
    for direction, values in expected.items():
        np.testing.assert_allclose(effects[f"{METRIC}_difference"].sel(direction=direction), values, atol=1e-5)
    np.testing.assert_allclose(effects[f"{METRIC}_recovery"].sel(direction="self"), 1, atol=1e-5)


def test_recovery_needs_a_contrast(exact: Planted) -> None:
    assert f"{METRIC}_recovery" in effects_of(exact, "patch_map")
    assert f"{METRIC}_recovery" not in effects_of(exact, "skip")


def test_run_means_and_gap_are_means_over_prompts(exact: Planted) -> None:
    effects = effects_of(exact, "patch_map")
    for pair in ("all", *PAIRS):
        clean, corrupted = (by_prompt(exact, v, pair).mean() for v in (exact.clean, exact.corrupted))
        chosen = effects.sel(pair=pair)
        assert float(chosen[f"{METRIC}_clean"]) == pytest.approx(clean, abs=1e-6)
        assert float(chosen[f"{METRIC}_corrupted"]) == pytest.approx(corrupted, abs=1e-6)
        assert chosen[f"{METRIC}_gap_low"] <= clean - corrupted <= chosen[f"{METRIC}_gap_high"]


def test_seeds_are_averaged_before_prompts(broken: Planted) -> None:
    effects = effects_of(broken, "skip").sel(pair="all")
    stored = broken.values["skip"].astype(np.float32) - broken.clean.astype(np.float32)[:, None, None]
    np.testing.assert_allclose(effects[f"{METRIC}_difference"], by_prompt(broken, stored).mean(axis=0), atol=1e-6)
    assert (effects[f"{METRIC}_n"] == SMALL.prompts).all()


def test_intervals_hold_the_estimate_and_most_of_the_truth(broken: Planted) -> None:
    effects = effects_of(broken, "patch_map").sel(pair="all")
    value, low, high = (effects[f"{METRIC}_recovery{b}"].values for b in ("", "_low", "_high"))
    assert ((low <= value) & (value <= high)).all()
    assert ((low <= broken.recovery) & (broken.recovery <= high)).mean() > 0.75


def test_pooling_seeds_as_units_narrows_the_intervals(tmp_path: Path) -> None:
    planted = write_store(tmp_path / "run.zarr", SMALL, noise=0, failures=False, previews=False)
    widths = {}
    for unit in ("prompt", "sample"):
        compute_effects(planted.path, unit=unit, replicates=400)  # type: ignore[arg-type]
        chosen = effects_of(planted, "patch_map").sel(pair="all")
        widths[unit] = float(chosen[f"{METRIC}_gap_high"] - chosen[f"{METRIC}_gap_low"])
    assert widths["sample"] < 0.85 * widths["prompt"]


def test_failed_cells_are_counted_where_they_are(broken: Planted) -> None:
    effects = effects_of(broken, "patch_map")
    failed = effects[f"{METRIC}_failed"].sel(pair="all")
    assert failed.sel(step=slice(0, 3)).sum() == 0
    assert (failed.sel(step=slice(4, None)) == 1).all()
    assert effects[f"{METRIC}_failed"].sel(pair=PAIRS[1]).sum() == 0
    assert effects.attrs["units_failed"] == 1


def test_a_failed_seed_leaves_its_prompt_to_the_other_seed(broken: Planted) -> None:
    effects = effects_of(broken, "patch_map").sel(pair="all")
    assert (effects[f"{METRIC}_n"] == SMALL.prompts).all()
    assert np.isfinite(effects[f"{METRIC}_recovery"]).all()


def test_pending_cells_are_not_failures(broken: Planted) -> None:
    effects = effects_of(broken, "noise_frame")
    assert effects[f"{METRIC}_failed"].sum() == 0
    assert (effects[f"{METRIC}_n"].sel(pair="all") == SMALL.prompts - 1).all()
    assert effects.attrs["units_pending"] == 4


def test_a_store_with_every_unit_pending_gives_empty_maps(tmp_path: Path) -> None:
    planted = write_store(tmp_path / "run.zarr", SMALL, previews=False)
    group = zarr.open_group(str(planted.path / "skip"), mode="r+", use_consolidated=False)
    group["status"][:] = 0
    group[METRIC][:] = np.nan
    compute_effects(planted.path, replicates=50)
    effects = effects_of(planted, "skip")
    assert np.isnan(effects[f"{METRIC}_difference"]).all()
    assert (effects[f"{METRIC}_n"] == 0).all()
    assert effects[f"{METRIC}_failed"].sum() == 0


def test_chunking_does_not_change_an_estimate(broken: Planted) -> None:
    recorded = Recorded.read(broken.path, "prompt")
    experiment = Experiment.open(broken.path, "patch_map")
    whole = experiment.states(METRIC, recorded, chunk_samples=64)
    cut = experiment.states(METRIC, recorded, chunk_samples=5)
    assert cut.difference.keys == whole.difference.keys
    np.testing.assert_allclose(cut.difference.moments.mean, whole.difference.moments.mean, rtol=1e-12)
    for pair, count in whole.failed.items():
        np.testing.assert_array_equal(cut.failed[pair], count)


def test_cell_blocks_cover_every_cell_once() -> None:
    blocks = list(cell_blocks(10, replicates=2**17, megabytes=3))
    assert [i for b in blocks for i in range(10)[b]] == list(range(10))
    assert len(blocks) > 1


def test_self_patches_are_not_significant_and_strong_cells_are(broken: Planted) -> None:
    effects = effects_of(broken, "patch_direction").sel(pair="all")
    p = effects[f"{METRIC}_p_fwer"]
    assert (p.sel(direction="self") > 0.5).all()
    strong = int(np.abs(broken.recovery.max(axis=(1, 2))).argmax())
    assert p.isel(step=strong).sel(direction="denoising") <= 0.05


def test_the_same_seed_gives_the_same_bytes_and_rewriting_leaves_nothing_behind(tmp_path: Path) -> None:
    planted = write_store(tmp_path / "run.zarr", SMALL, previews=False)
    stale = planted.path / "effects" / "skip" / "stale"
    compute_effects(planted.path, replicates=50, seed=1)
    first = effects_of(planted, "skip")
    stale.mkdir()
    assert compute_effects(planted.path, replicates=50, seed=1) == [
        f"effects/{n}" for n in experiment_names(planted.path)
    ]
    xr.testing.assert_identical(effects_of(planted, "skip"), first)
    assert not stale.exists()


def test_another_seed_moves_only_the_intervals(broken: Planted, tmp_path: Path) -> None:
    planted = write_store(tmp_path / "run.zarr", SMALL, previews=False)
    compute_effects(planted.path, replicates=200, seed=9)
    a, b = effects_of(broken, "skip"), effects_of(planted, "skip")
    np.testing.assert_array_equal(a[f"{METRIC}_difference"], b[f"{METRIC}_difference"])
    assert (a[f"{METRIC}_difference_low"] != b[f"{METRIC}_difference_low"]).any()


def test_groups_say_how_they_were_made(broken: Planted) -> None:
    effects = effects_of(broken, "patch_map")
    expected = {"experimental_unit": "prompt", "replicates": 200, "seed": 0, "level": 0.95, "kind": "patch"}
    assert {k: effects.attrs[k] for k in expected} == expected
    for key in ("estimand_difference", "estimand_recovery", "sign_convention", "method_p_fdr", "method_p_fwer"):
        assert effects.attrs[key]
    for variable in effects.data_vars.values():
        assert variable.attrs["units"] == "1"
        assert variable.attrs["long_name"]


def test_coordinates_come_along_with_sigma(broken: Planted) -> None:
    effects = effects_of(broken, "patch_map")
    assert effects[f"{METRIC}_difference"].dims == ("pair", "step", "layer", "component")
    np.testing.assert_array_equal(effects["sigma"], SMALL.sigma)
    assert list(effects["pair"].values) == ["all", *PAIRS]


def test_the_store_opens_with_xarray_alone_and_without_a_warning(broken: Planted) -> None:
    code = f"""
        import sys, xarray
        tree = xarray.open_datatree({str(broken.path)!r}, engine="zarr")
        assert tree["effects/patch_map"]["{METRIC}_recovery"].sel(pair="all", step=2).notnull().all()
        assert "pipeline" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_files_of_the_driver_beside_the_arrays_cause_no_warning(tmp_path: Path) -> None:
    planted = write_store(tmp_path / "run.zarr", SMALL, previews=False)
    assert (planted.path / "journal.jsonl").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_effects(planted.path, replicates=50)
        open_effects(planted.path)


def test_an_experiment_without_axes_gives_one_value_per_pair(tmp_path: Path) -> None:
    planted = write_store(tmp_path / "run.zarr", SMALL, previews=False)
    values = xr.Variable(("sample",), (planted.clean - 0.25).astype(np.float32))
    status = xr.Variable(("unit",), np.ones(SMALL.samples, np.uint8))
    attrs = {"kind": "noise", "contrast": "false", "recipient": "clean"}
    xr.Dataset({METRIC: values, "status": status}, attrs=attrs).to_zarr(
        str(planted.path), group="single", mode="w", consolidated=False, encoding={METRIC: {"chunks": (1,)}}
    )
    consolidate(planted.path)
    compute_effects(planted.path, replicates=50)
    effects = effects_of(planted, "single")
    assert effects[f"{METRIC}_difference"].dims == ("pair",)
    np.testing.assert_allclose(effects[f"{METRIC}_difference"], -0.25, atol=1e-6)


def test_a_metric_without_baseline_is_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    planted = write_store(tmp_path / "run.zarr", SMALL, previews=False)
    extra = xr.Dataset({"novel": (("sample", "step", "mode"), planted.values["skip"].astype(np.float32))})
    extra.to_zarr(str(planted.path), group="skip", mode="a", consolidated=False)
    compute_effects(planted.path, replicates=50)
    effects = effects_of(planted, "skip")
    assert effects.attrs["metrics_without_baseline"] == "novel"
    assert "novel_difference" not in effects
    assert "no baseline for metrics ['novel']" in caplog.text


def test_runs_can_be_an_axis() -> None:
    dataset = xr.Dataset(coords={"run": np.array(["corrupted", "clean"], dtype=object)}, attrs={"recipient": "by run"})
    assert recipients(dataset) == {"run": ["corrupted", "clean"]}


@pytest.mark.parametrize(
    ("recipient", "directions"), [("donor", ["denoising"]), ("by direction", ["sideways"]), ("by layer", ["self"])]
)
def test_unknown_recipients_are_refused(recipient: str, directions: list[str]) -> None:
    dataset = xr.Dataset(coords={"direction": np.array(directions, dtype=object)}, attrs={"recipient": recipient})
    with pytest.raises(ValueError, match="unknown recipient of an experiment"):
        recipients(dataset)


def test_a_path_without_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no store at .*nothing\. Give the folder"):
        compute_effects(tmp_path / "nothing")


def test_effects_that_were_not_computed_are_named(tmp_path: Path) -> None:
    planted = write_store(tmp_path / "run.zarr", SMALL, previews=False)
    with pytest.raises(FileNotFoundError, match=r"no effects in .* Run `stepscope effects"):
        open_effects(planted.path)


@pytest.mark.parametrize("bad", [{"level": 1.5}, {"replicates": 0}], ids=["level", "replicates"])
def test_impossible_settings_are_refused(broken: Planted, bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        compute_effects(broken.path, **bad)  # type: ignore[arg-type]


def test_an_unknown_unit_is_refused(broken: Planted) -> None:
    with pytest.raises(ValueError, match="unknown experimental unit: 'seed'"):
        compute_effects(broken.path, unit="seed")  # type: ignore[arg-type]
