"""Models: which ids are found, what is read without weights, and how a wrong folder is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from interventions.families.family import FAMILIES, Blocks, Tap, UnknownFamilyError, family_of, register_family
from pipeline import models
from pipeline.models import EMBEDDED, ModelError, describe, resolve
from pipeline.tasks.maze import MazeTask
from pipeline.tasks.task import Sampler


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model."""
    return Path(shutil.copytree(EMBEDDED["embedded:maze"], tmp_path / "copy"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the hub by one that is down; returns the names that it was asked for."""
    from diffusers import DiffusionPipeline

    asked: list[str] = []

    def down(name: str, **options: Any) -> str:
        asked.append(name)
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(DiffusionPipeline, "download", down)
    return asked


class TestResolve:
    @pytest.mark.parametrize("name", sorted(EMBEDDED))
    def test_embedded_model_is_in_the_package(self, name):
        assert (resolve(name) / "model_index.json").is_file()

    def test_folder_is_itself(self, folder):
        assert resolve(str(folder)) == folder

    def test_tilde_is_the_home(self, folder, monkeypatch):
        monkeypatch.setenv("HOME", str(folder.parent))
        assert resolve("~/copy") == folder

    @pytest.mark.parametrize(
        ("model_id", "message"),
        [
            pytest.param(
                "embedded:mazes", "unknown embedded model 'embedded:mazes'. Did you mean 'embedded:maze'?", id="near"
            ),
            pytest.param(
                "embedded:", "unknown embedded model 'embedded:'. Did you mean 'embedded:maze'?", id="no-name"
            ),
            pytest.param("embeded:maze", "not an embedded model (embedded:maze), not a folder", id="prefix-typo"),
            pytest.param("maze", "unknown model 'maze': not an embedded model (embedded:maze)", id="bare-name"),
            pytest.param("/no/such/folder", "unknown model '/no/such/folder'", id="absolute-path"),
            pytest.param("./folder", "unknown model './folder'", id="relative-path"),
            pytest.param("~/nothing-here", "unknown model '~/nothing-here'", id="home"),
            pytest.param("~no-such-user/x", "unknown model '~no-such-user/x'", id="unknown-user"),
            pytest.param("a/b/c", "unknown model 'a/b/c'", id="two-slashes"),
            pytest.param("x" * 300, "unknown model 'xxx", id="long"),
        ],
    )
    def test_unknown_id_is_refused_without_the_hub(self, offline, model_id, message):
        with pytest.raises(ModelError) as caught:
            resolve(model_id)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert offline == []

    def test_hub_that_is_down_is_one_sentence(self, offline):
        with pytest.raises(
            ModelError, match=r"^model 'owner/name' could not be fetched from the hub: OSError: the hub cannot"
        ):
            resolve("owner/name")
        assert offline == ["owner/name"]

    def test_hub_model_is_its_local_folder(self, folder, monkeypatch):
        from diffusers import DiffusionPipeline

        monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **options: str(folder))
        assert resolve("owner/name") == folder

    def test_file_is_no_model(self, tmp_path):
        (tmp_path / "weights.safetensors").write_bytes(b"")
        with pytest.raises(ModelError, match="unknown model"):
            resolve(str(tmp_path / "weights.safetensors"))


class TestDescribe:
    def test_embedded_model(self):
        info = describe("embedded:maze")
        assert (info.id, info.family) == ("embedded:maze", "wan")
        assert len(bytes.fromhex(info.fingerprint)) == 32

    def test_copy_has_the_same_fingerprint(self, folder):
        assert describe(str(folder)).fingerprint == describe("embedded:maze").fingerprint

    def test_one_byte_of_a_weight_changes_the_fingerprint(self, folder):
        (file,) = (folder / "transformer").glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert describe(str(folder)).fingerprint != describe("embedded:maze").fingerprint

    def test_no_weights_are_loaded(self, folder):
        for file in folder.rglob("*.safetensors"):
            file.write_bytes(b"not a tensor")
        assert describe(str(folder)).denoiser_config["num_layers"] > 0

    @pytest.mark.parametrize(
        ("file", "text", "message"),
        [
            pytest.param(
                "model_index.json",
                None,
                "is not a diffusers pipeline folder: it has no model_index.json.",
                id="no-index",
            ),
            pytest.param("model_index.json", "{", "model_index.json of the model is not valid JSON", id="half-index"),
            pytest.param(
                "model_index.json", "[]", "model_index.json of the model holds no settings: []", id="index-is-a-list"
            ),
            pytest.param(
                "model_index.json", "{}", "no family adapter covers pipeline class ?", id="index-without-class"
            ),
            pytest.param(
                "model_index.json",
                '{"_class_name": "FluxPipeline"}',
                "no family adapter covers pipeline class FluxPipeline. Infer one: interventions.families.generic.infer",
                id="class-of-no-family",
            ),
            pytest.param("transformer/config.json", None, "cannot read", id="no-denoiser-config"),
            pytest.param(
                "transformer/config.json",
                "nonsense",
                "config.json of the model is not valid JSON",
                id="bad-denoiser-config",
            ),
        ],
    )
    def test_wrong_folder_is_one_sentence(self, folder, file, text, message):
        (folder / file).unlink()
        if text is not None:
            (folder / file).write_text(text)
        with pytest.raises(ModelError) as caught:
            describe(str(folder))
        assert message in str(caught.value)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


class TestGeometry:
    def geometry(self, info: Any = None, **sampler: Any) -> Any:
        return (info or describe("embedded:maze")).geometry(MazeTask(), Sampler(**sampler))

    def test_is_that_of_the_files(self):
        config = json.loads((EMBEDDED["embedded:maze"] / "transformer" / "config.json").read_text())
        geometry = self.geometry(steps=7)
        frames, height, width = MazeTask().latent_shape()
        assert geometry.blocks == config["num_layers"]
        assert geometry.steps == 7
        assert geometry.frames == frames // config["patch_size"][0]
        assert (geometry.height, geometry.width) == (
            height // config["patch_size"][1],
            width // config["patch_size"][2],
        )

    def test_image_to_video_gives_the_first_frame(self):
        assert self.geometry().generated_frames == tuple(range(1, MazeTask().latent_shape()[0]))

    @pytest.mark.parametrize(
        ("scale", "branches"),
        [
            pytest.param(1.0, ("cond",), id="off"),
            pytest.param(0.0, ("cond",), id="zero"),
            pytest.param(1.5, ("cond", "uncond"), id="on"),
        ],
    )
    def test_guidance_decides_the_branches(self, scale, branches):
        assert self.geometry(guidance_scale=scale).branches == branches


class TestFamilies:
    @pytest.mark.parametrize("name", ["WanPipeline", "WanImageToVideoPipeline"])
    def test_wan_covers_its_pipelines(self, name):
        assert family_of(name).name == "wan"

    def test_text_to_video_generates_every_frame(self):
        assert FAMILIES["wan"].given_frames({"_class_name": "WanPipeline"}) == 0

    @pytest.mark.parametrize(
        ("expand", "given"), [(True, 1), (False, 0)], ids=["first-frame-clean", "first-frame-beside"]
    )
    def test_image_to_video_gives_a_frame_only_in_the_form_that_keeps_it_clean(self, expand, given):
        config = {"_class_name": "WanImageToVideoPipeline", "expand_timesteps": expand}
        assert FAMILIES["wan"].given_frames(config) == given

    def test_unknown_pipeline_lists_those_that_are_known(self):
        with pytest.raises(
            UnknownFamilyError,
            match=r"no family adapter covers pipeline class X\. Infer one: .* Covered: .*WanPipeline",
        ):
            family_of("X")

    def test_name_is_given_once(self):
        with pytest.raises(ValueError, match="family 'wan' is registered twice"):
            register_family(FAMILIES["wan"])

    def test_components_are_in_forward_order(self):
        blocks = Blocks(path="b", taps={"ffn": Tap(path="f"), "residual": Tap()})
        assert blocks.components == ("ffn", "update", "residual")
        assert FAMILIES["wan"].blocks[0].components == ("attn1", "attn2", "ffn", "update", "residual")


def test_loaded_pipeline_is_on_the_device_in_the_dtype():
    import torch

    pipe = models.load_pipeline(describe("embedded:maze"), dtype="bfloat16", device="cpu")
    weights = pipe.transformer.blocks[0].attn1.to_q.weight
    assert (weights.device.type, weights.dtype) == ("cpu", torch.bfloat16)


def test_a_device_that_is_not_there_is_one_sentence(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"device cuda: no CUDA device is seen here\. Set model\.device"):
        models.load_pipeline(describe("embedded:maze"), dtype="float32", device="cuda")


def test_a_pipeline_that_diffusers_does_not_have_is_one_sentence(tmp_path, monkeypatch):
    from dataclasses import replace

    from pipeline.embedded.build import build_pipeline, save_pipeline

    folder = tmp_path / "model"
    save_pipeline(build_pipeline(1, num_layers=1), folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("WanImageToVideoPipeline", "OwnPipeline"))
    monkeypatch.setitem(FAMILIES, "own", replace(FAMILIES["wan"], name="own", pipelines=("OwnPipeline",)))
    with pytest.raises(ModelError, match="diffusers has no pipeline class OwnPipeline, so no command"):
        models.load_pipeline(describe(str(folder)), dtype="float32", device="cpu")
