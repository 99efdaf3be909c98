"""``stepscope check``: run every control of a family on a model's smallest run."""

from __future__ import annotations

from dataclasses import dataclass

from interventions.controls import STEPS, Control, run_controls
from interventions.engine import Engine
from interventions.families.family import Family, UnsupportedModelError, family_of
from interventions.record import RunInputs
from interventions.solvers import UnsupportedSolverError, describe
from pipeline.models import ModelError, load_pipeline
from pipeline.models import describe as describe_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What the controls found.

    Attributes
    ----------
    family : the adapter. pipeline : class of the pipeline. solver : class and order of its solver.
    controls : by whether guidance was on.
    """

    family: Family
    pipeline: str
    solver: str
    controls: dict[bool, list[Control]]

    @property
    def passed(self) -> bool:
        """Whether every control passed."""
        return all(control.passed for controls in self.controls.values() for control in controls)


def check_model(model_id: str, *, dtype: str, device: str, pickled_weights: bool = False) -> Check:
    """Load a model and run the controls on it, with guidance and without.

    Parameters
    ----------
    pickled_weights : whether weights that are not safetensors are accepted.

    Raises
    ------
    ModelError : the model cannot be loaded, or its family or solver is not covered.
    ControlError : a step cache is active.
    """
    info = describe_model(model_id, pickled_weights=pickled_weights)
    pipe = load_pipeline(info, dtype=dtype, device=device)
    family = family_of(type(pipe).__name__)
    try:
        engine = Engine(pipe, family)
        controls = {guided: run_controls(engine, example_inputs(family, pipe, guided)) for guided in family.calls}
    except (UnsupportedSolverError, UnsupportedModelError) as error:
        raise ModelError(f"model {model_id!r}: {error}") from error
    return Check(family=family, pipeline=type(pipe).__name__, solver=describe(engine.solver.kind), controls=controls)


def example_inputs(family: Family, pipe: object, guided: bool) -> RunInputs:
    """Return the family's smallest run with random conditioning.

    Raises
    ------
    ModelError : the family declares no example.
    """
    if family.example is None:
        raise ModelError(f"family {family.name} declares no example run, so it cannot be checked without a task")
    shared, per_run = family.example(pipe, STEPS, guided)
    return RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,))


def as_rows(check: Check) -> list[tuple[str, str, str]]:
    """Return the table that the command prints: guidance, control, outcome with its figure."""
    return [
        (
            "on" if guided else "off",
            control.name,
            f"{'pass' if control.passed else 'FAIL'}  {control.difference:.2g} of {control.limit:.2g}",
        )
        for guided, controls in check.controls.items()
        for control in controls
    ]
