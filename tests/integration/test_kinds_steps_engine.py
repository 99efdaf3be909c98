"""Kinds on steps, prompts, latents, blocks and attention edges, through the engine, against plain hooks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from interventions import kinds  # noqa: F401  (registers every kind)
from interventions.base import Intervention
from interventions.engine import Engine
from interventions.families.family import family_of
from interventions.kinds.block_skip import BlockSkip
from interventions.kinds.compose import Compose
from interventions.kinds.knockout import Knockout
from interventions.kinds.latent_swap import LatentSwap
from interventions.kinds.patch import Patch
from interventions.kinds.prompt_swap import PromptSwap
from interventions.kinds.step_skip import StepSkip
from interventions.record import Record, RunInputs
from interventions.sites import NoSuchSiteError
from pipeline.embedded.build import build_pipeline
from pipeline.tasks.maze import MazeTask
from pipeline.tasks.task import Sampler
from tests.reference.hooks import Loop

STEPS = 4
CLEAN, CORRUPTED = 0, 1
FAMILIES = ("wan", "wan22_a14b", "ltx", "cogvideox", "hunyuan_video")
"""Two calls a step and a multistep solver; two experts; one call; text in the sequence; two block lists."""
PROMPT = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")


@dataclass(frozen=True)
class Case:
    """A pipeline hosted by an engine, and its recorded pair; the runs differ in noise and in both prompts."""

    name: str
    engine: Engine
    record: Record

    @property
    def pipe(self) -> Any:
        return self.engine.pipe

    @property
    def one_step(self) -> bool:
        """Whether the solver keeps no history."""
        return "swap" in self.record.geometry.edits

    def fork(self, *rows: Intervention) -> torch.Tensor:
        return self.engine.fork(self.record, rows, others=lambda ref: self.record).final

    def blocks(self, step: int) -> list[Any]:
        denoiser = getattr(self.pipe, self.record.geometry.denoiser(step))
        return [denoiser.get_submodule(a.path) for a in self.engine.family.addresses(denoiser.config)]

    def row(self, branch: str, run: int) -> int:
        call = self.record.geometry.calls[self.record.geometry.call_of(branch)]
        return 2 * call.index(branch) + run

    def bare(self) -> torch.Tensor:
        """Run the pipeline itself, under whatever plain hooks are on it."""
        return self.engine.bare(self.record.inputs)


def different(per_run: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the corrupted run other noise and another negative prompt, so that nothing is shared by accident."""
    changed = dict(per_run)
    for name in ("latents", "negative_prompt_embeds", "negative_pooled_prompt_embeds"):
        if name in per_run:
            drawn = torch.randn(per_run[name][0].shape, generator=torch.Generator().manual_seed(11))
            changed[name] = torch.stack([per_run[name][0], drawn.to(per_run[name])])
    return changed


def maze() -> tuple[Engine, RunInputs]:
    pipe = build_pipeline(7, num_layers=3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=generator))
    task = MazeTask(mazes=1)
    return (
        Engine(pipe, family_of("WanImageToVideoPipeline")),
        task.inputs(pipe, task.samples()[0], Sampler(steps=STEPS, guidance_scale=3.0)),
    )


def tiny(name: str) -> tuple[Engine, RunInputs]:
    module = importlib.import_module(f"tests.families.{name}")
    pipe = module.build()
    shared, per_run = module.arguments(pipe, steps=STEPS, guidance=True)
    engine = Engine(pipe, family_of(type(pipe).__name__))
    return engine, RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,))


@pytest.fixture(scope="module", params=["maze", *FAMILIES])
def case(request) -> Case:
    torch.set_num_threads(1)
    engine, inputs = maze() if request.param == "maze" else tiny(request.param)
    inputs = replace(inputs, per_run=different(dict(inputs.per_run)))
    return Case(request.param, engine, engine.record(inputs))


@pytest.fixture(scope="module")
def loop_case() -> Case:
    torch.set_num_threads(1)
    engine, inputs = maze()
    inputs = replace(inputs, per_run=different(dict(inputs.per_run)))
    return Case("maze", engine, engine.record(inputs))


def loop_of(case: Case) -> Loop:
    return Loop(case.pipe, case.record.inputs, case.record.geometry)


def assert_near(found: torch.Tensor, expected: torch.Tensor, limit: float = 2e-5) -> None:
    scale = float(expected.abs().max())
    assert torch.isfinite(found).all()
    assert float((found - expected).abs().max()) / scale < limit


def assert_moved(found: torch.Tensor, recorded: torch.Tensor, least: float = 1e-3) -> None:
    assert float((found - recorded).abs().max()) / float(recorded.abs().max()) > least


@contextmanager
def now(case: Case) -> Iterator[Callable[[], tuple[int, tuple[str, ...]]]]:
    """Give the step and the branches of the denoiser call at hand, counted with plain hooks."""
    seen: list[None] = []
    calls = case.record.geometry.calls
    with ExitStack() as stack:
        for name in case.record.geometry.denoisers:
            handle = getattr(case.pipe, name).register_forward_pre_hook(lambda module, args: seen.append(None))
            stack.callback(handle.remove)
        yield lambda: ((len(seen) - 1) // len(calls), calls[(len(seen) - 1) % len(calls)])


class TestIdentities:
    def test_what_changes_nothing_is_bit_equal(self, case):
        """Forks of two rows, as the record has: the batch is the same."""
        frames = case.record.geometry.frames
        itself = {"step": 1, "donor": "sample", "branch": "both"}
        cells = [
            LatentSwap(step=0, steps=STEPS, alpha=0.0),
            LatentSwap(step=1, steps=2, donor="seed"),
            LatentSwap(step=2, donor="sample", frames="1"),
            PromptSwap(**itself),
            Knockout(pattern="local", reach=frames - 1, step=1, layer=0),
            Compose(
                parts={"a": {"kind": "latent_swap", "step": 1, "alpha": 0.0}, "b": {"kind": "prompt_swap", **itself}}
            ),
        ]
        for cell in cells:
            assert torch.equal(self.twice(case, cell), case.record.final), cell

    def twice(self, case: Case, cell: Intervention) -> torch.Tensor:
        if isinstance(cell, Compose):
            both = [cell, Compose(parts={n: {**dict(f), "run": "corrupted"} for n, f in cell.parts})]
        else:
            both = [cell, cell.model_copy(update={"run": "corrupted"})]
        return case.fork(*both)


class TestLatentSwap:
    @pytest.mark.parametrize(("run", "donor"), [("clean", CORRUPTED), ("corrupted", CLEAN)])
    def test_at_the_end_gives_the_donors_result(self, case, run, donor):
        assert torch.equal(case.fork(LatentSwap(step=STEPS, run=run))[0], case.record.final[donor])

    def test_at_the_start_with_the_prompt_is_the_donors_run(self, case):
        parts = {"a": {"kind": "latent_swap", "step": 0}, "b": {"kind": "prompt_swap", "step": 0, "branch": "both"}}
        found = case.fork(Compose(parts=parts), Compose(parts=parts))
        for row in found:
            assert_near(row, case.record.final[CORRUPTED])

    @pytest.mark.parametrize("step", range(1, STEPS))
    def test_with_the_prompt_goes_on_as_the_donors_run(self, case, step):
        """For a solver without history: nothing else tells the two runs apart."""
        if not case.one_step:
            pytest.skip("the solver also carries the recipient's predictions")
        parts = {"a": {"kind": "latent_swap"}, "b": {"kind": "prompt_swap", "branch": "both"}}
        found = case.fork(Compose(step=step, parts=parts))
        assert_near(found[0], case.record.final[CORRUPTED])

    @pytest.mark.parametrize(
        ("fields", "steps", "frames"),
        [({"step": 2}, [2], None), ({"step": 1, "steps": 2, "frames": "2-3", "alpha": 0.4}, [1, 2], [2, 3])],
        ids=["whole", "frames"],
    )
    def test_equals_a_written_out_loop(self, loop_case, fields, steps, frames):
        donors: dict[int, torch.Tensor] = {}

        def keep(step, x, _):
            donors[step] = x.clone()
            return x

        def swap(step, x, _):
            if step not in steps:
                return x
            out = x.clone()
            at = slice(None) if frames is None else frames
            alpha = fields.get("alpha", 1.0)
            out[:, :, at] = (1 - alpha) * x[:, :, at] + alpha * donors[step][:, :, at]
            return out

        loop = loop_of(loop_case)
        loop.run(CORRUPTED, edit_latents=keep)
        expected = loop.run(CLEAN, edit_latents=swap)[0][0]
        found = loop_case.fork(LatentSwap(**fields))[0]
        assert_near(found, expected)
        assert_moved(found, loop_case.record.final[CLEAN])

    def test_another_seeds_latents_come_from_its_record(self, loop_case):
        inputs = loop_case.record.inputs
        noise = torch.randn(inputs.per_run["latents"].shape, generator=torch.Generator().manual_seed(3))
        other = loop_case.engine.record(replace(inputs, per_run={**inputs.per_run, "latents": noise}))
        asked = []

        def others(ref):
            asked.append((ref.seed, ref.sample))
            return other

        cell = LatentSwap(step=STEPS, donor="seed", offset=2)
        found = loop_case.engine.fork(loop_case.record, [cell], others=others).final[0]
        assert torch.equal(found, other.final[CLEAN])
        assert set(asked) == {(2, 0)}


class TestPromptSwap:
    @pytest.mark.parametrize("branch", ["cond", "uncond", "both"])
    @pytest.mark.parametrize("run", ["clean", "corrupted"])
    def test_from_the_start_is_the_other_prompt_with_the_own_latents(self, case, branch, run):
        def exchanged(name: str, value: torch.Tensor) -> torch.Tensor:
            own = "uncond" if name.startswith("negative") else "cond"
            return value.flip(0) if name != "latents" and branch in (own, "both") else value

        inputs = case.record.inputs
        per_run = {name: exchanged(name, value) for name, value in inputs.per_run.items()}
        expected = case.engine.bare(replace(inputs, per_run=per_run))
        row = case.record.row(run)
        found = case.fork(PromptSwap(step=0, branch=branch, run=run))[0]
        assert_near(found, expected[row])
        assert_moved(found, case.record.final[row])

    @pytest.mark.parametrize(
        ("fields", "steps"), [({"step": 2}, (2, 3)), ({"step": 1, "steps": 2}, (1, 2))], ids=["to-the-end", "window"]
    )
    def test_equals_a_plain_hook_on_the_denoiser(self, case, fields, steps):
        with now(case) as at, ExitStack() as stack:

            def exchange(module, args, kwargs):
                step, branches = at()
                if step not in steps or "cond" not in branches:
                    return None
                row, donor = (case.row("cond", run) for run in (CLEAN, CORRUPTED))
                changed = {name: kwargs[name].clone() for name in PROMPT if kwargs.get(name) is not None}
                for value in changed.values():
                    value[row] = value[donor].clone()
                return args, {**kwargs, **changed}

            for name in case.record.geometry.denoisers:
                handle = getattr(case.pipe, name).register_forward_pre_hook(exchange, with_kwargs=True)
                stack.callback(handle.remove)
            expected = case.bare()
        assert torch.equal(expected[CORRUPTED], case.record.final[CORRUPTED])
        found = case.fork(PromptSwap(**fields))[0]
        assert_near(found, expected[CLEAN])
        assert_moved(found, case.record.final[CLEAN])


class TestStepSkip:
    @pytest.mark.parametrize("branch", ["cond", "uncond"])
    @pytest.mark.parametrize("step", [1, 3])
    def test_reuse_of_a_branch_equals_a_plain_hook(self, case, branch, step):
        kept = []
        with now(case) as at, ExitStack() as stack:

            def reuse(module, args, output):
                here, branches = at()
                value = output[0] if isinstance(output, tuple) else output
                row = case.row(branch, CLEAN)
                if branch not in branches or here not in (step - 1, step):
                    return None
                if here == step - 1:
                    kept.append(value[row].clone())
                    return None
                value = value.clone()
                value[row] = kept[0]
                return (value, *output[1:]) if isinstance(output, tuple) else value

            for name in case.record.geometry.denoisers:
                stack.callback(getattr(case.pipe, name).register_forward_hook(reuse).remove)
            expected = case.bare()
        found = case.fork(StepSkip(mode="reuse_branch", branch=branch, step=step))[0]
        assert_near(found, expected[CLEAN])
        assert_moved(found, case.record.final[CLEAN], 1e-4)

    def test_reuse_of_every_branch_is_reuse(self, case):
        """Where both steps are guided alike; experts have a guidance scale each."""
        geometry = case.record.geometry
        step = next(s for s in range(1, STEPS) if geometry.denoiser(s) == geometry.denoiser(s - 1))
        parts = {
            b: {"kind": "step_skip", "mode": "reuse_branch", "branch": b, "step": step} for b in ("cond", "uncond")
        }
        found = case.fork(Compose(parts=parts), StepSkip(mode="reuse", step=step))
        assert_near(found[0], found[1])
        assert_moved(found[0], case.record.final[CLEAN], 1e-4)

    @pytest.mark.parametrize(
        ("mode", "computed"),
        [("reuse", 1), ("reuse_branch", 1), ("freeze", 1), ("drop", 1), ("repeat", 2), ("swap", 2)],
    )
    def test_computes_no_step_that_the_record_holds(self, loop_case, mode, computed):
        """Of four steps, the first two are replayed, and what is computed is counted at the first block."""
        calls = []
        handle = loop_case.blocks(0)[0].register_forward_hook(lambda *_: calls.append(None))
        try:
            loop_case.fork(StepSkip(mode=mode, step=2, branch="cond" if mode == "reuse_branch" else None))
        finally:
            handle.remove()
        assert len(calls) == computed * len(loop_case.record.geometry.calls)

    @pytest.mark.parametrize(("step", "other"), [(1, None), (0, 2), (3, 0)])
    def test_swap_equals_a_written_out_loop(self, loop_case, step, other):
        loop = loop_of(loop_case)
        s = loop.sigmas()
        steps = [(i, s[i], s[i + 1]) for i in range(STEPS)]
        second = step + 1 if other is None else other
        steps[step], steps[second] = steps[second], steps[step]
        found = loop_case.fork(StepSkip(mode="swap", step=step, other=other))[0]
        assert_near(found, loop.run(CLEAN, schedule=steps)[0][0])
        assert_moved(found, loop_case.record.final[CLEAN])

    def test_swap_is_possible_exactly_where_the_solver_allows_it(self, case):
        cells = [StepSkip(mode="swap", step=1, other=2), StepSkip(mode="swap", step=2, other=1)]
        if not case.one_step:
            with pytest.raises(NoSuchSiteError, match="does not allow the schedule edit 'swap'"):
                cells[0].check(case.record.geometry)
            return
        found = case.fork(*cells)
        assert_near(found[0], found[1])
        assert_moved(found[0], case.record.final[CLEAN])


def plain_blocks(case: Case, cell: BlockSkip) -> torch.Tensor:
    """Run the pipeline with hooks that replace blocks of the clean run."""
    plain: set[int] = set()

    with now(case) as at, ExitStack() as stack:

        def replacing(i: int, blocks: list[Any]) -> Callable[..., Any]:
            def hook(module, args, kwargs, output):
                step, branches = at()
                rows = [case.row(b, CLEAN) for b in branches if cell.branch in (b, "both")]
                if not cell.step <= step < cell.step + cell.steps or not rows:
                    return None
                partner = cell.layer + 1 if cell.other is None else cell.other
                if cell.mode == "swap":
                    if i not in (cell.layer, partner):
                        return None
                    new = blocks[partner if i == cell.layer else cell.layer].forward(*args, **kwargs)
                elif not cell.layer <= i < cell.layer + cell.layers:
                    return None
                else:
                    new = entering(args, kwargs, output)
                    if cell.mode == "repeat":
                        new = again(module, args, kwargs, output)
                plain.add(i)
                return mixed(output, new, rows)

            return hook

        for step in range(cell.step, cell.step + cell.steps):
            blocks = case.blocks(step)
            for i, block in enumerate(blocks):
                if not block._forward_hooks:
                    handle = block.register_forward_hook(replacing(i, blocks), with_kwargs=True)
                    stack.callback(handle.remove)
        final = case.bare()
    assert plain
    return final[CLEAN]


def entering(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    video = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if not isinstance(output, tuple):
        return video
    text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
    return video, text


def again(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    streams = output if isinstance(output, tuple) else (output,)
    for i, (name, value) in enumerate(zip(("hidden_states", "encoder_hidden_states"), streams, strict=False)):
        if name in kwargs:
            kwargs = {**kwargs, name: value}
        else:
            args = (*args[:i], value, *args[i + 1 :])
    return module.forward(*args, **kwargs)


def mixed(old: Any, new: Any, rows: list[int]) -> Any:
    if isinstance(old, tuple):
        return tuple(mixed(a, b, rows) for a, b in zip(old, new, strict=True))
    out = old.clone()
    out[rows] = new[rows]
    return out


class TestBlockSkip:
    @pytest.mark.parametrize("mode", ["skip", "repeat"])
    def test_every_block_equals_a_plain_hook(self, case, mode):
        for layer in range(case.record.geometry.blocks):
            cell = BlockSkip(mode=mode, step=2, layer=layer)
            found = case.fork(cell)[0]
            assert_near(found, plain_blocks(case, cell))
            assert_moved(found, case.record.final[CLEAN])

    @pytest.mark.parametrize("branch", ["cond", "uncond"])
    @pytest.mark.parametrize("mode", ["skip", "repeat"])
    def test_windows_and_branches_equal_a_plain_hook(self, case, mode, branch):
        cell = BlockSkip(mode=mode, step=1, steps=2, layer=0, layers=case.record.geometry.blocks, branch=branch)
        found = case.fork(cell)[0]
        assert_near(found, plain_blocks(case, cell))
        assert_moved(found, case.record.final[CLEAN])

    def test_swap_of_any_two_blocks_of_a_list_equals_a_plain_hook(self, case):
        geometry = case.record.geometry
        lists = geometry.block_lists or (0,) * geometry.blocks
        pairs = [(a, b) for a in range(geometry.blocks) for b in range(a) if lists[a] == lists[b]]
        assert pairs
        for layer, other in pairs:
            cell = BlockSkip(mode="swap", step=1, layer=layer, other=other)
            found = case.fork(cell)[0]
            assert_near(found, plain_blocks(case, cell))
            assert_moved(found, case.record.final[CLEAN])

    def test_skipping_all_blocks_leaves_a_prompt_nothing_to_say(self, case):
        """In a model that reads text in its blocks alone, both branches then agree with another prompt's."""
        if case.name == "hunyuan_video":
            pytest.skip("its prompt also enters through the pooled embedding")
        both = {"kind": "block_skip", "mode": "skip", "step": 0, "steps": STEPS, "layer": 0}
        both["layers"] = case.record.geometry.blocks
        prompt = {"kind": "prompt_swap", "step": 0, "branch": "both"}
        found = case.fork(BlockSkip(**both), Compose(parts={"a": both, "b": prompt}))
        assert_near(found[0], found[1])


def dense(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, *_: Any, keep: Any, **__: Any) -> Any:
    """Attention written out, with every pair of tokens in a mask; a query without keys gives 0."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0) @ v


def kept_pairs(case: Case, cell: Knockout, queries: int, keys: int, read: Callable[[int, int], bool]) -> torch.Tensor:
    """Return (queries, keys) booleans from what one frame may read of another; text sits where the model has it."""
    geometry = case.record.geometry
    n, video = geometry.tokens_per_frame, geometry.tokens
    keep = torch.ones(queries, keys, dtype=torch.bool)
    if queries != keys:
        return keep & (cell.pattern != "text")
    start = keys - video if case.name == "cogvideox" else 0
    if cell.pattern == "text":
        keep[start : start + video] = False
        keep[start : start + video, start : start + video] = True
        return keep
    frames = torch.tensor([[read(q, k) for k in range(geometry.frames)] for q in range(geometry.frames)])
    keep[start : start + video, start : start + video] = frames.repeat_interleave(n, 0).repeat_interleave(n, 1)
    return keep


def plain_knockout(case: Case, cell: Knockout, read: Callable[[int, int], bool], monkeypatch: Any) -> torch.Tensor:
    """Run the pipeline with a dense mask in the attention of the cell's blocks."""
    ordinary = F.scaled_dot_product_attention
    armed: list[list[int]] = []
    served = []
    path = {"hunyuan_video": "attn"}.get(case.name, cell.attention(case.record.geometry))

    def masked(query=None, key=None, value=None, *args, **kwargs):
        out = ordinary(query, key, value, *args, **kwargs)
        if armed:
            served.append(None)
            keep = kept_pairs(case, cell, query.shape[2], key.shape[2], read)
            kwargs.pop("enable_gqa", None)
            cut = dense(query, key, value, *args, keep=keep, **kwargs)
            heads = slice(None) if cell.head is None else cell.head
            out = out.clone()
            out[armed[0], heads] = cut[armed[0], heads]
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    with now(case) as at, ExitStack() as stack:

        def arm(module, args):
            step, branches = at()
            rows = [case.row(b, CLEAN) for b in branches if cell.branch in (b, "both")]
            if cell.step <= step < cell.step + cell.steps and rows:
                armed.append(rows)

        for step in range(cell.step, cell.step + cell.steps):
            for block in case.blocks(step)[cell.layer : cell.layer + cell.layers]:
                module = block.get_submodule(path)
                if not module._forward_pre_hooks:
                    stack.callback(module.register_forward_pre_hook(arm).remove)
                    stack.callback(module.register_forward_hook(lambda *_: armed.clear()).remove)
        final = case.bare()
    monkeypatch.undo()
    assert served
    return final[CLEAN]


PATTERNS: dict[str, tuple[dict[str, Any], Callable[[int, int], bool]]] = {
    "causal": ({"pattern": "causal"}, lambda q, k: k <= q),
    "anti_causal": ({"pattern": "anti_causal"}, lambda q, k: k >= q),
    "local_1": ({"pattern": "local", "reach": 1}, lambda q, k: abs(q - k) <= 1),
    "local_0": ({"pattern": "local", "reach": 0, "steps": 2}, lambda q, k: q == k),
    "from_frames": ({"pattern": "from_frames", "frames": "0,2"}, lambda q, k: q == k or k not in (0, 2)),
    "from_frame": ({"pattern": "from_frames", "frame": 1}, lambda q, k: q == k or k != 1),
    "to_frames": ({"pattern": "to_frames", "frames": "2-3"}, lambda q, k: q == k or q not in (2, 3)),
    "between": (
        {"pattern": "between", "frames": "0-1", "queries": "1,4"},
        lambda q, k: not (k in (0, 1) and q in (1, 4)),
    ),
    "text": ({"pattern": "text"}, lambda q, k: True),
    "one_head": ({"pattern": "causal", "head": 1}, lambda q, k: k <= q),
    "text_one_head": ({"pattern": "text", "head": 0, "branch": "cond"}, lambda q, k: True),
    "branch": ({"pattern": "to_frames", "frames": "0", "branch": "uncond"}, lambda q, k: q == k or q != 0),
}


class TestKnockout:
    @pytest.mark.parametrize("name", PATTERNS)
    def test_equals_a_dense_mask(self, case, name, monkeypatch):
        fields, read = PATTERNS[name]
        cell = Knockout(step=1, layer=0, layers=case.record.geometry.blocks, **fields)
        cell.check(case.record.geometry)
        found = case.fork(cell)[0]
        assert_near(found, plain_knockout(case, cell, read, monkeypatch))
        assert_moved(found, case.record.final[CLEAN], 1e-4)

    def test_text_cut_everywhere_leaves_a_prompt_nothing_to_say(self, case):
        if case.name in ("cogvideox", "hunyuan_video"):
            pytest.skip("text tokens or pooled embeddings also reach the video on other ways")
        cut = {"kind": "knockout", "pattern": "text", "step": 0, "steps": STEPS, "layer": 0}
        cut["layers"] = case.record.geometry.blocks
        prompt = {"kind": "prompt_swap", "step": 0, "branch": "both"}
        found = case.fork(Knockout(**cut), Compose(parts={"a": cut, "b": prompt}))
        assert_near(found[0], found[1])
        assert_moved(found[0], case.record.final[CLEAN])


class TestCompose:
    def test_of_one_is_that_one(self, case):
        """Bit for bit, in the same batch composition."""
        cells = [
            ("latent_swap", {"step": 2, "alpha": 0.5}),
            ("prompt_swap", {"step": 1, "steps": 2}),
            ("step_skip", {"mode": "freeze", "step": 1}),
            ("block_skip", {"mode": "repeat", "step": 1, "layer": 1}),
            ("knockout", {"pattern": "causal", "step": 1, "layer": 1}),
            ("patch", {"direction": "noising", "step": 2, "layer": 0, "component": "ffn"}),
            ("step_skip", {"mode": "drop", "step": 2}),
        ]
        by_kind = {"patch": Patch, "latent_swap": LatentSwap, "prompt_swap": PromptSwap, "step_skip": StepSkip}
        by_kind |= {"block_skip": BlockSkip, "knockout": Knockout}
        for kind, fields in cells:
            alone = by_kind[kind](**fields)
            composed = Compose(parts={"only": {"kind": kind, **fields}})
            assert torch.equal(case.fork(composed), case.fork(alone)), kind

    def test_parts_add_up_to_the_intervention_that_names_them_all(self, case):
        """Blocks of a window, heads of an attention; causal and anti-causal together leave the own frame."""
        geometry = case.record.geometry
        patch = {"kind": "patch", "direction": "noising", "component": "residual", "step": 1}
        layers = {str(i): {**patch, "layer": i} for i in range(2)}
        found = case.fork(
            Compose(parts=layers), Patch(direction="noising", component="residual", step=1, layer=0, layers=2)
        )
        assert_near(found[0], found[1])
        cut = {"kind": "knockout", "step": 1, "layer": 0}
        heads = {str(i): {**cut, "pattern": "causal", "head": i} for i in range(geometry.heads)}
        found = case.fork(Compose(parts=heads), Knockout(pattern="causal", step=1, layer=0))
        assert_near(found[0], found[1])
        local = {"a": {**cut, "pattern": "causal"}, "b": {**cut, "pattern": "anti_causal"}}
        found = case.fork(Compose(parts=local), Knockout(pattern="local", reach=0, step=1, layer=0))
        assert_near(found[0], found[1])

    def test_schedule_and_latents_equal_a_written_out_loop(self, loop_case):
        parts = {
            "1": {"kind": "frame_shuffle", "mode": "reverse", "step": 1},
            "2": {"kind": "step_skip", "mode": "drop", "step": 2},
            "3": {"kind": "frame_shuffle", "mode": "freeze", "frame": 2, "step": 3},
        }
        frames = loop_case.record.geometry.frames
        orders = {1: [0, *range(frames - 1, 0, -1)], 3: [min(f, 2) for f in range(frames)]}
        loop = loop_of(loop_case)
        s = loop.sigmas()
        schedule = [(0, s[0], s[1]), (1, s[1], s[3]), (3, s[3], s[4])]
        expected = loop.run(
            CLEAN, schedule=schedule, edit_latents=lambda step, x, _: x[:, :, orders[step]] if step in orders else x
        )
        cell = Compose(parts=parts)
        cell.check(loop_case.record.geometry)
        assert_near(loop_case.fork(cell)[0], expected[0][0])

    def test_parts_at_one_point_act_in_their_order(self, loop_case):
        turn, swap = {"kind": "frame_shuffle", "mode": "reverse"}, {"kind": "latent_swap", "frames": "1-2"}
        donors: dict[int, torch.Tensor] = {}

        def keep(step, x, _):
            donors[step] = x.clone()
            return x

        def turned(x):
            return torch.cat([x[:, :, :1], x[:, :, 1:].flip(2)], dim=2)

        def swapped(x):
            return torch.cat([x[:, :, :1], donors[2][:, :, 1:3], x[:, :, 3:]], dim=2)

        loop = loop_of(loop_case)
        loop.run(CORRUPTED, edit_latents=keep)
        cells = [Compose(step=2, parts={"1": turn, "2": swap}), Compose(step=2, parts={"1": swap, "2": turn})]
        orders = [lambda x: swapped(turned(x)), lambda x: turned(swapped(x))]
        found = loop_case.fork(*cells)
        for i, edit in enumerate(orders):
            expected = loop.run(CLEAN, edit_latents=lambda step, x, _, edit=edit: edit(x) if step == 2 else x)
            assert_near(found[i], expected[0][0])
        assert_moved(found[0], found[1])

    def test_parts_that_edit_the_entry_and_the_schedule(self, loop_case):
        """Latents of step 0 exist once, whatever later steps are left out."""
        parts = {"1": {"kind": "latent_swap", "step": 0}, "2": {"kind": "step_skip", "mode": "drop", "step": 1}}
        found = loop_case.fork(Compose(parts=parts))[0]
        loop = loop_of(loop_case)
        s = loop.sigmas()
        donor = loop_case.record.inputs.per_run["latents"][CORRUPTED : CORRUPTED + 1]
        schedule = [(0, s[0], s[2]), (2, s[2], s[3]), (3, s[3], s[4])]
        expected = loop.run(CLEAN, schedule, edit_latents=lambda step, x, _: donor.clone() if step == 0 else x)
        assert_near(found, expected[0][0])

    def test_two_schedules_are_refused_in_one_run_and_in_one_fork(self, loop_case):
        drop, repeat = ({"kind": "step_skip", "mode": m, "step": 1} for m in ("drop", "repeat"))
        with pytest.raises(ValueError, match="one run has one schedule, but parts a and b change it"):
            Compose(parts={"a": drop, "b": repeat})
        with pytest.raises(ValueError, match="must share their schedule edit"):
            loop_case.fork(Compose(parts={"a": drop}), Compose(parts={"a": repeat}))


def test_rows_do_not_leak_into_each_other(case):
    """Every kind in one batch gives what each gives alone."""
    rows = [
        LatentSwap(step=1, alpha=0.7),
        PromptSwap(step=2, steps=1, run="corrupted"),
        StepSkip(mode="reuse_branch", branch="uncond", step=1),
        BlockSkip(mode="skip", step=1, layer=1),
        BlockSkip(mode="swap", step=1, layer=0, branch="cond"),
        BlockSkip(mode="repeat", step=1, layer=1, run="corrupted"),
        Knockout(pattern="causal", step=1, layer=1),
        Knockout(pattern="text", step=1, layer=1, head=0, run="corrupted"),
        Compose(
            parts={
                "a": {"kind": "knockout", "pattern": "to_frames", "frames": "1", "step": 1, "layer": 1},
                "b": {"kind": "block_skip", "mode": "skip", "step": 1, "layer": 0},
            }
        ),
        Patch(step=1, layer=1, component="attn1", direction="self"),
    ]
    together = case.fork(*rows)
    for i, row in enumerate(rows):
        assert_near(together[i], case.fork(row)[0])
    assert_near(together[-1], case.record.final[CLEAN])
