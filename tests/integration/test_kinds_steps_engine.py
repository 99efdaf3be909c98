"""Kinds on steps, prompts, latents, blocks and attention edges, through the engine, against plain hooks."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from interventions import kinds  # noqa: F401  (registers every kind)
from interventions.base import Intervention
from interventions.kinds.block_skip import BlockSkip
from interventions.kinds.compose import Compose
from interventions.kinds.knockout import Knockout
from interventions.kinds.latent_swap import LatentSwap
from interventions.kinds.patch import Patch
from interventions.kinds.prompt_swap import PromptSwap
from interventions.kinds.step_skip import StepSkip
from interventions.sites import NoSuchSiteError
from tests.integration.kind_cases import (
    CLEAN,
    CORRUPTED,
    PROMPT,
    STEPS,
    Case,
    assert_moved,
    assert_near,
    loop_of,
    now,
)


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
