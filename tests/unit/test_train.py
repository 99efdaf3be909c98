"""Training of the embedded model: batches, loss and schedule; an interrupted run continues as if it had not been."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pipeline.embedded import build, train
from pipeline.tasks import maze_world as world


def test_a_batch_is_a_function_of_seed_and_step():
    one, again, other = train.training_batch(3, 1), train.training_batch(3, 1), train.training_batch(4, 1)
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])


def test_a_batch_holds_solution_videos_and_every_prompt():
    latents, prompts = train.training_batch(0, 1)
    assert latents.shape == (train.BATCH, 3, world.FRAMES, 2 * world.SIZE, 2 * world.SIZE)
    assert set(prompts.tolist()) == {0, 1, 2, 3}
    # Each cell is four equal latent pixels.
    assert torch.equal(latents[..., ::2, ::2], latents[..., 1::2, 1::2])
    mean, std = torch.tensor(build.LATENTS_MEAN), torch.tensor(build.LATENTS_STD)
    pixels = (latents[..., ::2, ::2].permute(0, 2, 3, 4, 1) * std + mean + 1) * 127.5
    distance = (pixels[..., None, :] - torch.from_numpy(world.PALETTE).float()).abs().sum(-1).min(-1).values
    assert distance.max() < 1e-2


def test_batches_are_standardised_about_as_the_codec_says():
    latents = torch.cat([train.training_batch(s, 1)[0] for s in range(4)])
    assert latents.mean().abs() < 0.1
    assert (latents.std() - 1).abs() < 0.1


def test_sigmas_cover_the_schedule_and_lean_to_the_noisy_end():
    sigmas = torch.cat([train.sample_sigmas(torch.Generator().manual_seed(s)) for s in range(50)])
    assert sigmas.min() > 0
    assert sigmas.max() < 1
    assert 0.75 < sigmas.median() < 0.9


@pytest.mark.parametrize(
    ("step", "share"), [(0, 0.01), (49, 0.5), (99, 1.0), (100, 1.0), (550, 0.5), (999, 0.0)], ids=str
)
def test_the_learning_rate_warms_up_then_falls_to_zero(step, share):
    assert train.learning_rate(step, 1000) == pytest.approx(share * train.PEAK_LR, abs=0.01 * train.PEAK_LR)


class Oracle(torch.nn.Module):
    """Records what it is asked and answers the true velocity of frames 1 and later."""

    def __init__(self, latents):
        super().__init__()
        self.latents = latents

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        self.seen, self.timestep = hidden_states, timestep
        sigma = timestep.view(len(hidden_states), world.FRAMES, -1)[:, 1, :1].view(-1, 1, 1, 1, 1) / 1000
        noise = (hidden_states - (1 - sigma) * self.latents) / sigma
        return (noise - self.latents,)


def test_the_loss_of_the_true_velocity_is_zero_and_frame_zero_is_given_clean():
    latents, _ = train.training_batch(0, 1)
    oracle = Oracle(latents)
    embeds = torch.zeros(train.BATCH, build.MAX_PROMPT_TOKENS, 32)
    loss = train.flow_matching_loss(oracle, latents, embeds, torch.Generator().manual_seed(0))
    assert loss < 1e-6
    assert torch.equal(oracle.seen[:, :, 0], latents[:, :, 0])
    times = oracle.timestep.view(train.BATCH, world.FRAMES, -1)
    assert (times[:, 0] == 0).all()
    assert (times[:, 1:] > 0).all()
    assert (times[:, 1:] == times[:, 1:2]).all()


@pytest.fixture
def small(monkeypatch):
    """Two blocks and four rows, so that a step takes a moment."""
    torch.set_num_threads(1)
    monkeypatch.setitem(build.TRANSFORMER_CONFIG, "num_layers", 2)
    monkeypatch.setattr(train, "BATCH", 4)
    monkeypatch.setattr(train, "WARMUP", 1)


def test_an_interrupted_training_ends_with_the_same_weights(small, tmp_path, monkeypatch):
    whole = train.train(4, 1, tmp_path / "whole", compile_model=False, checkpoint_every=2)

    original, calls = train.training_batch, []

    def stops_at_the_third(step, seed):
        if step == 2 and not calls:
            calls.append(step)
            raise KeyboardInterrupt
        return original(step, seed)

    monkeypatch.setattr(train, "training_batch", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train.train(4, 1, tmp_path / "cut", compile_model=False, checkpoint_every=2)
    resumed = train.train(4, 1, tmp_path / "cut", compile_model=False, checkpoint_every=2)
    assert resumed["final_loss"] == whole["final_loss"]
    one, two = (
        (tmp_path / name / "pipeline/transformer/diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("whole", "cut")
    )
    assert one == two
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert record["seed"] == 1
    assert record["steps"] == 4
    assert record["wall_seconds"] >= 0


def test_training_lowers_the_loss(small, tmp_path):
    train.train(40, 1, tmp_path, compile_model=False, checkpoint_every=40)
    losses = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_a_saved_pipeline_loads_through_diffusers_and_gives_the_same_video(small, tmp_path):
    from diffusers import DiffusionPipeline

    from pipeline.tasks.maze import MazeTask
    from pipeline.tasks.task import Sampler

    pipe = build.build_pipeline(2)
    build.save_pipeline(pipe, tmp_path / "model")
    loaded = DiffusionPipeline.from_pretrained(str(tmp_path / "model"), local_files_only=True)
    assert type(loaded).__name__ == "WanImageToVideoPipeline"
    task = MazeTask(mazes=1)
    films = []
    for p in (pipe, loaded):
        p.set_progress_bar_config(disable=True)
        inputs = task.inputs(p, task.samples()[0], Sampler(steps=2))
        films.append(p(**inputs.shared, **inputs.per_run, output_type="np", return_dict=False)[0])
    assert films[0].shape == (2, 21, 80, 80, 3)
    # Not bit-equal: weights mapped from a file are aligned differently in memory, which picks other kernels.
    assert np.allclose(films[0], films[1], atol=1e-5)


def test_the_shipped_weights_are_small_and_fit_their_card():
    from pipeline.models import EMBEDDED, describe

    folder = EMBEDDED["embedded:maze"]
    card = json.loads((folder / "model_card.json").read_text())
    assert sum(f.stat().st_size for f in folder.rglob("*.safetensors")) < 4e6
    assert describe("embedded:maze").denoiser_config["num_layers"] >= 6
    assert describe("embedded:maze").fingerprint in json.dumps(card)
    assert all(check["met"] for check in card["requirements"])
    assert not [f for f in folder.rglob("*") if f.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_the_codec_pools_and_repeats():
    codec = build.GridCodec()
    video = torch.rand(1, 3, 21, 16, 16)
    latents = codec.encode(video).latents
    assert latents.shape == (1, 3, 6, 2, 2)
    assert torch.allclose(latents[0, 0, 1, 0, 0], video[0, 0, 4, :8, :8].mean())
    back = codec.decode(latents).sample
    assert back.shape == video.shape
    assert torch.allclose(codec.encode(back).latents, latents, atol=1e-6)


@pytest.mark.parametrize("prompt", build.PROMPTS)
def test_prompts_are_told_apart_and_encoded_alone_as_in_a_batch(prompt):
    pipe = build.build_pipeline(1)
    together = build.encode_prompts(pipe, list(build.PROMPTS))
    alone = build.encode_prompts(pipe, [prompt])
    row = build.PROMPTS.index(prompt)
    assert torch.allclose(together[row], alone[0], atol=1e-6)
    assert all((together[row] - together[o]).abs().max() > 0.1 for o in range(3) if o != row)
