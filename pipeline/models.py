"""Where models come from: embedded ones, diffusers folders and hub names, all through ``from_pretrained``."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interventions import families as _families  # noqa: F401  (registers every family)
from interventions.families.family import UnknownFamilyError, UnsupportedModelError, family_of
from interventions.sites import Geometry
from interventions.solvers import UnsupportedSolverError
from pipeline.tasks.task import Sampler, Task

_RUN_FILES = (".safetensors", ".json", ".model", ".txt")
EMBEDDED = {"embedded:maze": Path(__file__).parent / "embedded" / "maze"}


class ModelError(ValueError):
    """A model id that cannot be turned into a pipeline; the message says what would be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model as its files describe it, without loading weights.

    Attributes
    ----------
    id : as written in the config. folder : diffusers folder. family : name of the adapter.
    pipeline_config : parsed ``model_index.json``.
    denoiser_config : the denoiser's ``config.json``, with its class's defaults for what an older file lacks.
    fingerprint : sha256 over the weight files of the denoisers.
    digest : sha256 over every file that takes part in a run: all weights and all settings.
    """

    id: str
    folder: Path
    family: str
    pipeline_config: dict[str, Any]
    denoiser_config: dict[str, Any]
    fingerprint: str
    digest: str

    def scheduler(self) -> Any:
        """Return a scheduler of the model's class and settings.

        Raises
        ------
        ModelError : its class is not one of diffusers'.
        """
        import diffusers

        settings = _read_json(self.folder / "scheduler" / "scheduler_config.json")
        cls = getattr(diffusers, str(settings.get("_class_name")), None)
        if cls is None:
            raise ModelError(f"{self.folder}/scheduler: diffusers has no scheduler {settings.get('_class_name')!r}.")
        return cls.from_config(settings)

    def component(self, name: str) -> dict[str, Any]:
        """Return the settings of a component, with its class's defaults for what an older file lacks.

        Raises
        ------
        ModelError : the model has no such component.
        """
        return _settings(self.folder / name)

    def has(self, name: str) -> bool:
        """Whether ``model_index.json`` lists a component that is there."""
        entry = self.pipeline_config.get(name)
        return isinstance(entry, list) and entry[:1] != [None]

    def geometry(self, task: Task, sampler: Sampler) -> Geometry:
        """Return the extent of a run of this model on a task.

        Raises
        ------
        ModelError : the model's scheduler, its settings or the call's arguments are not understood.
        """
        family = family_of(self.pipeline_config["_class_name"])
        try:
            call = {**family.guided(sampler.guidance_scale), **sampler.arguments}
            guided = sampler.guidance_scale > 1 if family.guider else family.guidance(call)
            return family.geometry(
                self.pipeline_config,
                self.denoiser_config,
                scheduler=self.scheduler(),
                steps=sampler.steps,
                guidance=guided,
                latent_shape=task.latent_shape(self),
            )
        except (UnsupportedSolverError, UnsupportedModelError) as error:
            raise ModelError(f"model {self.id!r}: {error}") from error


def resolve(model_id: str) -> Path:
    """Turn a model id into a local diffusers folder, downloading a hub name if needed.

    Raises
    ------
    ModelError : no such embedded model or folder, or the hub did not give it.
    """
    if model_id in EMBEDDED:
        return EMBEDDED[model_id]
    if model_id.startswith("embedded:"):
        near = difflib.get_close_matches(model_id, EMBEDDED, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(EMBEDDED)}."
        raise ModelError(f"unknown embedded model {model_id!r}.{hint}")
    # os.path answers where pathlib raises: an unknown user, a name too long, a folder that may not be read.
    folder = os.path.expanduser(model_id)
    if os.path.isdir(folder):
        return Path(folder)
    if model_id.count("/") != 1 or model_id.startswith((".", "/", "~")):
        raise ModelError(
            f"unknown model {model_id!r}: not an embedded model ({', '.join(EMBEDDED)}), not a folder, "
            "not a hub name like owner/name."
        )
    return _download(model_id)


def _download(name: str) -> Path:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ModelError(
            f"model {name!r} could not be fetched from the hub: {type(error).__name__}: {reason[:300]}"
        ) from error


def describe(model_id: str) -> ModelInfo:
    """Read a model's configuration files.

    Raises
    ------
    ModelError : not a diffusers folder, or no family adapter covers its pipeline class.
    """
    folder = resolve(model_id)
    index = folder / "model_index.json"
    if not os.path.exists(index):
        raise ModelError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json.")
    pipeline_config = _read_json(index)
    try:
        family = family_of(pipeline_config.get("_class_name", "?"))
    except UnknownFamilyError as error:
        raise ModelError(f"model {model_id!r}: {error}") from error
    denoiser = folder / family.denoiser
    weights = sorted(f for name in family.denoisers for f in (folder / name).glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{denoiser} holds no safetensors weights. Save the pipeline with safe_serialization=True.")
    return ModelInfo(
        id=model_id,
        folder=folder,
        family=family.name,
        pipeline_config=pipeline_config,
        denoiser_config=_settings(denoiser),
        fingerprint=_fingerprint(weights),
        digest=_fingerprint([index, *sorted(f for f in folder.glob("*/*") if f.suffix in _RUN_FILES)]),
    )


def _settings(component: Path) -> dict[str, Any]:
    import diffusers

    data = _read_json(component / "config.json")
    cls = getattr(diffusers, str(data.get("_class_name")), None)
    parameters = inspect.signature(cls.__init__).parameters if cls is not None else {}
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty} | data


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {file} of the model: {error.strerror}.") from error
    except ValueError as error:
        raise ModelError(f"{file} of the model is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{file} of the model holds no settings: {data!r}.")
    return data


def _fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def load_pipeline(info: ModelInfo, *, dtype: str, device: str) -> Any:
    """Load the pipeline with diffusers' own loader (safetensors only, no remote code) onto a device.

    Parameters
    ----------
    dtype : "float32", "bfloat16" or "float16". device : "auto", "cpu" or "cuda".
    """
    import torch
    from transformers.utils import logging as transformers_logging

    # Said of image processors that no pipeline here uses, at the import of every Wan pipeline.
    transformers_logging.set_verbosity_error()
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    # diffusers loads a component class only from a module that is already imported, never from one a folder names.
    import pipeline.embedded.codec  # noqa: F401

    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    # A codec in place of the VAE and T5 in place of UMT5 are meant; diffusers would warn of each at every load.
    logging.set_verbosity_error()
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda: no CUDA device is seen here. Set model.device (or --device) to cpu or auto.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(info.folder), dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
        )
    except AttributeError as error:
        raise ModelError(
            f"model {info.id!r}: diffusers has no pipeline class {info.pipeline_config['_class_name']}, so no command "
            "can load it. From Python: interventions.engine.Engine(pipe, family), interventions.controls.run_controls."
        ) from error
    except (ValueError, OSError) as error:
        # diffusers says which component is missing or broken, over many lines.
        reason = " ".join(str(error).split())[:400]
        raise ModelError(f"model {info.id!r} cannot be loaded: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
