"""Where models come from: embedded ones, diffusers folders and hub names, all through ``from_pretrained``."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interventions import families as _families  # noqa: F401  (registers every family)
from interventions.families.family import UnknownFamilyError, UnsupportedModelError, family_of
from interventions.sites import Geometry
from interventions.solvers import UnsupportedSolverError
from pipeline.tasks.task import Sampler, Task
from pipeline.wording import shown

_RUN_FILES = (".safetensors", ".json", ".model", ".txt")
LIBRARIES = ("diffusers", "transformers", "pipeline.embedded.codec")
"""Where the classes of a model's components may come from, besides the pipelines of diffusers."""
PICKLED = (
    "Such files can run code when they are loaded. Save the model again with safe_serialization=True, or, if you trust "
    "whoever made it, add to the command: --allow-pickled-weights"
)
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
    pickled : whether weights that are not safetensors may be loaded.
    """

    id: str
    folder: Path
    family: str
    pipeline_config: dict[str, Any]
    denoiser_config: dict[str, Any]
    fingerprint: str
    digest: str
    pickled: bool = False

    def scheduler(self) -> Any:
        """Return a scheduler of the model's class and settings.

        Raises
        ------
        ModelError : its class is not one of diffusers'.
        """
        import diffusers

        settings = _read_json(self.folder / "scheduler" / "scheduler_config.json")
        cls = getattr(diffusers, str(settings.get("_class_name")), None)
        if not isinstance(cls, type) or not issubclass(cls, diffusers.SchedulerMixin):
            name = shown(settings.get("_class_name"))
            raise ModelError(f"{self.folder}/scheduler: diffusers has no scheduler {name}.")
        make: Any = cls
        try:
            return make.from_config(settings)
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ModelError(f"{self.folder}/scheduler: its settings make no {cls.__name__}: {error}") from error

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


def resolve(model_id: str, *, pickled_weights: bool = False) -> Path:
    """Turn a model id into a local diffusers folder, downloading a hub name if needed.

    Parameters
    ----------
    pickled_weights : whether to download weights that are not safetensors, where a model has no others.

    Raises
    ------
    ModelError : no such embedded model or folder, or the hub did not give it.
    """
    if model_id in EMBEDDED:
        return EMBEDDED[model_id]
    if model_id.startswith("embedded:"):
        near = difflib.get_close_matches(model_id, EMBEDDED, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(EMBEDDED)}."
        raise ModelError(f"unknown embedded model {shown(model_id)}.{hint}")
    # os.path answers where pathlib raises: an unknown user, a name too long, a folder that may not be read.
    folder = os.path.expanduser(model_id)
    if os.path.isdir(folder):
        return Path(folder)
    if model_id.count("/") != 1 or model_id.startswith((".", "/", "~")):
        raise ModelError(
            f"unknown model {shown(model_id)}: not an embedded model ({', '.join(EMBEDDED)}), not a folder, "
            "not a hub name like owner/name."
        )
    return _download(model_id, pickled_weights)


def _download(name: str, pickled_weights: bool) -> Path:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=None if pickled_weights else True))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        advice = f" {PICKLED}" if "safetensors" in reason and not pickled_weights else ""
        raise ModelError(
            f"model {name!r} could not be fetched from the hub: {type(error).__name__}: {reason[:300]}{advice}"
        ) from error


def describe(model_id: str, *, pickled_weights: bool = False) -> ModelInfo:
    """Read a model's configuration files.

    Parameters
    ----------
    pickled_weights : whether weights that are not safetensors are accepted, where a component has no others.

    Raises
    ------
    ModelError : not a diffusers folder, no family adapter covers its pipeline class, code of the folder's own would
        have to run, or weights are pickled and that is not allowed.
    """
    folder = resolve(model_id, pickled_weights=pickled_weights)
    index = folder / "model_index.json"
    if not os.path.exists(index):
        raise ModelError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json.")
    pipeline_config = _read_json(index)
    refuse_foreign_code(model_id, pipeline_config)
    try:
        family = family_of(pipeline_config.get("_class_name", "?"))
    except UnknownFamilyError as error:
        raise ModelError(f"model {shown(model_id)}: {error}") from error
    denoiser = folder / family.denoiser
    pickles = pickled_files(folder, pipeline_config)
    if pickles and not pickled_weights:
        names = ", ".join(str(file.relative_to(folder)) for file in pickles[:3])
        raise ModelError(f"model {shown(model_id)}: weights are pickled: {names}. {PICKLED}")
    files = sorted(f for name in family.denoisers for f in (folder / name).glob("*.safetensors"))
    weights = files or [f for f in pickles if f.parent.name in family.denoisers]
    if not weights:
        raise ModelError(f"{denoiser} holds no safetensors weights. Save the pipeline with safe_serialization=True.")
    return ModelInfo(
        id=model_id,
        folder=folder,
        family=family.name,
        pipeline_config=pipeline_config,
        denoiser_config=_settings(denoiser),
        fingerprint=_fingerprint(weights),
        digest=_fingerprint([index, *sorted([*(f for f in folder.glob("*/*") if f.suffix in _RUN_FILES), *pickles])]),
        pickled=bool(pickles),
    )


def refuse_foreign_code(model_id: str, pipeline_config: Mapping[str, Any]) -> None:
    """Refuse a pipeline or a component whose class is neither diffusers', transformers' nor our codec.

    diffusers runs such code only with ``trust_remote_code``, which nothing here passes; this says so in one sentence,
    before anything is loaded.

    Raises
    ------
    ModelError : naming the class.
    """
    name = pipeline_config.get("_class_name", "?")
    if not isinstance(name, str):
        raise ModelError(
            f"model {shown(model_id)}: the class of its pipeline is {shown(name)}. A class of its own would have "
            "to run code of the model's folder, which is never done. Use a pipeline class of diffusers."
        )
    for component, entry in pipeline_config.items():
        if not isinstance(entry, list) or entry[:1] == [None] or component.startswith("_"):
            continue
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry) or not _is_known(entry[0]):
            raise ModelError(
                f"model {shown(model_id)}: component {component} is {shown(entry)}. Only classes of diffusers and "
                "transformers are loaded; code of the model's folder is never run."
            )


def _is_known(library: str) -> bool:
    if library in LIBRARIES:
        return True
    # Components that belong to one pipeline are named by its folder in diffusers.
    import diffusers.pipelines

    folder = Path(diffusers.pipelines.__file__).parent
    return re.fullmatch(r"[a-z][a-z0-9_]*", library) is not None and (folder / library / "__init__.py").is_file()


def pickled_files(folder: Path, pipeline_config: Mapping[str, Any]) -> list[Path]:
    """List the pickled weights of components that have no safetensors, in order."""
    found: list[Path] = []
    for component, entry in sorted(pipeline_config.items()):
        if isinstance(entry, list) and entry[:1] != [None] and not any((folder / component).glob("*.safetensors")):
            found += sorted((folder / component).glob("*.bin"))
    return found


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


def load_pipeline(info: ModelInfo, *, dtype: str, device: str, device_map: str = "none") -> Any:
    """Load the pipeline with diffusers' own loader onto a device: no remote code, and safetensors unless allowed else.

    Parameters
    ----------
    dtype : "float32", "bfloat16" or "float16". device : "auto", "cpu" or "cuda".
    device_map : "none", or "balanced" to spread the pipeline's parts over all GPUs that are seen.

    Raises
    ------
    ModelError : no such device, fewer than two GPUs to spread over, or diffusers cannot load the model.
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
    spread = device_map != "none"
    if spread and torch.cuda.device_count() < 2:
        raise ModelError(
            f"device_map {device_map}: {torch.cuda.device_count()} GPUs are seen here, it needs 2. "
            "Set run.gpus_per_replica to 2 or more on a machine that has them, or model.device_map to none."
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(info.folder),
            dtype=getattr(torch, dtype),
            use_safetensors=None if info.pickled else True,
            local_files_only=True,
            **({"device_map": device_map} if spread else {}),
        )
    except AttributeError as error:
        raise ModelError(
            f"model {info.id!r}: diffusers has no pipeline class {info.pipeline_config['_class_name']}, so no command "
            "can load it. From Python: interventions.engine.Engine(pipe, family), interventions.controls.run_controls."
        ) from error
    except (ValueError, OSError, RuntimeError) as error:
        # diffusers says which component is missing or broken, over many lines.
        reason = " ".join(str(error).split())[:400]
        raise ModelError(f"model {info.id!r} cannot be loaded: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe if spread else pipe.to(device)
