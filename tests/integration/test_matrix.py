"""Every kind of intervention on every family: the engine against bare runs with plain hooks."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from interventions.base import KINDS, Intervention, RunRef, Schedule
from interventions.engine import Engine
from interventions.families.family import FAMILIES, family_of
from interventions.record import Record, RunInputs
from interventions.sites import Geometry, NoSuchSiteError
from tests import families
from tests.families._weights import normal
from tests.reference.cells import cells
from tests.reference.layouts import LAYOUTS
from tests.reference.recipes import RECIPES, result
from tests.reference.world import World

STEPS, TOLERANCE = 4, 1e-5
SAMPLES, OWN = 3, 1
"""Samples of the sweep, and the one at hand: neither the first nor the last, so that offsets show."""
MODULES = {
    m.name: importlib.import_module(f"{families.__name__}.{m.name}") for m in pkgutil.iter_modules(families.__path__)
}
NAMES = tuple(name for name, module in MODULES.items() if hasattr(module, "build") and hasattr(module, "arguments"))


FIRST = {"kandinsky5": 2}
"""First block with video tokens, where there are blocks of text alone."""
CELLS = cells()


def among(**fields: Any) -> list[str]:
    """Return the cells whose fields have these values."""
    return [n for n, c in CELLS.items() if all(getattr(c, field, None) == value for field, value in fields.items())]


MULTISTEP = dict.fromkeys(
    ("repeat", "swap_steps", "swap_far_steps", "compose_swap"), "does not allow the schedule edit"
)
ONE_EXPERT = {"patch_second_expert": "is not computed by 'transformer_2'"}
NO_TEXT_IN_ATTN1 = {"cut_text_attn1": "attn1 of this model reads no text"}
CROSSING = {**dict.fromkeys(among(stream="text"), "text enters it by cross-attention alone"), **NO_TEXT_IN_ATTN1}
JOINT = {
    **dict.fromkeys(among(component="attn2"), "no block has attn2"),
    "cut_text_attn2": "No block of this model has such attention",
    **ONE_EXPERT,
}
LINEAR = dict.fromkeys(
    [n for n in among(kind="knockout") if CELLS[n].pattern != "text"] + ["compose_attention"],  # type: ignore[attr-defined]
    "no softmax attention attn1",
)
TWO_KINDS = "are of two kinds and cannot change places"
REFUSED: dict[str, dict[str, str]] = {
    "wan": {**CROSSING, **ONE_EXPERT, **MULTISTEP},
    "wan22_a14b": {**CROSSING, **MULTISTEP},
    "wan22_ti2v": {**CROSSING, **ONE_EXPERT, **MULTISTEP},
    "wan_i2v21": {**CROSSING, **ONE_EXPERT, **MULTISTEP},
    "skyreels_v2": {**CROSSING, **ONE_EXPERT, **MULTISTEP},
    "ltx": {**CROSSING, **ONE_EXPERT},
    "ltx2": {**CROSSING, **ONE_EXPERT, "block_swap_far": "no such site"},
    "cogvideox": JOINT,
    "hunyuan_video": {**JOINT, "block_swap_far": TWO_KINDS},
    "hunyuan_video15": JOINT,
    "mochi": {**JOINT, "block_swap_far": TWO_KINDS},
    "allegro": {**CROSSING, **ONE_EXPERT},
    "sana_video": {**CROSSING, **ONE_EXPERT, **MULTISTEP, **LINEAR},
    "kandinsky5": {**ONE_EXPERT, **NO_TEXT_IN_ATTN1},
    "cosmos": {**CROSSING, **ONE_EXPERT},
    # Space and time take turns: spatial blocks read text, temporal ones read other frames.
    "latte": {
        **CROSSING,
        **ONE_EXPERT,
        "ensemble_attn2": "attn2 exists in blocks [0, 2]",
        "block_swap": TWO_KINDS,
        "cut_local": "It can be cut in blocks [1, 3]",
        "cut_text_attn2": "It can be cut in blocks [0, 2]",
    },
}
"""Cells that a family does not have, and what the refusal must say."""


@dataclass
class Case:
    """A family's engine with its recorded runs and their forks, and a second pipeline that no engine has touched."""

    name: str
    module: ModuleType
    engine: Engine
    record: Record
    world: World
    cells: dict[str, Intervention]
    records: dict[tuple[int, int], Record] = field(default_factory=dict)
    batches: dict[Schedule | None, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def geometry(self) -> Geometry:
        return self.record.geometry

    def other(self, ref: RunRef) -> Record:
        key = place_of(ref)
        if key not in self.records:
            self.records[key] = self.engine.record(run_inputs(self.module, self.engine.pipe, *key))
        return self.records[key]

    def fork(self, rows: list[Intervention]) -> torch.Tensor:
        return self.engine.fork(self.record, rows, others=self.other).final

    def together(self, name: str) -> torch.Tensor:
        """Return a cell's result from the batch of all cells of its schedule."""
        schedule = self.cells[name].schedule
        if schedule not in self.batches:
            names = [n for n, c in self.cells.items() if n not in REFUSED[self.name] and c.schedule == schedule]
            finals = self.fork([self.cells[n] for n in names])
            self.batches[schedule] = dict(zip(names, finals, strict=True))
        return self.batches[schedule][name]


def place_of(ref: RunRef) -> tuple[int, int]:
    """Return the sample and the seed of a run."""
    return (ref.sample if ref.fixed else OWN + ref.sample) % SAMPLES, ref.seed


def run_inputs(module: ModuleType, pipe: Any, sample: int, seed: int) -> RunInputs:
    """Return a sample's inputs: other prompts than the next sample, and noise by sample and seed."""
    shared, per_run = module.arguments(pipe, steps=STEPS, guidance=True)
    changed = {}
    for k, (name, value) in enumerate(per_run.items()):
        new = value.clone()
        if "latents" in name and (sample, seed) != (0, 0):
            new[:] = normal(1000 * sample + 100 * seed + k, *value.shape[1:])
        elif value.is_floating_point() and "mask" not in name:
            new += 0.7 * sample * normal(7000 + 100 * sample + k, *value.shape)
        changed[name] = new
    return RunInputs(shared=shared, per_run=changed, names=("clean", "corrupted"), seed=(sample,))


@pytest.fixture(scope="module", params=NAMES)
def case(request) -> Case:
    torch.set_num_threads(1)
    module = MODULES[request.param]
    hosted, bare = module.build(), module.build()
    engine = Engine(hosted, family_of(type(hosted).__name__))
    record = engine.record(run_inputs(module, hosted, OWN, 0))

    def inputs(ref: RunRef) -> tuple[Any, Any, int]:
        found = run_inputs(module, bare, *place_of(ref))
        return found.shared, found.per_run, found.names.index(ref.run)

    world = World(bare, LAYOUTS[request.param], inputs, (OWN,))
    return Case(request.param, module, engine, record, world, cells(FIRST.get(request.param, 0)))


def test_bare_runs_are_the_pipelines_own(case):
    """Reading everything changes nothing, and the engine's record is the same run."""
    for run in case.record.inputs.names:
        trace, row = case.world.trace(RunRef(run)), case.record.row(run)
        shared, per_run, _ = case.world.inputs(RunRef(run))
        one = {name: value[row : row + 1] for name, value in per_run.items()}
        final = case.world.pipe(**shared, **one, output_type="latent", return_dict=False)[0]
        layout = case.world.layout
        assert torch.equal(trace.final, layout.rows(final, shared, layout.returned)[0])
        assert (trace.final - case.record.final[row]).abs().max() < TOLERANCE * trace.final.abs().max()


@pytest.mark.parametrize("name", CELLS)
def test_cell_equals_plain_hooks(name, case):
    """The result is that of a bare run with hooks, in a batch of all cells and alone; or the cell is refused."""
    cell, reason = case.cells[name], REFUSED[case.name].get(name)
    if reason is not None:
        with pytest.raises(NoSuchSiteError, match=re.escape(reason)):
            cell.check(case.geometry)
        return
    cell.check(case.geometry)
    expected, together = result(cell, case.world), case.together(name)
    scale = expected.abs().max()
    assert (together - expected).abs().max() < TOLERANCE * scale
    assert (together - case.fork([cell])[0]).abs().max() < TOLERANCE * scale
    assert (expected - case.record.final[case.record.row(cell.recipient)]).abs().max() > TOLERANCE * scale


def choices(annotation: Any) -> set[Any]:
    """Return the values that a field of names can have."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*(choices(inner) for inner in get_args(annotation)))


def test_every_kind_mode_and_pattern_has_a_cell_and_a_recipe():
    """What a kind adds of its own is in the matrix with all its names; a self-patch is no change by definition."""
    assert set(RECIPES) == set(KINDS) == {c.kind for c in CELLS.values()}
    exempt = {("patch", "direction", "self")}
    for kind, cls in KINDS.items():
        for name in set(cls.__annotations__) & set(cls.model_fields):
            used = {getattr(c, name) for c in CELLS.values() if c.kind == kind}
            missing = {(kind, name, value) for value in choices(cls.model_fields[name].annotation) - used}
            assert missing <= exempt


def test_every_family_has_a_pipeline_in_the_matrix():
    built = {type(MODULES[name].build()).__name__ for name in NAMES}
    assert {family_of(name).name for name in built} == set(FAMILIES)
    assert set(LAYOUTS) == set(REFUSED) == set(NAMES)
