"""A model folder from a stranger: no file of it runs as code, and weights are safetensors unless allowed else."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.cli import BAD_INPUT, OK, main
from pipeline.models import ModelError, describe, load_pipeline, pickled_files
from tests.sweep_fixture import save_tiny_model, tiny_config, write_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """A copy of a good model in an own directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def marker(tmp_path):
    """What code of the folder would write."""
    return tmp_path / "marker"


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def plant(file: Path, marker: Path) -> None:
    """Write a module that leaves the marker, with classes of every name that is asked for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from diffusers import *\n"
        "class Own(WanImageToVideoPipeline):\n    pass\n"
        "def __getattr__(name):\n    return Own\n"
    )


def load(folder: Path):
    return load_pipeline(describe(str(folder)), dtype="float32", device="cpu")


CLASSES = {
    "pipeline-of-the-folder": (
        {"_class_name": ["pipeline", "Own"]},
        "the class of its pipeline is ['pipeline', 'Own']",
    ),
    "pipeline-by-path": ({"_class_name": ["../evil", "Own"]}, "the class of its pipeline is"),
    "pipeline-number": ({"_class_name": 5}, "the class of its pipeline is 5"),
    "pipeline-missing": ({"_class_name": None}, "the class of its pipeline is None"),
    "component-of-the-folder": ({"vae": ["own", "Own"]}, "component vae is ['own', 'Own']"),
    "component-of-a-module": ({"vae": ["evil", "Own"]}, "component vae is ['evil', 'Own']"),
    "component-of-the-system": ({"vae": ["os", "system"]}, "component vae is ['os', 'system']"),
    "component-dotted": ({"vae": ["diffusers.utils.dynamic_modules_utils", "x"]}, "component vae is"),
    "component-path": ({"vae": ["../../evil", "Own"]}, "component vae is"),
    "component-odd": ({"vae": ["diffusers"]}, "component vae is ['diffusers']"),
    "component-numbers": ({"vae": [1, 2]}, "component vae is [1, 2]"),
    "tokenizer-of-the-folder": ({"tokenizer": ["own", "Own"]}, "component tokenizer is ['own', 'Own']"),
}


@pytest.mark.parametrize(("settings", "said"), CLASSES.values(), ids=list(CLASSES))
def test_a_class_of_its_own_is_refused_and_does_not_run(folder, marker, settings, said, capsys):
    for place in ("pipeline.py", "own.py", "vae/own.py", "tokenizer/own.py", "../evil.py", "vae/evil.py"):
        plant(folder / place, marker)
    change(folder / "model_index.json", **settings)
    assert main(["check", str(folder)]) == BAD_INPUT
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not marker.exists()


NAMES_CODE = {
    "text-encoder": ("text_encoder/config.json", {"auto_map": {"AutoModel": "own.Own", "AutoConfig": "own.Own"}}),
    "tokenizer": ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}),
    "denoiser": ("transformer/config.json", {"auto_map": {"AutoModel": "own.Own"}}),
    "codec": ("vae/config.json", {"auto_map": {"AutoModel": "own.Own"}}),
    "pipeline": ("model_index.json", {"custom_pipeline": "pipeline", "_custom_pipeline": "pipeline"}),
    "trust": ("model_index.json", {"trust_remote_code": True}),
}


@pytest.mark.parametrize(("file", "settings"), NAMES_CODE.values(), ids=list(NAMES_CODE))
def test_settings_that_name_code_run_none(folder, marker, file, settings):
    """The model loads as what it says it is, without what lies beside it."""
    for place in (".", "text_encoder", "tokenizer", "transformer", "vae"):
        for name in ("own.py", "pipeline.py", "modeling_own.py", "__init__.py"):
            plant(folder / place / name, marker)
    change(folder / file, **settings)
    pipe = load(folder)
    assert type(pipe).__name__ == "WanImageToVideoPipeline"
    assert type(pipe).__module__.startswith("diffusers.")
    assert not marker.exists()


def test_modules_beside_a_model_are_not_imported(folder, marker, monkeypatch, capsys):
    """Even with the folder as working directory."""
    for name in ("diffusers.py", "torch.py", "safetensors.py", "yaml.py", "own.py"):
        plant(folder / name, marker)
    monkeypatch.chdir(folder)
    assert main(["check", "."]) == OK
    assert not marker.exists()


class _Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def pickled(folder: Path, component: str = "transformer") -> Path:
    """Save a component's weights as a pickle instead."""
    (file,) = (folder / component).glob("*.safetensors")
    target = file.with_name("pytorch_model.bin" if component == "text_encoder" else f"{file.stem}.bin")
    torch.save(load_file(file), target)
    file.unlink()
    return target


class TestPickledWeights:
    @pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
    @pytest.mark.parametrize("command", ["check", "plan", "run"])
    def test_refused_with_what_to_do(self, folder, component, command, capsys):
        if not list((folder / component).glob("*.safetensors")):
            pytest.skip("this component has no weights")
        file = pickled(folder, component)
        config = write_config(folder.parent / "c.yaml", tiny_config(folder))
        assert main([command, str(folder if command == "check" else config)]) == BAD_INPUT
        said = capsys.readouterr().err
        assert f"weights are pickled: {file.relative_to(folder)}. Such files can run code when they are loaded." in said
        assert "add to the command: --allow-pickled-weights" in said
        assert said.count("\n") == 1

    def test_loaded_where_the_command_allows_it(self, folder, capsys):
        before = load(folder).transformer.state_dict()
        pickled(folder)
        assert main(["check", str(folder), "--allow-pickled-weights"]) == OK
        info = describe(str(folder), pickled_weights=True)
        assert info.pickled
        after = load_pipeline(info, dtype="float32", device="cpu").transformer.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_the_permission_reaches_the_replica(self, folder, capsys):
        pickled(folder)
        raw = tiny_config(folder, experiments={"map": {"kind": "patch", "step": 0, "layer": 0, "component": "attn2"}})
        config = write_config(folder.parent / "c.yaml", raw)
        assert main(["run", str(config), "--store", "s.zarr", "--allow-pickled-weights"]) == OK

    @pytest.mark.parametrize(
        "setting", [{"pickled_weights": True}, {"allow_pickled_weights": True}, {"use_safetensors": False}], ids=str
    )
    def test_no_config_allows_it(self, folder, capsys, setting):
        pickled(folder)
        raw = tiny_config(folder)
        config = write_config(folder.parent / "c.yaml", {**raw, "model": {**raw["model"], **setting}})
        assert main(["plan", str(config), "--no-calibrate"]) == BAD_INPUT
        assert "unknown key" in capsys.readouterr().err

    def test_they_belong_to_the_digest(self, folder):
        file = pickled(folder)
        first = describe(str(folder), pickled_weights=True)
        weights = torch.load(file, weights_only=True)
        weights[next(iter(weights))] += 1
        torch.save(weights, file)
        second = describe(str(folder), pickled_weights=True)
        assert first.digest != second.digest
        assert first.fingerprint != second.fingerprint

    def test_beside_safetensors_they_are_not_looked_at(self, folder, marker):
        (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(_Runs(marker)))
        index = json.loads((folder / "model_index.json").read_text())
        assert pickled_files(folder, index) == []
        load(folder)
        load_pipeline(describe(str(folder), pickled_weights=True), dtype="float32", device="cpu")
        assert not marker.exists()

    def test_a_pickle_that_runs_code_does_not_even_where_allowed(self, folder, marker):
        """The loader reads tensors and nothing else; that holds for the versions of torch that are supported."""
        pickled(folder).write_bytes(pickle.dumps(_Runs(marker)))
        info = describe(str(folder), pickled_weights=True)
        with pytest.raises(ModelError, match="cannot be loaded"):
            load_pipeline(info, dtype="float32", device="cpu")
        assert not marker.exists()


class TestSettings:
    @pytest.mark.parametrize(
        "settings",
        [
            {"_class_name": "UniPC"},
            {"_class_name": "DiffusionPipeline"},
            {"_class_name": ["own", "Own"]},
            {"num_train_timesteps": "many"},
            {"num_train_timesteps": 0},
            {"shift": [1]},
        ],
        ids=str,
    )
    def test_a_scheduler_that_makes_no_sense_is_one_sentence(self, folder, settings, capsys):
        change(folder / "scheduler" / "scheduler_config.json", **settings)
        config = write_config(folder.parent / "c.yaml", tiny_config(folder))
        assert main(["plan", str(config), "--no-calibrate"]) == BAD_INPUT
        said = capsys.readouterr().err
        assert said.startswith("stepscope: ")
        assert said.count("\n") == 1
