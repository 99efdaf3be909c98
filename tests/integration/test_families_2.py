"""The second half of the families against tiny pipelines: geometry, controls, every site, prompts, odd checkpoints."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from interventions.base import KINDS, RunRef
from interventions.controls import run_controls
from interventions.engine import Engine
from interventions.families.family import UnsupportedModelError, family_of
from interventions.record import RunInputs
from interventions.sites import NoSuchSiteError
from interventions.solvers import UnsupportedSolverError, levels
from tests.families._weights import randomise
from tests.integration.test_families_1 import (  # noqa: F401  (its tests run on these families too)
    Case,
    hooked,
    is_dead,
    sites,
    test_empty_plan_is_bit_equal_to_the_bare_pipeline,
    test_example_runs_and_tells_its_rows_apart,
    test_prompt_arguments_are_all_that_tells_runs_apart,
    test_self_patch_is_an_identity_everywhere,
    tokenizer,
)
from tests.reference.layouts import LAYOUTS
from tests.reference.recipes import result
from tests.reference.world import World

Patch = KINDS["patch"]
STEPS, STEP = 4, 2
CROSS, DUAL = ("attn1", "attn2", "ffn", "update", "residual"), ("attn1", "ffn", "update", "residual")
BOTH = ("attn1", "attn2")
ONE_CALL, TWO_CALLS = (("uncond", "cond"),), (("cond",), ("uncond",))
GEOMETRIES: dict[str, dict[str, Any]] = {
    "mochi": {"calls": ONE_CALL, "components": DUAL, "text_components": DUAL, "knockout": ("attn1",)},
    "hunyuan_video15": {"calls": TWO_CALLS, "components": DUAL, "text_components": DUAL, "knockout": ("attn1",)},
    "skyreels_v2": {"calls": TWO_CALLS},
    "allegro": {"calls": ONE_CALL},
    "sana_video": {"calls": ONE_CALL, "width": 4, "knockout": ("attn2",)},
    "kandinsky5": {"calls": TWO_CALLS, "blocks": 5, "text_components": DUAL},
    "cosmos": {"calls": TWO_CALLS},
    "latte": {"calls": ONE_CALL, "blocks": 4},
}
NAMES = tuple(GEOMETRIES)


def hosted(name: str, pipe: Any, arguments: tuple[Any, Any], guidance: bool) -> Case:
    """Record the runs of some arguments on a pipeline."""
    torch.set_num_threads(1)
    engine = Engine(pipe, family_of(type(pipe).__name__))
    shared, per_run = arguments
    inputs = RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,))
    return Case(name, guidance, engine, engine.record(inputs))


@pytest.fixture(scope="module", params=[(n, g) for n in NAMES for g in (True, False)], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request) -> Case:
    name, guidance = request.param
    module = importlib.import_module(f"tests.families.{name}")
    pipe = module.build()
    return hosted(name, pipe, module.arguments(pipe, steps=STEPS, guidance=guidance), guidance)


def test_geometry_is_what_the_denoiser_does(case):
    """Extent, rows of each call and noise levels, observed on the bare pipeline, and what can be addressed."""
    geometry, rows = case.geometry, []
    hook = case.denoiser().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs.get("hidden_states", args[0] if args else ()))),
        with_kwargs=True,
    )
    with hooked(hook):
        case.engine.bare(case.record.inputs)
    assert rows == [2 * len(call) for call in geometry.calls] * STEPS
    torch.testing.assert_close(torch.tensor(geometry.levels), torch.tensor(levels(case.engine.pipe.scheduler)))
    usual = {"frames": 4, "height": 2, "width": 3, "frame_patch": 1, "given_frames": 0, "blocks": 3, "heads": 2}
    usual |= {"components": CROSS, "text_components": (), "knockout": BOTH}
    expected = {**usual, **GEOMETRIES[case.name]}
    if not case.guidance:
        expected["calls"] = (("cond",),)
    assert {key: getattr(geometry, key) for key in expected} == expected
    assert geometry.head_components == tuple(c for c in BOTH if c in geometry.components)


def test_blocks_of_several_kinds_differ_in_what_they_offer(case):
    geometry = case.geometry
    video, text = ([geometry.components_of(b, s) for b in range(geometry.blocks)] for s in ("video", "text"))
    cuts = [geometry.knockout_of(b) for b in range(geometry.blocks)]
    if case.name == "mochi":  # the last block has no text of its own
        assert (video, text) == ([DUAL] * 3, [DUAL, DUAL, ()])
    elif case.name == "kandinsky5":
        assert (video, text) == ([(), (), CROSS, CROSS, CROSS], [DUAL, DUAL, (), (), ()])
        assert cuts == [(), (), BOTH, BOTH, BOTH]
    elif case.name == "latte":  # space and time take turns
        assert video == [CROSS, DUAL] * 2
        assert cuts == [("attn2",), ("attn1",)] * 2
    else:
        assert set(video) == {geometry.components}
        assert set(text) == {geometry.text_components}


@pytest.mark.parametrize("inputs", ["fixture", "example"])
def test_controls_pass(case, inputs):
    runs = case.record.inputs
    if inputs == "example":
        shared, per_run = case.engine.family.example(case.engine.pipe, STEPS, case.guidance)
        runs = replace(runs, shared=shared, per_run=per_run)
    found = run_controls(case.engine, runs)
    assert len(found) == 6 + len(case.geometry.head_components) + len(case.geometry.knockout)
    assert [c for c in found if not c.passed] == []


def test_every_site_equals_a_plain_hook_patch_and_matters(case):
    """Every component, head and text stream of every block in one batch, against a bare run with plain hooks each."""
    module, inputs = importlib.import_module(f"tests.families.{case.name}"), case.record.inputs
    bare = module.build()
    module.arguments(bare, guidance=case.guidance)  # which sets the guider of the pipeline that has one
    layout = replace(LAYOUTS[case.name], calls=case.geometry.calls)
    world = World(bare, layout, lambda ref: (inputs.shared, inputs.per_run, inputs.names.index(ref.run)), (0,))
    cells = [Patch(step=STEP, **site) for site in sites(case)]
    for site, final in zip(cells, case.engine.fork(case.record, cells).final, strict=True):
        effect = (final - case.record.final[1]).abs().max() / case.scale
        assert (effect < 1e-6) if is_dead(case, site.model_dump()) else (effect > 1e-5), site
        assert (final - result(site, world)).abs().max() < 1e-5 * case.scale, site
    assert torch.equal(world.trace(RunRef("clean")).prompts["cond"]["encoder_hidden_states"], cond_prompt(case)[0])


def cond_prompt(case: Case) -> torch.Tensor:
    return case.record.conditioning["cond"]["encoder_hidden_states"]


def test_branches_carry_their_prompts(case):
    """The two runs differ in the conditional branch and share the negative prompt in the other."""
    conditioning, per_run = case.record.conditioning, case.record.inputs.per_run
    assert set(conditioning) == set(case.geometry.branches)
    given = per_run["prompt_embeds_qwen" if case.name == "kandinsky5" else "prompt_embeds"]
    assert torch.equal(cond_prompt(case).reshape(given.shape), given)
    assert (given[0] - given[1]).abs().max() > 1e-2
    if case.guidance:
        uncond = conditioning["uncond"]["encoder_hidden_states"]
        assert torch.equal(uncond[0], uncond[1])
        assert not torch.equal(uncond, cond_prompt(case))


def test_sites_that_a_block_lacks_are_refused_with_those_that_have_them():
    def refusal(name: str, **fields: Any) -> str:
        module = importlib.import_module(f"tests.families.{name}")
        pipe = module.build()
        case = hosted(name, pipe, module.arguments(pipe, steps=2), True)
        with pytest.raises(NoSuchSiteError) as raised:
            KINDS[fields.pop("kind", "patch")](step=1, **fields).check(case.geometry)
        return str(raised.value)

    assert "ffn exists in blocks [0, 1]" in refusal("mochi", layer=2, component="ffn", stream="text")
    assert "residual exists in blocks [2, 3, 4]" in refusal("kandinsky5", layer=1, component="residual")
    assert "residual exists in blocks [0, 1]" in refusal("kandinsky5", layer=2, component="residual", stream="text")
    assert "attn2 exists in blocks [0, 2]" in refusal("latte", layer=1, component="attn2")
    assert "It can be cut in blocks [1, 3]" in refusal("latte", layer=0, kind="knockout", pattern="causal")
    assert "No block of this model has such" in refusal("sana_video", layer=0, kind="knockout", pattern="causal")


# Checkpoints that are built otherwise than the fixtures.


def test_allegro_with_its_published_solver_draws_the_same_noise_for_every_row():
    from diffusers import EulerAncestralDiscreteScheduler

    from tests.families import allegro

    pipe = allegro.build()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    case = hosted("allegro", pipe, allegro.arguments(pipe, steps=STEPS), True)
    assert "draws noise" in case.geometry.solver
    assert torch.equal(case.record.final, case.engine.bare(case.record.inputs))
    assert [c for c in run_controls(case.engine, case.record.inputs) if not c.passed] == []
    cell = Patch(step=STEP, layer=1, component="residual")
    alone = case.engine.fork(case.record, [cell]).final[0]
    beside = case.engine.fork(case.record, [Patch(step=0, layer=0), Patch(step=1, layer=2), cell]).final[2]
    assert (alone - beside).abs().max() < 1e-5 * case.scale
    assert (alone - case.record.final[1]).abs().max() > 1e-3 * case.scale


def kandinsky5(**changes: Any) -> Any:
    from tests.families.kandinsky5 import _FloatAttnProcessor, build

    pipe = build()
    config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    pipe.register_modules(transformer=randomise(type(pipe.transformer)(**{**config, **changes}), 0))
    pipe.transformer.set_attn_processor(_FloatAttnProcessor())
    return pipe


def test_kandinsky_with_channels_of_conditioning():
    """Its latents carry zeros for an image behind the channels that are denoised, and only those are edited."""
    pipe = kandinsky5(visual_cond=True)
    case = hosted("kandinsky5", pipe, family_of(type(pipe).__name__).example(pipe, STEPS, True), True)
    per_run = case.record.inputs.per_run
    assert (per_run["latents"].shape[-1], case.record.final.shape[1]) == (9, 4)
    given = per_run["latents"].clone()
    assert [c for c in run_controls(case.engine, case.record.inputs) if not c.passed] == []
    cell = KINDS["frame_shuffle"](mode="reverse", step=0)
    reversed_ = {**per_run, "latents": per_run["latents"].flip(1)}
    expected = case.engine.bare(replace(case.record.inputs, per_run=reversed_))[0]
    assert (case.engine.fork(case.record, [cell]).final[0] - expected).abs().max() < 1e-5 * case.scale
    assert torch.equal(per_run["latents"], given)  # the pipeline writes into what it is given


def test_kandinsky_with_blockwise_attention_is_refused():
    pipe = kandinsky5(attention_type="nabla")
    with pytest.raises(UnsupportedModelError, match=r"'nabla' orders the tokens .* Use a checkpoint"):
        family_of(type(pipe).__name__).patch(pipe.transformer.config)


def test_sana_heads_are_addressed_only_if_both_attentions_have_as_many():
    heads = family_of("SanaVideoPipeline").heads
    assert heads({"num_attention_heads": 20, "num_cross_attention_heads": 20}) == 20
    assert heads({"num_attention_heads": 20, "num_cross_attention_heads": 16}) == 0


def test_mochi_has_no_schedule_of_one_step():
    from tests.families import mochi

    pipe = mochi.build()
    with pytest.raises(UnsupportedSolverError, match="2 or more steps, not 1"):
        family_of("MochiPipeline").set_steps(pipe.scheduler, 1, (4, 4, 6))


def test_a_guider_that_changes_its_calls_over_the_steps_is_refused():
    from diffusers import ClassifierFreeGuidance

    from tests.families import hunyuan_video15

    pipe = hunyuan_video15.build()
    family = family_of(type(pipe).__name__)
    hunyuan_video15.arguments(pipe, guidance=True)
    assert family.guider(pipe) is True
    hunyuan_video15.arguments(pipe, guidance=False)
    assert family.guider(pipe) is False
    pipe.guider = ClassifierFreeGuidance(guidance_scale=2.0, stop=0.5)
    with pytest.raises(UnsupportedModelError, match=r"from 0\.0 to 0\.5 of the steps"):
        family.guider(pipe)


# Prompts.


class _Tokenizer:
    """A tokenizer as the processor that Kandinsky calls: texts beside images, of which there are none."""

    def __init__(self) -> None:
        self.plain = tokenizer(512)
        self.plain.model_input_names = ["input_ids", "attention_mask"]

    def __call__(self, text: list[str], images: None = None, videos: None = None, **options: Any) -> Any:
        return self.plain(text, **options)


def give_text_encoders(pipe: Any, name: str) -> None:
    """Register tiny random text encoders of the pipeline's own kind, whose width is that of the fixture."""
    import transformers as t

    tiny = {"vocab_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    pads = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}

    def t5(width: int) -> Any:
        config = t.T5Config(vocab_size=8, d_model=width, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
        return randomise(t.T5EncoderModel(config), 9)

    def qwen(layers: int) -> Any:
        return randomise(t.Qwen2Model(t.Qwen2Config(hidden_size=16, num_hidden_layers=layers, **tiny, **pads)), 10)

    if name == "hunyuan_video15":
        words = tokenizer(512)
        words.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
        pipe.register_modules(text_encoder=qwen(3), tokenizer=words, text_encoder_2=t5(10), tokenizer_2=tokenizer(64))
        # The prompt is cut out of a template by position.
        pipe.system_message, pipe.prompt_template_encode_start_idx, pipe.tokenizer_max_length = "a", 1, 12
    elif name == "kandinsky5":
        clip = t.CLIPTextConfig(
            hidden_size=10,
            num_hidden_layers=1,
            vocab_size=8,
            num_attention_heads=2,
            intermediate_size=8,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=0,
        )
        pipe.register_modules(
            text_encoder=qwen(1),
            tokenizer=_Tokenizer(),
            text_encoder_2=randomise(t.CLIPTextModel(clip), 11),
            tokenizer_2=_Tokenizer().plain,
        )
    elif name == "sana_video":
        config = t.Gemma2Config(hidden_size=16, num_hidden_layers=1, head_dim=8, **tiny, **pads)
        pipe.register_modules(text_encoder=randomise(t.Gemma2Model(config), 9), tokenizer=tokenizer(512))
    else:
        pipe.register_modules(text_encoder=t5(16), tokenizer=tokenizer(512))
    if name == "cosmos":
        pipe.safety_checker.check_text_safety = lambda prompt: True


@pytest.mark.parametrize(("guidance", "negative"), [(True, None), (True, "a red ball"), (False, None)])
@pytest.mark.parametrize("name", NAMES)
def test_encode_gives_what_the_pipeline_makes_of_prompts(name, guidance, negative):
    """A run on encoded prompts is bit-equal to the pipeline called with the prompts themselves."""
    fixture = importlib.import_module(f"tests.families.{name}")
    pipe = fixture.build()
    give_text_encoders(pipe, name)
    shared, per_run = fixture.arguments(pipe, steps=2, guidance=guidance)
    family, prompts = family_of(type(pipe).__name__), ['a red ball "falls"', 'a blue ball "rises"']
    plain = {key: value for key, value in shared.items() if key != "negative_prompt" and "seqlens" not in key}

    def run(**conditioning: Any) -> torch.Tensor:
        latents = per_run["latents"].clone()
        return pipe(latents=latents, **conditioning, output_type="latent", return_dict=False)[0]

    named = {"negative_prompt": [negative] * 2} if negative is not None else {}
    expected = run(**plain, **named, prompt=prompts)
    encoded = family.encode(pipe, prompts, guidance, negative)
    without = {"negative_prompt": None} if "negative_prompt" in shared else {}
    found = run(**plain, **without, **encoded)
    assert torch.equal(found, expected)
    assert (found[0] - found[1]).abs().max() > 1e-4
    assert {len(value) for value in encoded.values()} == {2}
    # Latte takes embeddings for unmasked only if negative ones come with them.
    assert any(key.startswith("negative") for key in encoded) == (guidance or name == "latte")
