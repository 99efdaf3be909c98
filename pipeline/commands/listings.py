"""Commands about what there is: models and their controls, tasks, intervention kinds."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from pipeline.commands.options import FAILED, OK, AllowPickledWeights, UsageError, app, print_lines


@app.command
def check(
    model: Annotated[str, Parameter(help="Embedded model, diffusers folder or hub name.")],
    *,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Parameter(help="Precision.")] = "float32",
    device: Annotated[Literal["auto", "cpu", "cuda"], Parameter(help="Where it runs.")] = "auto",
    allow_pickled_weights: AllowPickledWeights = False,
) -> int:
    """Prove on a model's smallest run that sites, edits and replays do exactly what they say.

    Exit code 0: every control passed; 1: one failed; 2: bad input.

    Example: ``stepscope check embedded:maze``
    """
    from pipeline.check import as_rows, check_model

    checked = check_model(model, dtype=dtype, device=device, pickled_weights=allow_pickled_weights)
    print(f"{model}: {checked.pipeline}, family {checked.family.name}, {checked.solver}")
    print(f"{'guidance':>8}  {'control':<46} difference of limit")
    for guided, name, outcome in as_rows(checked):
        print(f"{guided:>8}  {name:<46} {outcome}")
    if checked.family.notes:
        print(f"Note: {checked.family.notes}")
    return OK if checked.passed else FAILED


@app.command
def models() -> int:
    """List the embedded models and the model families, with their pipelines and sites.

    Example: ``stepscope models``
    """
    from pipeline import listing

    return print_lines(listing.models())


@app.command
def tasks() -> int:
    """List the tasks with their settings, and the metrics.

    Example: ``stepscope tasks``
    """
    from pipeline import config as _config  # noqa: F401  (registers tasks and metrics)
    from pipeline import listing

    return print_lines(listing.tasks())


@app.command
def interventions(
    kind: Annotated[str | None, Parameter(help="One kind, with its settings and a YAML example.")] = None,
) -> int:
    """List the intervention kinds with their formulas, or one with its settings and an example.

    Example: ``stepscope interventions patch``
    """
    from pipeline import listing

    try:
        return print_lines(listing.interventions(kind))
    except listing.UnknownKindError as error:
        raise UsageError(str(error)) from error
