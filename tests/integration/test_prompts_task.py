"""The prompts task on whole tiny checkpoints: what runs is the pipeline's own call, from a plan to effects."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zarr
from PIL import Image

from interventions.engine import Engine
from interventions.families.family import family_of
from interventions.streams import from_canonical, to_canonical
from pipeline.cli import BAD_INPUT, OK, main
from pipeline.config import load_config
from pipeline.metrics.metric import METRICS, Metric
from pipeline.models import load_pipeline
from pipeline.plan import Plan, make_plan
from pipeline.replica import Computer, Replica
from pipeline.store import StoreError, open_or_create
from pipeline.tasks.prompts import PromptsTask
from tests.families import checkpoints, cogvideox

NAMES = ("wan", "wan_euler", "a14b", "ltx", "cogvideox")
PAIRS = [
    {"clean": "a red ball rolls left", "corrupted": "a blue ball rolls left"},
    {"clean": "a cube falls", "corrupted": "a cube rolls right"},
]
EXPERIMENTS = {
    "map": {"kind": "patch", "step": "all", "layer": [0, 2], "component": "attn1"},
    "self": {"kind": "patch", "direction": "self", "step": [1], "layer": [1]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Every tiny checkpoint, saved."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: checkpoints.save(name, root / name) for name in checkpoints.FRAMES}


@pytest.fixture
def image(tmp_path) -> Path:
    """A PNG."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    return tmp_path / "first.png"


def settings(name: str, folder: Path, **task: Any) -> dict[str, Any]:
    height, width = checkpoints.SIZES.get(name, checkpoints.SIZE)
    return {
        "name": name,
        "model": {"id": str(folder)},
        "task": {
            "name": "prompts",
            "pairs": PAIRS,
            "frames": checkpoints.FRAMES[name],
            "height": height,
            "width": width,
            "negative": "blurry",
            **task,
        },
        "sampler": {"steps": 3, "guidance_scale": 2.0},
        "metrics": ["clean_projection", "latent_distance"],
        "experiments": EXPERIMENTS,
        "previews": {"samples": []},
        "run": {"replicas": 0},
    }


def write(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def planned(tmp_path: Path, data: dict[str, Any]) -> Plan:
    return make_plan(load_config(write(tmp_path / "c.yaml", data)))


def computer(plan: Plan) -> Computer:
    return Computer(plan, load_pipeline(plan.model, dtype="float32", device="cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_goes_from_plan_to_effects(name, folders, tmp_path, capsys):
    data = settings(name, folders[name])
    config, store = str(write(tmp_path / "c.yaml", data)), str(tmp_path / "run.zarr")
    assert main(["plan", config, "--json"]) == OK
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["cells"]) == (2, 2 * (3 * 2 + 1))
    assert main(["run", config, "--store", store]) == OK
    assert main(["status", store]) == OK
    assert main(["effects", store, "--replicates", "20"]) == OK
    root: Any = zarr.open_group(store, mode="r")
    assert list(root["samples/prompt"][:]) == ["pair-000", "pair-001"]
    np.testing.assert_allclose(root["baseline/clean_projection"][:], [[1, 0]] * 2, atol=1e-4)
    distance = root["baseline/latent_distance"][:]
    assert (distance[:, 0] == 0).all()
    assert (distance[:, 1] > 0.01).all()
    # A self-patch leaves the clean run where it is, a patch from the other run moves it.
    assert (root["self/latent_distance"][:] < 1e-4).all()
    assert (abs(root["map/clean_projection"][:]) > 1e-4).any()
    capsys.readouterr()
    assert main(["run", config, "--store", store]) == OK
    assert "(0 computed now)" in capsys.readouterr().err


def test_previews_are_stored_and_drawn(folders, tmp_path):
    data = settings("wan", folders["wan"], pairs=PAIRS[:1], seeds=2)
    data["experiments"] = {"self": EXPERIMENTS["self"]}
    data["previews"] = {"samples": [1], "patched": {"kind": "patch", "step": 1, "layer": 0}}
    config, store = str(write(tmp_path / "c.yaml", data)), str(tmp_path / "run.zarr")
    for command in (["run", config, "--store", store], ["effects", store, "--replicates", "20"], ["report", store]):
        assert main(command) == OK
    films = zarr.open_array(f"{store}/previews/x0_hat", mode="r")[:]
    assert films.shape == (1, 3, 3, 5, 32, 48, 3)
    assert (films[0].reshape(3, -1).std(axis=1) > 0).all()
    assert list(tmp_path.glob("run_report/*film*.png"))


@pytest.mark.parametrize("scale", [2.0, 1.0], ids=["guidance", "no-guidance"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_the_pipelines_own_call_on_the_prompts(name, scale, folders, tmp_path):
    data = settings(name, folders[name])
    data["sampler"] = {"steps": 3, "guidance_scale": scale}
    plan = planned(tmp_path, data)
    pipe = load_pipeline(plan.model, dtype="float32", device="cpu")
    sample, task = plan.samples[1], data["task"]
    inputs = plan.task.inputs(pipe, sample, plan.config.sampler)
    own = pipe(
        prompt=[sample.clean_prompt, sample.corrupted_prompt],
        negative_prompt=["blurry", "blurry"],
        height=task["height"],
        width=task["width"],
        num_frames=task["frames"],
        num_inference_steps=3,
        guidance_scale=scale,
        latents=inputs.per_run["latents"],
        output_type="latent",
        # As long as the tiny model's positions allow.
        **({"max_sequence_length": cogvideox.TEXT_LENGTH} if name == "cogvideox" else {}),
    ).frames
    engine = Engine(pipe, family_of(type(pipe).__name__))
    record = engine.record(inputs)
    assert torch.equal(record.final, engine._final(own, inputs))
    assert record.geometry == plan.geometry
    assert not torch.equal(record.final[0], record.final[1])


def test_the_negative_prompt_left_out_is_the_pipelines_own(folders, tmp_path):
    plan = planned(tmp_path, settings("wan", folders["wan"], negative=None))
    pipe = load_pipeline(plan.model, dtype="float32", device="cpu")
    mine = plan.task.inputs(pipe, plan.samples[0], plan.config.sampler).per_run["negative_prompt_embeds"]
    own = pipe.encode_prompt("a", max_sequence_length=512)[1]
    assert torch.equal(mine, own.repeat(2, 1, 1))


@pytest.mark.parametrize("name", [*NAMES, "ti2v"])
def test_videos_are_those_that_the_pipeline_decodes(name, folders, tmp_path, image):
    with_image = {"image": str(image)} if name == "ti2v" else {}
    plan = planned(tmp_path, settings(name, folders[name], **with_image))
    pipe = load_pipeline(plan.model, dtype="float32", device="cpu")
    inputs = plan.task.inputs(pipe, plan.samples[0], plan.config.sampler)
    one = {**inputs.shared, **inputs.rows([0])}
    own = pipe(**one, output_type="np").frames
    engine = Engine(pipe, family_of(type(pipe).__name__))
    video = plan.task.video(pipe, engine.record(replace(inputs, per_run=inputs.rows([0]), names=("clean",))).final)
    assert video.shape == own.shape == (1, *plan.task.size, 3)
    np.testing.assert_array_equal(video, 255.0 * own)


def test_previews_are_small_and_begin_and_end_with_the_video(folders, tmp_path):
    height, width = 32, 256
    plan = planned(tmp_path, settings("wan", folders["wan"], height=height, width=width))
    pipe = load_pipeline(plan.model, dtype="float32", device="cpu")
    latents = torch.randn(2, 4, 5, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    video, small = plan.task.video(pipe, latents), plan.task.preview(pipe, latents, 5)
    assert plan.task.preview_size() == (16, 128)
    assert small.shape == (2, 5, 16, 128, 3)
    halved = video.reshape(2, 17, 16, 2, 128, 2, 3).mean(axis=(3, 5))
    np.testing.assert_allclose(small, halved[:, [0, 4, 8, 12, 16]], rtol=1e-4)


OTHERS = ("hunyuan_video", "hunyuan_video15", "kandinsky5", "latte", "mochi", "sana_video", "skyreels_v2")


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_other_families_declare_of_their_pixels(name):
    """Without encoders: the size of the call, the latents it takes, and the video it decodes."""
    module = importlib.import_module(f"tests.families.{name}")
    pipe = module.build()
    if pipe.vae is None:
        pipe.register_modules(vae=checkpoints.autoencoder(name))
    family = family_of(type(pipe).__name__)
    shared, per_run = module.arguments(pipe, steps=2, guidance=False)
    pixels, vae = family.pixels, pipe.vae.config
    frames = next(shared[key] for key in ("num_frames", "frames", "video_length") if key in shared)
    size = (frames, shared["height"], shared["width"])
    assert pixels.size(*size).items() <= shared.items()
    noise = torch.zeros(1, pixels.channels(pipe.transformer.config), *pixels.extent(vae, size))
    assert pixels.latents(pipe, from_canonical(noise, family.latent_layout)).shape[1:] == per_run["latents"].shape[1:]
    patch = family.patch(pipe.transformer.config)
    assert all(v > o and (v - o) % s == 0 for v, (o, s) in zip(size[:1], pixels.grid(vae, patch)[:1], strict=True))
    # Prompts as the pipeline takes them; latents a copy, as one family writes into those it is given.
    one = {**shared, **{key: value[:1].clone() for key, value in per_run.items()}}
    own = pipe(**one, output_type="np").frames
    one["latents"] = per_run["latents"][:1].clone()
    latents = pipe(**one, output_type="latent").frames
    video = PromptsTask(pairs=PAIRS).video(pipe, to_canonical(latents, family.latent_layout, noise.shape[2:]))
    assert video.std() > 1
    np.testing.assert_array_equal(video, 255.0 * np.asarray(own))


class TestNoise:
    def noise(self, tmp_path, folder, sample, **task):
        plan = planned(tmp_path, settings("wan", folder, **task))
        pipe = load_pipeline(plan.model, dtype="float32", device="cpu")
        return plan.task.inputs(pipe, plan.samples[sample], plan.config.sampler)

    def test_is_equal_for_both_runs_and_depends_on_pair_and_seed_alone(self, folders, tmp_path):
        inputs = [self.noise(tmp_path, folders["wan"], i, seeds=2) for i in range(4)]
        drawn = [i.per_run["latents"] for i in inputs]
        assert all(torch.equal(rows[0], rows[1]) for rows in drawn)
        assert len({rows[0].numpy().tobytes() for rows in drawn}) == 4
        # The second seed of the first pair is the same whatever else is swept.
        alone = self.noise(tmp_path, folders["wan"], 1, seeds=2, pairs=PAIRS[:1], negative=None)
        assert torch.equal(alone.per_run["latents"], drawn[1])
        assert [i.seed for i in inputs] == [(0, 0), (0, 1), (1, 0), (1, 1)]

    @pytest.mark.parametrize(
        ("name", "shape"),
        [("wan", (2, 4, 5, 4, 6)), ("ltx", (2, 30, 4)), ("cogvideox", (2, 5, 4, 4, 6))],
        ids=["plain", "packed", "frames-first"],
    )
    def test_is_in_the_familys_own_layout(self, name, shape, folders, tmp_path):
        plan = planned(tmp_path, settings(name, folders[name]))
        pipe = load_pipeline(plan.model, dtype="float32", device="cpu")
        inputs = plan.task.inputs(pipe, plan.samples[0], plan.config.sampler)
        assert inputs.per_run["latents"].shape == shape
        extent = plan.task.latent_shape(plan.model)
        drawn = np.random.default_rng([0x9E12, 0, 0]).standard_normal((1, 4, *extent), "float32")
        seen = to_canonical(inputs.per_run["latents"], family_of(type(pipe).__name__).latent_layout, extent)
        np.testing.assert_array_equal(seen[:1].numpy(), drawn)


class TestDecoding:
    def test_nothing_is_decoded_for_metrics_of_latents(self, folders, tmp_path, monkeypatch):
        running = computer(planned(tmp_path, settings("wan", folders["wan"])))
        monkeypatch.setattr(running.pipe.vae, "decode", None)
        values = running.baseline(0)
        assert np.isfinite(values["clean_projection_by_step"]).all()

    def test_latent_metrics_are_the_same_with_and_without_decoding(self, folders, tmp_path, monkeypatch):
        def brightness(given):
            return given.video.mean(axis=(1, 2, 3, 4), dtype=np.float64)

        shown = Metric(name="brightness", long_name="b", description="b.", tasks=(), compute=brightness)
        monkeypatch.setitem(METRICS, "brightness", shown)
        plain = computer(planned(tmp_path, settings("wan", folders["wan"], decode=False))).baseline(0)
        data = settings("wan", folders["wan"])
        data["metrics"] = [*data["metrics"], "brightness"]
        running = computer(planned(tmp_path, data))
        decoded = running.baseline(0)
        for name, values in plain.items():
            np.testing.assert_array_equal(values, decoded[name])
        video = running.plan.task.video(running.pipe, running.record(0).final)
        np.testing.assert_allclose(decoded["brightness"], video.mean(axis=(1, 2, 3, 4)), rtol=1e-5)
        assert decoded["brightness"].std() > 0


class TestImageToVideo:
    def test_the_image_is_the_first_frame_of_both_runs(self, folders, tmp_path, image):
        red = tmp_path / "red.png"
        Image.new("RGB", (48, 32), (200, 30, 30)).save(red)
        pairs = [PAIRS[0], {**PAIRS[1], "image": str(red)}]
        plan = planned(tmp_path, settings("ti2v", folders["ti2v"], image=str(image), pairs=pairs))
        running = computer(plan)
        assert plan.geometry.given_frames == 1
        first, second = (running.record(i).final[:, :, 0] for i in (0, 1))
        assert torch.equal(first[0], first[1])
        assert not torch.equal(first[0], second[0])
        shown = running.plan.task.inputs(running.pipe, plan.samples[1], plan.config.sampler).shared["image"]
        assert shown.getpixel((0, 0)) == (200, 30, 30)

    def test_identity_is_what_the_image_holds_and_not_where_it_is(self, folders, tmp_path, image):
        def hashed(path):
            return planned(tmp_path, settings("ti2v", folders["ti2v"], image=str(path))).config.hash()

        before = hashed(image)
        moved = tmp_path / "moved.png"
        moved.write_bytes(image.read_bytes())
        assert hashed(moved) == before
        Image.new("RGB", (30, 20)).save(image)
        assert hashed(image) != before

    def test_a_replica_that_sees_another_image_does_not_start(self, folders, tmp_path, image):
        data = settings("ti2v", folders["ti2v"], image=str(image))
        plan = planned(tmp_path, data)
        open_or_create(tmp_path / "run.zarr", plan)
        Image.new("RGB", (30, 20)).save(image)
        with pytest.raises(StoreError, match="an image of it differs here"):
            Replica(plan.config.model_dump(mode="json"), str(tmp_path / "run.zarr"))


def test_what_the_pipeline_itself_refuses_is_one_sentence(folders, tmp_path, capsys):
    data = settings("wan", folders["wan"])
    data["sampler"]["arguments"] = {"guidance_scale_2": 3.0}
    assert main(["plan", str(write(tmp_path / "c.yaml", data))]) == BAD_INPUT
    text = capsys.readouterr().err.strip()
    assert "refuses this run: `guidance_scale_2` is only supported when" in text
    assert "\n" not in text


def test_arguments_reach_the_pipeline_and_are_part_of_the_identity(folders, tmp_path):
    data = settings("a14b", folders["a14b"])
    plain = planned(tmp_path, data)
    data["sampler"] = {**data["sampler"], "arguments": {"guidance_scale_2": 4.0}}
    changed = planned(tmp_path, data)
    assert changed.config.hash() != plain.config.hash()
    assert changed.geometry.denoiser_at == (0, 1, 1)
    one, two = (computer(plan).record(0) for plan in (plain, changed))
    # Only the second expert is guided otherwise.
    assert torch.equal(one.latents[1], two.latents[1])
    assert not torch.equal(one.latents[2], two.latents[2])


def test_prompts_that_the_encoder_cannot_tell_apart_are_an_error_and_no_map(folders, tmp_path, capsys):
    """The tokenizer knows neither word: both prompts are one, and a recovery between them would be rounding."""
    pairs = [{"clean": "a qqq ball", "corrupted": "a zzz ball"}]
    config = write(tmp_path / "same.yaml", settings("wan", folders["wan"], pairs=pairs))
    assert main(["run", str(config), "--store", str(tmp_path / "same.zarr")]) != OK
    assert "the text encoder makes the same of both prompts" in capsys.readouterr().err
