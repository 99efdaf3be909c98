"""The prompts task before anything runs: its config, its samples, and everything a plan refuses and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from interventions.families.family import FAMILIES, Family
from interventions.families.pixels import Pixels, no_decoder, scaling_ratios
from pipeline.cli import BAD_INPUT, OK, main
from pipeline.config import ConfigError, load_config, validate
from pipeline.models import describe
from pipeline.plan import make_plan
from pipeline.tasks.prompts import PromptsTask
from tests.families import checkpoints

ROOT = Path(__file__).parents[2]
PAIRS = [{"clean": "a red ball", "corrupted": "a blue ball"}]
PATCH = {"kind": "patch", "step": [0], "layer": [0]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints to plan on."""
    root = tmp_path_factory.mktemp("saved")
    for name in ("wan", "wan_euler", "a14b", "ti2v", "cogvideox"):
        checkpoints.save(name, root / name)
    return root


@pytest.fixture
def here(saved, tmp_path, monkeypatch) -> Path:
    """A folder with links to the checkpoints and some images."""
    monkeypatch.chdir(tmp_path)
    for folder in saved.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    Image.new("RGB", (8, 8)).save("good.png")
    Path("text.png").write_text("no image")
    Path("half.png").write_bytes(Path("good.png").read_bytes()[:40])
    return tmp_path


def settings(model: str = "wan", *, sampler: dict[str, Any] | None = None, patch: Any = None, **task: Any) -> Any:
    return {
        "name": "c",
        "model": {"id": f"./{model}"},
        "task": {"name": "prompts", "pairs": PAIRS, "frames": 17, "height": 32, "width": 48, **task},
        "sampler": {"steps": 4, "guidance_scale": 2.0, **(sampler or {})},
        "metrics": ["clean_projection"],
        "experiments": {"e": patch or PATCH},
        "previews": {"samples": []},
    }


def refused(data: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """Plan a config and return what the command line says, which must be one line and exit code 2."""
    Path("c.yaml").write_text(yaml.safe_dump(data))
    assert main(["plan", "c.yaml", "--no-calibrate"]) == BAD_INPUT
    said = capsys.readouterr()
    assert said.out == ""
    text = said.err.strip()
    assert "\n" not in text
    return text


REFUSALS = [
    # The task and the model.
    ("t2v-with-image", settings(image="good.png"), "task.image: WanPipeline takes no image; leave it out"),
    (
        "t2v-with-image-of-a-pair",
        settings(pairs=[{**PAIRS[0], "image": "good.png"}]),
        "task.pairs.0.image: WanPipeline takes no image; leave it out",
    ),
    (
        "i2v-without-image",
        settings("ti2v"),
        "task.pairs.0: WanImageToVideoPipeline starts from an image; give image here or for all pairs at once",
    ),
    (
        "height",
        settings(height=40),
        "height must be a multiple of 16 to fill whole tokens of this WanPipeline, got 40; the nearest is 32 or 48",
    ),
    ("width", settings(width=50), "got 50; the nearest is 48 or 64"),
    ("small-width", settings(width=8), "got 8; the nearest is 16 or 32"),
    ("frames", settings(frames=16), "task.frames: frames must be one of 1, 5, ... to fill whole"),
    ("nearest-frames", settings(frames=16), "got 16; the nearest is 13 or 17"),
    ("maze-model", settings() | {"model": {"id": "embedded:maze"}}, "task.pairs.0: WanImageToVideoPipeline starts"),
    # The pipeline's call.
    (
        "argument-of-the-task",
        settings(sampler={"arguments": {"height": 64}}),
        "sampler.arguments.height: height is not for a config to set; it may be any of guidance_scale_2",
    ),
    ("argument-of-guidance", settings(sampler={"arguments": {"guidance_scale": 3.0}}), "guidance_scale is not for a"),
    (
        "argument-without-effect",
        settings(sampler={"arguments": {"max_sequence_length": 64}}),
        "max_sequence_length is not for a config to set",
    ),
    ("argument-of-the-engine", settings(sampler={"arguments": {"output_type": "np"}}), "output_type is not for a"),
    (
        "argument-typo",
        settings(sampler={"arguments": {"guidance_scale2": 3.0}}),
        "unknown argument 'guidance_scale2': did you mean 'guidance_scale_2'?",
    ),
    (
        "noise-in-the-solver",
        settings("cogvideox", sampler={"arguments": {"eta": 0.5}}),
        "scheduler CogVideoXDDIMScheduler with eta=0.5 is not supported. Use eta=0",
    ),
    # The experiments.
    (
        "repeat-with-unipc",
        settings(patch={"kind": "step_skip", "mode": "repeat", "step": 1}),
        "does not allow the schedule edit 'repeat': it keeps a history of steps or derives their size. It allows drop.",
    ),
    ("head", settings(patch={**PATCH, "component": "attn1", "head": 2}), "e.head: 2 is out of range; this model and"),
    ("which-heads", settings(patch={**PATCH, "component": "attn1", "head": 2}), "have heads 0 to 1"),
    ("layer", settings(patch={**PATCH, "layer": [3]}), "this model and sampler have layers 0 to 2"),
    ("step", settings(patch={**PATCH, "step": [4]}), "this model and sampler have steps 0 to 3"),
    (
        "text-on-wan",
        settings(patch={**PATCH, "stream": "text"}),
        "This model carries text tokens in no component: text enters it by cross-attention alone",
    ),
    (
        "cross-attention-on-cogvideox",
        settings("cogvideox", patch={**PATCH, "component": "attn2"}),
        "unknown component 'attn2': did you mean 'attn1'? allowed: attn1, ffn, update, residual",
    ),
    (
        "second-expert-on-one",
        settings(patch={**PATCH, "denoiser": "transformer_2"}),
        "step 0 is not computed by 'transformer_2': transformer computes steps [0, 1, 2, 3]",
    ),
    (
        "other-expert",
        settings("a14b", patch={**PATCH, "denoiser": "transformer_2"}),
        "step 0 is not computed by 'transformer_2': transformer computes steps [0, 1]; transformer_2 computes steps",
    ),
    (
        "unguided-branch",
        settings(sampler={"guidance_scale": 1.0}, patch={**PATCH, "branch": "uncond"}),
        "branch 'uncond' is not computed by this sampler; it has cond, both",
    ),
    # The output.
    (
        "previews-without-videos",
        settings(decode=False) | {"previews": {"samples": [0]}},
        "previews.samples: previews are videos, and this task decodes none: set samples: []",
    ),
]


@pytest.mark.parametrize(("data", "message"), [pytest.param(d, m, id=name) for name, d, m in REFUSALS])
def test_a_plan_is_refused_in_one_sentence(data, message, here, capsys):
    assert message in refused(data, capsys)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        pytest.param({"pairs": []}, "task.pairs: give at least one", id="no-pairs"),
        pytest.param({"pairs": [{"clean": "a"}]}, "task.pairs.0: corrupted is missing", id="half-a-pair"),
        pytest.param({"pairs": [{"clean": "a", "corrupted": "a"}]}, "are the same prompt: 'a'", id="same-prompt"),
        pytest.param(
            {"pairs": [{"clean": "a b", "corrupted": "a  b "}]}, "are the same prompt: 'a b'", id="same-words"
        ),
        pytest.param({"pairs": PAIRS * 2}, "a pair is listed twice; for more noise on one pair use seeds", id="twice"),
        pytest.param(
            {"pairs": [{**PAIRS[0], "imgae": "x"}]},
            "task.pairs.0.imgae: unknown key 'imgae': did you mean 'image'? allowed: clean, corrupted, image, kind",
            id="typo-in-a-pair",
        ),
        pytest.param({"size": 3}, "unknown key 'size'", id="typo"),
        pytest.param({"seeds": 0}, "task.seeds", id="no-seeds"),
        pytest.param({"height": "480"}, "task.height: Input should be a valid integer, got '480'", id="height-as-text"),
        pytest.param({"image": "gone.png"}, "task.image: image gone.png cannot be read: No such file", id="no-image"),
        pytest.param({"image": "."}, "task.image: image . cannot be read: Is a directory", id="folder"),
        pytest.param({"image": "text.png"}, "task.image: text.png is not an image that can be read", id="text-file"),
        pytest.param({"image": "half.png"}, "task.image: ", id="half-an-image"),
    ],
)
def test_a_bad_config_is_refused_in_one_sentence(task, message, here, capsys):
    text = refused(settings(**task), capsys)
    assert message in text
    assert "c.yaml:" in text


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"guidance_scale_2": [1.0]}, id="list"),
        pytest.param({"attention_kwargs": {}}, id="mapping"),
        pytest.param({"guidance_scale_2": float("inf")}, id="infinite"),
    ],
)
def test_arguments_are_scalars(arguments, here, capsys):
    Path("c.yaml").write_text(yaml.safe_dump(settings(sampler={"arguments": arguments})))
    assert main(["plan", "c.yaml"]) == BAD_INPUT
    assert "sampler.arguments" in capsys.readouterr().err


def test_a_metric_of_videos_needs_videos(here, monkeypatch, capsys):
    from pipeline.metrics.metric import METRICS, Metric

    shown = Metric(name="shown", long_name="s", description="s.", tasks=(), compute=lambda given: given.video.mean())
    monkeypatch.setitem(METRICS, "shown", shown)
    data = settings(decode=False) | {"metrics": ["clean_projection", "shown"]}
    assert "metrics.1: shown is a metric of videos, and this task decodes none" in refused(data, capsys)


class TestCheckpoints:
    """What the task needs of a model's files."""

    @pytest.fixture
    def copy(self, here) -> Path:
        shutil.copytree("wan", "copy")
        return here / "copy"

    def change(self, file: Path, **keys: Any) -> None:
        data = json.loads(file.read_text())
        data.update(keys)
        file.write_text(json.dumps({k: v for k, v in data.items() if v != "left out"}))

    @pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
    def test_a_part_that_is_missing_is_named(self, part, copy, capsys):
        self.change(copy / "model_index.json", **{part: [None, None]})
        text = refused(settings("copy"), capsys)
        assert f"prompts needs {part}, which this checkpoint does not have" in text

    def test_settings_that_an_older_file_lacks_are_the_classs_own(self, copy):
        self.change(copy / "vae" / "config.json", scale_factor_temporal="left out", scale_factor_spatial="left out")
        self.change(copy / "transformer" / "config.json", cross_attn_norm="left out")
        task = PromptsTask(**settings("copy")["task"])
        assert task.latent_shape(describe("./copy")) == (5, 4, 6)
        assert describe("./copy").denoiser_config["cross_attn_norm"] is True

    def test_the_latents_follow_the_vae(self, copy):
        self.change(copy / "vae" / "config.json", scale_factor_temporal=8, scale_factor_spatial=16)
        task = PromptsTask(**settings("copy")["task"])
        assert task.latent_shape(describe("./copy")) == (3, 2, 3)

    def test_a_family_without_decoder_offers_latents(self, here, monkeypatch, capsys):
        replaced = {**{k: getattr(FAMILIES["wan"], k) for k in Family.__slots__}, "pixels": _without_decoder()}
        monkeypatch.setitem(FAMILIES, "wan", Family(**replaced))
        text = refused(settings(), capsys)
        assert "task.decode: family wan declares no decoder; set decode: false" in text
        Path("c.yaml").write_text(yaml.safe_dump(settings(decode=False)))
        assert main(["plan", "c.yaml", "--no-calibrate"]) == OK

    def test_a_family_that_is_not_covered_is_named_with_those_that_are(self, here, monkeypatch, capsys):
        replaced = {**{k: getattr(FAMILIES["wan"], k) for k in Family.__slots__}, "pixels": None}
        monkeypatch.setitem(FAMILIES, "wan", Family(**replaced))
        text = refused(settings(), capsys)
        assert "task.name: prompts does not cover family wan; it covers " in text
        assert "cogvideox" in text


def _without_decoder() -> Pixels:
    pixels = FAMILIES["wan"].pixels
    assert pixels is not None
    return Pixels(ratios=pixels.ratios, channels=pixels.channels, decode=no_decoder)


class TestSamples:
    def test_are_pairs_and_seeds(self):
        pairs = [*PAIRS, {"clean": "a", "corrupted": "b", "kind": "letters"}]
        samples = PromptsTask(pairs=pairs, seeds=2).samples()
        assert [s.index for s in samples] == [0, 1, 2, 3]
        assert [(s.prompt, s.seed) for s in samples] == [
            ("pair-000", 0), ("pair-000", 1), ("pair-001", 0), ("pair-001", 1)
        ]  # fmt: skip
        assert [s.pair for s in samples] == ["prompts", "prompts", "letters", "letters"]
        assert (samples[0].clean_prompt, samples[0].corrupted_prompt) == ("a red ball", "a blue ball")

    @pytest.mark.parametrize(
        ("size", "preview"),
        [
            pytest.param((480, 832), (74, 128), id="wide"),
            pytest.param((832, 480), (128, 74), id="tall"),
            pytest.param((32, 48), (32, 48), id="small-as-it-is"),
        ],
    )
    def test_previews_are_at_most_128_pixels(self, size, preview):
        assert PromptsTask(pairs=PAIRS, height=size[0], width=size[1]).preview_size() == preview


@pytest.mark.parametrize(
    ("patch", "temporal", "legal", "illegal"),
    [
        pytest.param((1, 2, 2), 4, (1, 5, 81), (0, 2, 80, 84), id="wan"),
        pytest.param((2, 2, 2), 4, (5, 13, 85), (1, 9, 81), id="two-latent-frames-a-token"),
        pytest.param((1, 1, 1), 8, (1, 9, 161), (8, 160), id="ltx"),
        pytest.param((1, 2, 2), 1, (1, 2, 16), (0,), id="no-compression-in-time"),
    ],
)
def test_legal_numbers_of_frames(patch, temporal, legal, illegal):
    pixels = Pixels(ratios=lambda config: (temporal, 8))
    offset, step = pixels.grid({}, patch)[0]

    def fits(frames: int) -> bool:
        return frames >= offset + step and (frames - offset) % step == 0

    assert all(fits(f) for f in legal)
    assert not any(fits(f) for f in illegal)
    assert all(pixels.extent({}, (f, 32, 32))[0] % patch[0] == 0 for f in legal)


def test_the_scaling_of_an_ltx_autoencoder_says_its_ratios():
    config = {
        "spatio_temporal_scaling": [True, True, True, False],
        "patch_size": 4,
        "patch_size_t": 1,
        "spatial_compression_ratio": None,
        "temporal_compression_ratio": None,
    }
    assert scaling_ratios(config) == (8, 32)
    assert scaling_ratios({**config, "spatial_compression_ratio": 16, "temporal_compression_ratio": 4}) == (4, 16)


class TestExample:
    """The config and the page for a user's own checkpoint, which is not downloaded here."""

    def test_the_config_is_valid(self):
        config = load_config(ROOT / "configs" / "prompts_example.yaml")
        task = config.build_task()
        assert isinstance(task, PromptsTask)
        assert len(task.samples()) == len(task.pairs) * task.seeds
        assert "image" not in {key for pair in config.task["pairs"] for key in pair}

    def test_every_sweep_of_the_page_is_valid(self):
        from pipeline import yaml_source
        from tests.unit.test_docs import blocks

        texts = blocks(ROOT / "docs" / "your_checkpoint.md", "yaml")
        models = []
        for text in texts:
            raw, lines = yaml_source.read(text, "your_checkpoint.md")
            models.append(validate(raw, lines, "your_checkpoint.md").model.id)
        assert any("A14B" in model for model in models)
        assert any("CogVideoX" in model for model in models)

    def test_its_sizes_fill_whole_tokens_of_the_published_models(self, here):
        """A checkpoint's size does not follow from its weights, so tiny ones of the same layout must accept it."""
        data = yaml.safe_load((ROOT / "configs" / "prompts_example.yaml").read_text())
        data["model"]["id"] = "./wan"
        for experiment in data["experiments"].values():
            if "layer" in experiment:
                experiment["layer"] = 0
        Path("c.yaml").write_text(yaml.safe_dump(data))
        plan = make_plan(load_config(Path("c.yaml")))
        assert plan.task.latent_shape(plan.model) == (21, 60, 104)


def test_a_config_names_every_problem_of_its_size_at_once(here):
    Path("c.yaml").write_text(yaml.safe_dump(settings(frames=16, height=40, width=50)))
    with pytest.raises(ConfigError) as caught:
        make_plan(load_config(Path("c.yaml")), Path("c.yaml"))
    assert len(str(caught.value).splitlines()) == 3
