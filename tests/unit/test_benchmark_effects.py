"""The benchmarks of effects and of the store: what they compute and compare, at sizes that take no time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks import effects, store_share
from benchmarks.figures import Target
from pipeline.store import open_store, verify
from tests.sweep_fixture import save_tiny_model, tiny_config, write_config


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(effects, "LATENT", (2, 3, 4))
    a_sample = 4 * effects.STEPS * effects.LAYERS * 24
    return lambda samples: samples * a_sample


@pytest.fixture
def place(small, tmp_path) -> Path:
    effects.write(tmp_path / "run.zarr", small(5))
    return tmp_path / "run.zarr"


class TestEffects:
    def test_a_store_has_the_asked_size_and_every_value(self, small, tmp_path):
        written = effects.write(tmp_path / "run.zarr", small(5))
        array = open_store(tmp_path / "run.zarr").array("map/change_map")
        assert written == small(5) == array.nbytes
        assert np.isfinite(array[...]).all()
        assert array.chunks == (1, 2, 6, 2, 3, 4)

    def test_it_is_a_store_like_any_other(self, place):
        found = verify(place)
        assert (found.good, found.checked) == (True, found.units)

    def test_samples_differ(self, place):
        values = np.asarray(open_store(place).array("map/change_map")[...])
        assert len({values[i].tobytes() for i in range(5)}) == 5

    def test_loop_and_dask_come_to_the_same_mean_of_differences(self, place):
        store = open_store(place)
        values, baseline = (np.asarray(store.array(f"{g}/change_map")[...], np.float64) for g in ("map", "baseline"))
        expected = effects._check((values - baseline[:, 1, None, None]).mean(axis=0))
        slow, fast = effects.loop(place), effects.effects(place)
        np.testing.assert_allclose(slow["check"], expected, rtol=1e-9)
        np.testing.assert_allclose(fast["check"], expected, rtol=1e-5, atol=1e-6)
        assert 0 < slow["arithmetic"] <= slow["processor"]
        assert fast["processor"] > 0
        assert fast["clock"] > 0

    def test_a_case_runs_apart_on_the_given_cores_and_tells_its_peak(self, small, tmp_path):
        # The child knows nothing of the small latents; two samples are the fewest.
        effects.write(tmp_path / "run.zarr", 0)
        cores = {min(os.sched_getaffinity(0))}
        found = effects.run_case("numpy", tmp_path / "run.zarr", cores)
        assert 50e6 < found["peak"] < 2e9
        assert found["check"] == effects.loop(tmp_path / "run.zarr")["check"]
        assert os.sched_getaffinity(0) != cores or len(os.sched_getaffinity(0)) == 1

    def test_figures_are_ratios_of_the_largest_store(self, small, monkeypatch):
        seconds = {"numpy": 6.0, "dask": 4.0}
        calls: list[tuple[str, int, int]] = []

        def run_case(case: str, place: Path, cores: set[int]) -> dict[str, Any]:
            samples = open_store(place).array("map/change_map").shape[0]
            calls.append((case, samples, len(cores)))
            return {
                "processor": seconds[case] * samples,
                "clock": 2 * seconds[case] * samples + (case == "numpy") * 8,
                "arithmetic": 3.0 * samples,
                "peak": 10**6 * (100 + samples),
                "check": [1.0, 2.0 + (case == "dask") / 1024],
            }

        monkeypatch.setattr(effects, "run_case", run_case)
        monkeypatch.setattr(effects, "GB", small(1))
        found = effects.measure((4, 8), rounds=2)
        assert (found["speed"], found["speed_against_arithmetic_alone"]) == (1.5, 0.75)
        assert found["speed_by_the_clock"] == round((2 * 6 * 8 + 8) / (2 * 4 * 8), 3)
        assert (found["linear"], found["peak_mb"]) == (1.0, 108)
        assert found["sizes"]["8_gb"]["largest_disagreement"] == 1 / 1024
        assert found["sizes"]["8_gb"]["gb"] == 8.0
        every = len(os.sched_getaffinity(0))
        a_round = [("numpy", 1), ("dask", 1), ("dask", every)]
        assert calls == [(case, n, cores) for _ in range(2) for n in (4, 8) for case, cores in a_round]
        for target in effects.TARGETS:
            assert target.judge(found)["met"]

    def test_peak_is_of_this_process_and_stays_when_memory_is_given_back(self):
        held = psutil.Process().memory_info().rss
        slack = 16 * 2**20
        size = max(0, effects.peak_bytes() - held) + 4 * slack
        block = np.ones(size, np.uint8)
        assert block[-1] == 1
        peak = effects.peak_bytes()
        del block
        assert abs(peak - held - size) < 2 * slack
        # The kernel counts per processor, so the last few pages come and go.
        assert effects.peak_bytes() > peak - slack


class TestStoreShare:
    def test_a_clock_adds_up_and_passes_on(self):
        clock = store_share.Clock()

        def work(x: int, *, y: int) -> int:
            began = time.perf_counter()
            while time.perf_counter() - began < 0.002:
                pass
            if y < 0:
                raise ValueError("negative")
            return x + y

        timed = clock.timed("work", work)
        assert timed(1, y=2) == 3
        with pytest.raises(ValueError, match="negative"):
            timed(1, y=-2)
        assert clock.seconds["work"] >= 0.004
        assert set(clock.seconds) == {"work"}

    def test_shares_of_a_small_sweep(self, tmp_path, monkeypatch):
        model = save_tiny_model(tmp_path / "tiny")
        raw = tiny_config(model, experiments={"skip": {"kind": "step_skip", "mode": "drop", "step": "all"}})
        monkeypatch.setattr(store_share, "DEMO", write_config(tmp_path / "demo.yaml", raw))
        found = store_share.measure(samples=1, steps=4)
        plain, fields = found["demo"], found["demo_with_fields"]
        assert plain["units"] == fields["units"] == 2
        assert plain["cells"] == fields["cells"] == 2 + 4
        # Two metrics of four bytes, by step in the baseline as well; a field has 6 x 10 x 10 positions and 6 frames.
        assert plain["bytes_a_cell"] == round(4 * 2 * (2 * 5 + 4) / 6)
        assert fields["bytes_a_cell"] == round((4 * 2 * (2 * 5 + 4) + 4 * 606 * 6) / 6)
        for case in found.values():
            assert 0 < case["write_share"] < 1
            assert 0 < case["measure_share"] < 1
            assert case["write_share"] + case["measure_share"] < 1
        assert {target.figure for target in store_share.TARGETS} == {f"{name}.write_share" for name in found}
        assert all(isinstance(target, Target) for target in store_share.TARGETS)
