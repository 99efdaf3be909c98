"""Adapters inferred from pipelines as if nobody knew them, against the declared ones; and pipelines that mislead."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from interventions.controls import run_controls
from interventions.engine import Engine, EngineError
from interventions.families import family as families
from interventions.families.family import Family, family_of
from interventions.families.generic import Inference, InferenceError, infer
from interventions.record import RunInputs
from interventions.solvers import UnsupportedSolverError

CASES = (
    "wan", "wan22_a14b", "wan22_ti2v", "wan_i2v21", "ltx", "ltx2", "cogvideox", "hunyuan_video", "mochi",
    "hunyuan_video15", "skyreels_v2", "allegro", "sana_video", "kandinsky5", "cosmos", "latte",
)  # fmt: skip

# What each declared adapter has and inference cannot find, by block list, and the sentence that says so.
LEFT_OUT = {
    "hunyuan_video": {("single_transformer_blocks", "ffn"): r"single_transformer_blocks: there is no ffn"},
    "kandinsky5": {("text_transformer_blocks", ""): r"text_transformer_blocks is left out: text passes through it"},
    "sana_video": {("transformer_blocks", "attn1.heads"): r"attn1 .* it has no heads"},
}
# What is not seen but said in words: the parts of an adapter that are guesses.
GUESSED = {
    "wan22_a14b": [r"transformer_2 is taken to be built like transformer"],
    "ltx": [r"packed tokens run frame by frame"],
    "ltx2": [r"packed tokens run frame by frame", r"audio_latents enters the denoiser too", r"audio_to_video_attn"],
    "mochi": [r"no other number of steps can be planned"],
    "hunyuan_video15": [r"Guidance was on and nothing in the call's arguments switches it"],
    "sana_video": [r"attn1 .* by its name", r"ff .* by its name"],
    "latte": [r"transformer_blocks: attn1 stays inside a frame"],
}


@dataclass(frozen=True)
class Case:
    """A tiny pipeline, and what was inferred of it."""

    name: str
    module: Any
    pipe: Any
    inference: Inference

    def inputs(self, guidance: bool, steps: int = 2) -> RunInputs:
        shared, per_run = self.module.arguments(self.pipe, steps=steps, guidance=guidance)
        return RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,))


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    torch.set_num_threads(1)
    module = importlib.import_module(f"tests.families.{request.param}")
    pipe = module.build()
    shared, per_run = module.arguments(pipe, steps=4, guidance=True)
    return Case(request.param, module, pipe, infer(pipe, shared, per_run))


@contextmanager
def hosted(pipe: Any, family: Family) -> Iterator[Engine]:
    engine = Engine(pipe, family)
    try:
        yield engine
    finally:
        engine.release()


def failing(pipe: Any, family: Family, inputs: RunInputs) -> list[str]:
    with hosted(pipe, family) as engine:
        return [control.name for control in run_controls(engine, inputs) if not control.passed]


@pytest.mark.parametrize("guidance", [True, False], ids=["guided", "unguided"])
def test_controls_pass_with_the_inferred_family(case, guidance):
    inputs = case.inputs(guidance)
    if case.name == "hunyuan_video15" and not guidance:
        # Its guidance is a setting of the pipeline, so the adapter knows one state, says so, and fails in the other.
        with pytest.raises(EngineError, match="does not call its denoiser as family"):
            failing(case.pipe, case.inference.family, inputs)
    else:
        assert failing(case.pipe, case.inference.family, inputs) == []


@pytest.mark.parametrize("guidance", [True, False], ids=["guided", "unguided"])
def test_geometry_is_the_declared_one(case, guidance):
    if case.name == "hunyuan_video15" and not guidance:
        pytest.skip("guidance is a setting of the pipeline; only the guided state is inferred")
    declared = family_of(type(case.pipe).__name__)
    inputs = case.inputs(guidance)
    with hosted(case.pipe, declared) as engine:
        expected = engine.geometry(inputs)
    with hosted(case.pipe, case.inference.family) as engine:
        found = engine.geometry(inputs)
    facts = ("frames", "height", "width", "frame_patch", "given_frames", "calls", "heads", "denoisers", "denoiser_at")
    for fact in (*facts, "levels", "solver"):
        assert getattr(found, fact) == getattr(expected, fact), fact
    if case.name != "kandinsky5":
        assert found.blocks == expected.blocks


def test_every_tap_is_the_declared_one(case):
    """Block by block: module, end, index and part of every component, attention edges, layout and arguments."""
    config = case.pipe.transformer.config
    declared = {a.path: a.blocks for a in family_of(type(case.pipe).__name__).addresses(config)}
    inferred = {a.path: a.blocks for a in case.inference.family.addresses(config)}
    assert set(inferred) <= set(declared) or case.name == "mochi"
    missing = {(path.rpartition(".")[0], "") for path in set(declared) - set(inferred)}
    for path in set(declared) & set(inferred):
        ours, theirs = inferred[path], declared[path]
        common = set(ours.taps) & set(theirs.taps)
        assert {key: ours.taps[key] for key in common} == {key: theirs.taps[key] for key in common}
        assert [key for key in ours.taps if key in common] == [key for key in theirs.taps if key in common]
        assert ours.attention == theirs.attention
        assert (ours.layout, ours.video_input[1]) == (theirs.layout, theirs.video_input[1])
        missing |= {(path.rpartition(".")[0], key) for key in set(theirs.taps) - set(ours.taps)}
    expected = LEFT_OUT.get(case.name, {})
    assert {(path, key.removesuffix(".text")) for path, key in missing} == set(expected)
    for sentence in expected.values():
        assert any(re.search(sentence, doubt) for doubt in case.inference.unverified), sentence


def test_conditioning_is_the_declared_one(case):
    """Masks that hide nothing in these runs cannot be told from any other argument; embeddings can."""
    declared = family_of(type(case.pipe).__name__).conditioning
    inferred = case.inference.family.conditioning
    assert inferred[0] == declared[0]
    assert set(inferred) <= set(declared)
    assert all("mask" in name or "image" in name for name in set(declared) - set(inferred))


def test_what_is_guessed_is_said(case):
    for sentence in GUESSED.get(case.name, []):
        assert any(re.search(sentence, doubt) for doubt in case.inference.unverified), sentence
    assert any("encode and pixels are not declared" in doubt for doubt in case.inference.unverified)
    assert any("one size" in doubt for doubt in case.inference.unverified)


def test_source_declares_the_same_family(case, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", {})
    namespace: dict[str, Any] = {}
    source = case.inference.source()
    exec(compile(source, "<adapter>", "exec"), namespace)
    assert list(families.FAMILIES.values()) == [case.inference.family]
    assert families.family_of(type(case.pipe).__name__) == namespace[case.inference.family.name.upper()]
    assert source.count("# Not verified") == len(case.inference.unverified)
    assert max(map(len, source.splitlines())) <= 120


def test_example_is_a_run_of_the_family(case):
    example = case.inference.family.example
    if example is None:
        assert any("example is not declared" in doubt for doubt in case.inference.unverified)
        return
    shared, per_run = example(case.pipe, 2, False)
    inputs = RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,))
    with hosted(case.pipe, case.inference.family) as engine:
        if False in case.inference.family.calls:
            assert engine.geometry(inputs).calls == (("cond",),)
        clean, corrupted = engine.record(inputs).final
    assert (clean - corrupted).abs().max() > 1e-3


def test_pipeline_is_left_as_it_was():
    module = importlib.import_module("tests.families.ltx2")
    pipe = module.build()
    shared, per_run = module.arguments(pipe)
    given = {name: tensor.clone() for name, tensor in per_run.items()}

    def final() -> torch.Tensor:
        tensors = {name: tensor.clone() for name, tensor in given.items()}
        return pipe(**shared, **tensors, output_type="latent", return_dict=False)[0]

    before, drawn = final(), torch.get_rng_state()
    infer(pipe, shared, per_run)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(final(), before)
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))
    assert all(torch.equal(per_run[name], given[name]) for name in given)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())


# Pipelines that would mislead: inference must refuse, or leave out and say so.


def wan(**overrides: Any) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    module = importlib.import_module("tests.families.wan")
    pipe = module.build()
    shared, per_run = module.arguments(pipe, **overrides)
    return pipe, shared, per_run


def test_tokens_in_another_order_are_refused():
    pipe, shared, per_run = wan()
    pipe.transformer.patch_embedding.register_forward_hook(lambda module, args, output: output.flip(2))
    with pytest.raises(InferenceError, match="0 layouts of CFHW, FCHW, FHWC explain"):
        infer(pipe, shared, per_run)


def test_frames_that_mix_before_the_blocks_are_refused():
    pipe, shared, per_run = wan()
    pipe.transformer.patch_embedding.register_forward_hook(lambda module, args, output: output + output.roll(1, 2))
    with pytest.raises(InferenceError, match="0 layouts"):
        infer(pipe, shared, per_run)


def test_one_frame_does_not_tell_the_layout():
    pipe, shared, per_run = wan()
    per_run = {**per_run, "latents": per_run["latents"][:, :, :1]}
    with pytest.raises(InferenceError, match="Give at least 2 frames"):
        infer(pipe, {**shared, "num_frames": 1}, per_run)


def test_blocks_out_of_order_are_refused():
    pipe, shared, per_run = wan()
    blocks = pipe.transformer.blocks
    blocks.__class__ = type(
        "Reversed", (torch.nn.ModuleList,), {"__iter__": lambda self: iter([*self._modules.values()][::-1])}
    )
    with pytest.raises(InferenceError, match=r"no list of blocks: none of the module lists blocks"):
        infer(pipe, shared, per_run)


def test_a_second_conditional_branch_is_refused():
    module = importlib.import_module("tests.families.ltx2")
    pipe = module.build()
    shared, per_run = module.arguments(pipe)
    with pytest.raises(InferenceError, match=r"branches .*cond.* Switch other guidance off"):
        infer(pipe, {**shared, "stg_scale": 1.0, "spatio_temporal_guidance_blocks": [1]}, per_run)


def test_packed_tokens_out_of_order_are_refused():
    module = importlib.import_module("tests.families.ltx")
    pipe = module.build()
    pipe.transformer.proj_in.register_forward_hook(lambda module, args, output: output.flip(1))
    with pytest.raises(InferenceError, match="token s of the packed latents is not token s of the blocks"):
        infer(pipe, *module.arguments(pipe))


def test_a_solver_that_is_not_understood_is_refused():
    pipe, shared, per_run = wan()
    pipe.scheduler.__class__ = type("HomemadeScheduler", (type(pipe.scheduler),), {})
    with pytest.raises(UnsupportedSolverError, match="HomemadeScheduler"):
        infer(pipe, shared, per_run)
    assert "set_timesteps" not in vars(pipe.scheduler)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: {k: v[:1] for k, v in t.items()}, "2 rows each", id="one-run"),
        pytest.param(lambda t: {k: v for k, v in t.items() if k != "latents"}, "latents and prompts", id="no-latents"),
    ],
)
def test_unfit_arguments_are_refused(change, message):
    pipe, shared, per_run = wan()
    with pytest.raises(ValueError, match=message):
        infer(pipe, shared, change(per_run))


class _Processor:
    """An attention processor of Wan with another way from queries, keys and values to the result."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        self.attend = attend

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        parts = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in parts)
        return attn.to_out[0](self.attend(q, k, v).transpose(1, 2).flatten(2))


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def frame_by_frame(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.unflatten(2, (5, -1)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).unflatten(0, (-1, 5)).transpose(1, 2).flatten(2, 3)


def reversed_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v).flip(1)


def reversed_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v).flip(2)


@pytest.mark.parametrize(
    ("attend", "lost", "doubt"),
    [
        pytest.param(by_hand, {"attn1.heads"}, "attn1 exchanges tokens without softmax", id="not-torch"),
        pytest.param(frame_by_frame, {"attn1.heads", "attn1"}, "other tokens than video and text", id="part-of-tokens"),
        pytest.param(reversed_heads, {"attn1.heads"}, "heads of attn1 are left out", id="heads-moved"),
    ],
)
def test_unusual_attention_loses_sites_and_is_named(attend, lost, doubt):
    """Sites that do not fit are gone, the knock-out with them unless heads alone are odd; the controls still pass."""
    pipe, shared, per_run = wan()
    for block in pipe.transformer.blocks:
        block.attn1.set_processor(_Processor(attend))
    inference = infer(pipe, shared, per_run)
    (blocks,) = inference.family.blocks
    assert {"attn1.heads", "attn1", "attn2.heads", "attn2", "ffn", "residual"} - set(blocks.taps) == lost
    assert ("attn1" in blocks.attention) == (attend is reversed_heads)
    assert any(doubt in sentence for sentence in inference.unverified)
    inputs = RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,))
    assert failing(pipe, inference.family, inputs) == []


def test_attention_that_gives_tokens_back_in_another_order_is_refused():
    pipe, shared, per_run = wan()
    for block in pipe.transformer.blocks:
        block.attn1.set_processor(_Processor(reversed_tokens))
    with pytest.raises(InferenceError, match="no list of blocks gives video tokens back in known places"):
        infer(pipe, shared, per_run)


def test_a_block_that_differs_is_declared_apart():
    pipe, shared, per_run = wan()
    pipe.transformer.blocks[2].attn1.set_processor(_Processor(by_hand))
    inference = infer(pipe, shared, per_run)
    assert [blocks.at for blocks in inference.family.blocks] == [slice(0, 2), slice(2, 3)]
    assert ["attn1.heads" in blocks.taps for blocks in inference.family.blocks] == [True, False]
    inputs = RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,))
    assert failing(pipe, inference.family, inputs) == []


def test_guidance_that_was_off_is_not_assumed_when_on():
    pipe, shared, per_run = wan(guidance=False)
    inference = infer(pipe, shared, per_run)
    assert set(inference.family.calls) == {False}
    assert any("Guidance was off" in sentence for sentence in inference.unverified)
    inputs = RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,))
    with hosted(pipe, inference.family) as engine:
        assert engine.geometry(inputs).calls == (("cond",),)
        with pytest.raises(
            ValueError, match=r"guidance_scale=3\.0: the adapter knows this pipeline with guidance_scale=1\.0"
        ):
            engine.geometry(replace(inputs, shared={**shared, "guidance_scale": 3.0}))


def test_steps_that_were_not_seen_are_refused():
    module = importlib.import_module("tests.families.mochi")
    pipe = module.build()
    shared, per_run = module.arguments(pipe)
    inference = infer(pipe, shared, per_run)
    inputs = RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,))
    with (
        hosted(pipe, inference.family) as engine,
        pytest.raises(ValueError, match=r"num_inference_steps=4: .* 2, 5 steps"),
    ):
        engine.record(inputs)


def test_number_of_blocks_without_an_entry_of_the_config_is_written_down():
    pipe, shared, per_run = wan()
    del pipe.transformer.blocks[2]
    inference = infer(pipe, shared, per_run)
    assert [blocks.count for blocks in inference.family.blocks] == [2]
    assert any("blocks is written as 2" in sentence for sentence in inference.unverified)
