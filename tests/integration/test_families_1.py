"""Families against tiny pipelines of their own classes: what adapters declare is what the denoisers do."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from interventions import kinds  # noqa: F401  (registers every kind)
from interventions.base import KINDS
from interventions.engine import Engine
from interventions.families.family import family_of
from interventions.record import Record, RunInputs
from interventions.sites import ALL_HEADS, Geometry
from interventions.solvers import levels
from interventions.streams import argument, from_canonical
from tests.families._weights import randomise

Patch, Knockout, BlockSkip = (KINDS[kind] for kind in ("patch", "knockout", "block_skip"))
STEPS, STEP = 4, 2
FRAMES, HEIGHT, WIDTH, HEADS = 5, 2, 3, 2
TOKENS, PLACES = FRAMES * HEIGHT * WIDTH, HEIGHT * WIDTH
NAMES = ("wan", "wan22_a14b", "wan22_ti2v", "wan_i2v21", "ltx", "ltx2", "cogvideox", "hunyuan_video")
JOINT = ("cogvideox", "hunyuan_video")
CONCATENATED = ("ltx", "ltx2", "cogvideox")


@dataclass(frozen=True)
class Case:
    """A tiny pipeline hosted by an engine, and its recorded runs."""

    name: str
    guidance: bool
    engine: Engine
    record: Record

    @property
    def geometry(self) -> Geometry:
        return self.record.geometry

    @property
    def scale(self) -> float:
        return float(self.record.final.abs().max())

    def denoiser(self, step: int = STEP) -> Any:
        return getattr(self.engine.pipe, self.geometry.denoiser(step))

    def block(self, index: int, step: int = STEP) -> Any:
        return self.denoiser(step).get_submodule(self.engine.family.addresses(self.denoiser(step).config)[index].path)

    def single(self, block: int) -> bool:
        """Whether a block has one stream for video and text."""
        return self.name == "hunyuan_video" and block >= 2


@pytest.fixture(scope="module", params=[(n, g) for n in NAMES for g in (True, False)], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request) -> Case:
    torch.set_num_threads(1)
    name, guidance = request.param
    module = importlib.import_module(f"tests.families.{name}")
    pipe = module.build()
    shared, per_run = module.arguments(pipe, steps=STEPS, guidance=guidance)
    engine = Engine(pipe, family_of(type(pipe).__name__))
    inputs = RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,))
    return Case(name, guidance, engine, engine.record(inputs))


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Take plain torch hooks off at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def clock(case: Case) -> Iterator[Callable[[], int]]:
    """Count denoiser calls with plain hooks; gives the step of the call at hand."""
    seen: list[None] = []
    denoisers = [getattr(case.engine.pipe, name) for name in case.geometry.denoisers]
    with hooked(*(d.register_forward_pre_hook(lambda module, args: seen.append(None)) for d in denoisers)):
        yield lambda: (len(seen) - 1) // len(case.geometry.calls)


EVERYTHING = slice(None)


def place_of(case: Case, block: int, component: str, stream: str, head: int) -> tuple[str, int | None, slice]:
    """Return where a plain hook finds an activation: module in the block, index in its output, tokens.

    Written down apart from the adapters. Heads are found in what enters the module, so their index means nothing.
    """
    video, index = stream == "video", 0 if stream == "video" else 1
    text_first = slice(-TOKENS, None) if video else slice(None, -TOKENS)
    if head != ALL_HEADS and not case.single(block):
        path = "attn.to_out.0" if case.name == "hunyuan_video" else f"{component}.to_out.0"
        return path, None, text_first if case.name == "cogvideox" else EVERYTHING
    if component in ("residual", "update"):
        return "", index if case.name in (*JOINT, "ltx2") else None, EVERYTHING
    if case.name == "hunyuan_video" and component == "attn1":
        return "attn", index, EVERYTHING
    if case.single(block):
        return "act_mlp", None, slice(None, TOKENS) if video else slice(TOKENS, None)
    if case.name == "hunyuan_video":
        return "ff" if video else "ff_context", None, EVERYTHING
    if case.name == "cogvideox":
        return ("attn1", index, EVERYTHING) if component == "attn1" else ("ff", None, text_first)
    feed_forward = "ff" if case.name.startswith("ltx") else "ffn"
    return feed_forward if component == "ffn" else component, None, EVERYTHING


def plain_patch(case: Case, layer: int, component: str, stream: str = "video", head: int = ALL_HEADS) -> torch.Tensor:
    """Copy the clean run's activation to the corrupted run with plain hooks, and return the corrupted result."""
    path, index, tokens = place_of(case, layer, component, stream, head)
    module = case.block(layer).get_submodule(path)

    def copied(value: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        value, size = value.clone(), value.shape[-1] // HEADS
        channels = EVERYTHING if head == ALL_HEADS else slice(head * size, (head + 1) * size)
        for clean in range(0, len(value), 2):
            new = value[clean, tokens, channels]
            if before is not None:
                new = before[clean + 1] + (new - before[clean])
            value[clean + 1, tokens, channels] = new
        return value

    with clock(case) as now:

        def leaving(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
            if now() != STEP:
                return None
            where = (0, "hidden_states") if stream == "video" else (1, "encoder_hidden_states")
            before = argument(args, kwargs, where) if component == "update" else None
            if index is None:
                return copied(output, before)
            return tuple(copied(part, before) if i == index else part for i, part in enumerate(output))

        def entering(_: Any, args: Any) -> Any:
            return (copied(args[0]), *args[1:]) if now() == STEP else None

        into = head != ALL_HEADS and not case.single(layer)
        hook = (
            module.register_forward_pre_hook(entering)
            if into
            else module.register_forward_hook(leaving, with_kwargs=True)
        )
        with hooked(hook):
            return case.engine.bare(case.record.inputs)[1]


def sites(case: Case) -> list[dict[str, Any]]:
    """Every activation that the geometry offers at one step, as fields of a patch."""
    geometry = case.geometry
    found: list[dict[str, Any]] = []
    for layer in range(geometry.blocks):
        for component in geometry.components_of(layer):
            found.append({"layer": layer, "component": component})
            if component in geometry.head_components:
                found += [{"layer": layer, "component": component, "head": h} for h in range(geometry.heads)]
        for component in geometry.components_of(layer, "text"):
            found.append({"layer": layer, "component": component, "stream": "text"})
    return found


def is_dead(case: Case, site: dict[str, Any]) -> bool:
    """Whether nothing reads the site: text that leaves the last block."""
    return site.get("stream") == "text" and site["layer"] == case.geometry.blocks - 1


def test_empty_plan_is_bit_equal_to_the_bare_pipeline(case):
    assert torch.equal(case.record.final, case.engine.bare(case.record.inputs))
    assert (case.record.final[0] - case.record.final[1]).abs().max() > 1e-2


def test_geometry_is_what_the_denoiser_does(case):
    """Extent, calls of a step with their rows, experts, and noise levels, observed on the bare pipeline."""
    geometry = case.geometry
    calls: list[tuple[str, int]] = []
    hooks = [
        getattr(case.engine.pipe, name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.append((name, len(kwargs["hidden_states"]))), with_kwargs=True
        )
        for name in geometry.denoisers
    ]
    with hooked(*hooks):
        case.engine.bare(case.record.inputs)
    expected = [(geometry.denoiser(step), 2 * len(call)) for step in range(STEPS) for call in geometry.calls]
    assert calls == expected
    if case.guidance:
        assert geometry.calls == ((("uncond", "cond"),) if case.name in CONCATENATED else (("cond",), ("uncond",)))
    else:
        assert geometry.calls == (("cond",),)
    assert (geometry.frames, geometry.height, geometry.width, geometry.frame_patch) == (FRAMES, HEIGHT, WIDTH, 1)
    assert geometry.heads == HEADS
    assert geometry.given_frames == (1 if case.name == "wan22_ti2v" else 0)
    assert geometry.blocks == {"hunyuan_video": 4, "ltx2": 2}.get(case.name, 3)
    assert geometry.denoiser_at == ((0, 0, 1, 1) if case.name == "wan22_a14b" else ())
    torch.testing.assert_close(torch.tensor(geometry.levels), torch.tensor(levels(case.engine.pipe.scheduler)))


def test_components_of_the_family(case):
    geometry = case.geometry
    if case.name in JOINT:
        assert geometry.components == ("attn1", "ffn", "update", "residual") == geometry.text_components
        assert geometry.head_components == geometry.knockout == ("attn1",)
    else:
        assert geometry.components == ("attn1", "attn2", "ffn", "update", "residual")
        assert geometry.text_components == ()
        assert geometry.head_components == geometry.knockout == ("attn1", "attn2")


def test_branches_carry_their_prompts(case):
    """The two runs differ in the conditional branch and share the negative prompt in the other."""
    conditioning = case.record.conditioning
    assert set(conditioning) == set(case.geometry.branches)
    cond, per_run = conditioning["cond"]["encoder_hidden_states"], case.record.inputs.per_run
    assert (cond[0] - cond[1]).abs().max() > 1e-2
    if case.name != "ltx2":  # whose prompts pass through connectors
        assert torch.equal(cond, per_run["prompt_embeds"])
    if case.guidance:
        uncond = conditioning["uncond"]["encoder_hidden_states"]
        assert torch.equal(uncond[0], uncond[1])
        assert (uncond - cond).abs().max() > 1e-2


def test_prompt_arguments_are_all_that_tells_runs_apart(case):
    """Of the tensors that a denoiser receives at the first step, exactly the conditioning differs between the runs."""
    seen: list[dict[str, torch.Tensor]] = []
    # Copies, as Kandinsky writes each step's result into the latents of the step.
    hook = case.denoiser(0).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            {name: value.clone() for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        ),
        with_kwargs=True,
    )
    with hooked(hook):
        case.engine.bare(case.record.inputs)
    call = case.geometry.call_of("cond")
    at = 2 * case.geometry.calls[call].index("cond")
    rowwise = {name: value for name, value in seen[call].items() if value.ndim > 1 and len(value) > 1}
    differing = {name for name, value in rowwise.items() if not torch.equal(value[at], value[at + 1])}
    assert differing
    assert differing <= set(case.engine.family.conditioning)


def test_a_latent_frame_is_its_declared_tokens(case):
    """Perturbing one frame of the latents changes its slice of the first block's video tokens and nothing else."""
    engine, inputs = case.engine, case.record.inputs
    latents = case.record.latents[0]
    blocks = engine.family.blocks[0]

    def first_tokens(canonical: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        given = from_canonical(canonical, engine.family.latent_layout)
        hook = case.block(0, step=0).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(argument(args, kwargs, blocks.video_input).clone()),
            with_kwargs=True,
        )
        with hooked(hook):
            engine.bare(replace(inputs, per_run={**inputs.per_run, "latents": given}))
        return seen[0]

    before = first_tokens(latents)
    assert before.shape[1] == TOKENS
    for frame in range(FRAMES):
        changed = latents.clone()
        changed[:, :, frame] += 0.5
        moved = (first_tokens(changed) - before).abs().amax(dim=(0, 2)) > 0
        expected = torch.zeros(TOKENS, dtype=torch.bool)
        if frame >= case.geometry.given_frames:
            expected[frame * PLACES : (frame + 1) * PLACES] = True
        assert torch.equal(moved, expected)


def test_self_patch_is_an_identity_everywhere(case):
    cells = [Patch(direction="self", step=STEP, **site) for site in sites(case)]
    for pair in zip(cells[::2], [*cells[1::2], cells[0]], strict=False):
        final = case.engine.fork(case.record, list(pair)).final
        assert (final - case.record.final[[0, 0]]).abs().max() <= 1e-6 * case.scale


def test_every_site_equals_a_plain_hook_patch_and_matters(case):
    """Every component, head and text stream of every block, patched in one batch, against a hooked bare run each."""
    everywhere = sites(case)
    fork = case.engine.fork(case.record, [Patch(step=STEP, **site) for site in everywhere])
    for site, final in zip(everywhere, fork.final, strict=True):
        effect = (final - case.record.final[1]).abs().max() / case.scale
        assert (effect < 1e-6) if is_dead(case, site) else (effect > 1e-5), site
        assert (final - plain_patch(case, **site)).abs().max() < 1e-5 * case.scale, site


def test_nothing_changes_before_the_patched_step(case):
    fork = case.engine.fork(case.record, [Patch(step=STEP, layer=1, component="update")], keep_x0_hat=True)
    for step in range(STEP):
        assert torch.equal(fork.x0_hat[step][0], case.record.x0_hat[step][1])
    assert (fork.x0_hat[STEP][0] - case.record.x0_hat[STEP][1]).abs().max() > 1e-4


def test_the_last_residual_gives_the_donor_prediction(case):
    """At step 0 both runs hold the same latents, so equal predictions mean equal clean estimates."""
    record, cell = case.record, Patch(step=0, layer=case.geometry.blocks - 1, component="residual")
    if case.name == "hunyuan_video":
        # The pooled prompt also modulates the norm after the last block, which no block's output can carry.
        assert (case.engine.fork(record, [cell], keep_x0_hat=True).x0_hat[0][0] - record.x0_hat[0][0]).abs().max() > 0.1
        per_run = record.inputs.per_run
        per_run = {**per_run, "pooled_prompt_embeds": per_run["pooled_prompt_embeds"][[0, 0]]}
        record = case.engine.record(replace(record.inputs, per_run=per_run))
    fork = case.engine.fork(record, [cell], keep_x0_hat=True)
    clean, corrupted = record.x0_hat[0]
    assert (clean - corrupted).abs().max() > 1e-3
    torch.testing.assert_close(fork.x0_hat[0][0], clean, atol=1e-5, rtol=1e-5)


def test_example_runs_and_tells_its_rows_apart(case):
    """The smallest run needs no fixture: it is made from the pipeline's configs alone."""
    engine = case.engine
    shared, per_run = engine.family.example(engine.pipe, 2, case.guidance)
    inputs = RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,))
    record = engine.record(inputs)
    assert torch.equal(per_run["latents"][0], per_run["latents"][1])
    assert torch.equal(record.final, engine.bare(inputs))
    assert (record.final[0] - record.final[1]).abs().max() > 1e-3
    assert (len(record.geometry.branches) == 2) == case.guidance


def cut_mask(case: Case, pattern: str, queries: int, keys: int) -> torch.Tensor:
    """Return which keys each query may read, token by token: bool (queries, keys)."""
    frame = torch.arange(TOKENS) // PLACES
    if queries != keys:  # cross-attention to the prompt, or to tokens of an image, which stay
        prompt = case.record.inputs.per_run["prompt_embeds"].shape[1]
        return torch.full((queries, keys), pattern != "text" or keys != prompt)
    mask, first = torch.ones(queries, keys, dtype=torch.bool), keys - TOKENS if case.name == "cogvideox" else 0
    video = slice(first, first + TOKENS)
    if pattern == "causal":
        mask[video, video] = frame[:, None] >= frame[None, :]
    else:
        mask[video] = False
        mask[video, video] = True
    return mask


def plain_knockout(case: Case, monkeypatch: pytest.MonkeyPatch, layer: int, component: str, pattern: str) -> Any:
    """Mask the clean run's attention with a dense mask inside one module, and return the clean result."""
    ordinary, inside = F.scaled_dot_product_attention, [False]

    def masked(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        out = ordinary(query, key, value, attn_mask, dropout_p, is_causal, **more)
        if not inside[0]:
            return out
        out = out.clone()
        for row in range(0, len(query), 2):
            mask = cut_mask(case, pattern, query.shape[2], key.shape[2])
            if attn_mask is not None:
                own = attn_mask[row : row + 1]
                mask = own & mask if own.dtype == torch.bool else own.masked_fill(~mask, -torch.inf)
            cut = ordinary(query[row : row + 1], key[row : row + 1], value[row : row + 1], mask, **more)
            out[row] = cut[0].nan_to_num()
        return out

    module = case.block(layer).get_submodule("attn" if case.name == "hunyuan_video" else component)
    with clock(case) as now, monkeypatch.context() as patched:

        def begin(_: Any, args: Any) -> None:
            inside[0] = now() == STEP

        def end(_: Any, args: Any, output: Any) -> None:
            inside[0] = False

        patched.setattr(F, "scaled_dot_product_attention", masked)
        with hooked(module.register_forward_pre_hook(begin), module.register_forward_hook(end)):
            return case.engine.bare(case.record.inputs)[0]


def test_attention_cuts_equal_a_dense_mask(case, monkeypatch):
    """Edges between frames in attn1, and from video to text where text is read, in every block."""
    rows = [(layer, "attn1", "causal") for layer in range(case.geometry.blocks)]
    rows += [(layer, "attn1" if case.name in JOINT else "attn2", "text") for layer in range(case.geometry.blocks)]
    fork = case.engine.fork(
        case.record, [Knockout(pattern=p, step=STEP, layer=layer, component=c) for layer, c, p in rows]
    )
    for (layer, component, pattern), final in zip(rows, fork.final, strict=True):
        assert (final - case.record.final[0]).abs().max() > 1e-5 * case.scale
        expected = plain_knockout(case, monkeypatch, layer, component, pattern)
        assert (final - expected).abs().max() < 1e-5 * case.scale, (layer, component, pattern)


@pytest.mark.parametrize("mode", ["skip", "repeat"])
def test_block_programs_equal_plain_hooks(case, mode):
    """A skipped block gives what entered it, a repeated one runs on its own result, in video and text alike."""
    layers = range(case.geometry.blocks)
    fork = case.engine.fork(case.record, [BlockSkip(mode=mode, step=STEP, layer=layer) for layer in layers])
    beside = {"ltx2": ("audio_hidden_states",)} | dict.fromkeys(JOINT, ("encoder_hidden_states",))
    streams = ("hidden_states", *beside.get(case.name, ()))
    for layer, final in zip(layers, fork.final, strict=True):
        block = case.block(layer)
        with clock(case) as now:

            def leaving(module: Any, args: Any, kwargs: Any, output: Any, now: Any = now) -> Any:
                if now() != STEP:
                    return None
                parts = list(output) if isinstance(output, tuple) else [output]
                replaced = [argument(args, kwargs, (i, name)) for i, name in enumerate(streams)]
                if mode == "repeat":
                    again = {name: kwargs.get(name) for name in kwargs} | dict(zip(streams, parts, strict=False))
                    positional = () if streams[0] in kwargs else (*parts[: len(streams)], *args[len(streams) :])
                    given = again if streams[0] in kwargs else kwargs
                    result = module.forward(*positional, **given)
                    replaced = list(result) if isinstance(result, tuple) else [result]
                for i in range(len(streams)):
                    parts[i] = parts[i].clone()
                    parts[i][::2] = replaced[i][::2]
                return tuple(parts) if isinstance(output, tuple) else parts[0]

            with hooked(block.register_forward_hook(leaving, with_kwargs=True)):
                expected = case.engine.bare(case.record.inputs)[0]
        assert (final - case.record.final[0]).abs().max() > 1e-5 * case.scale
        assert (final - expected).abs().max() < 1e-5 * case.scale, layer


def tokenizer(length: int) -> Any:
    """Build a tokenizer that knows a few words; unknown ones are all the same token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "a", "red", "blue", "ball", "falls", "rises"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", model_max_length=length)


def give_text_encoders(pipe: Any, name: str) -> None:
    """Register tiny random text encoders of the pipeline's own kind, whose width is that of the fixture."""
    import transformers as t

    tiny = {"vocab_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    pads = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if name == "hunyuan_video":
        # The prompt is cut out of a template by position, and taken from the third layer from the top.
        llama = t.LlamaModel(t.LlamaConfig(hidden_size=12, num_hidden_layers=3, **tiny, **pads))
        clip = t.CLIPTextModel(
            t.CLIPTextConfig(hidden_size=8, num_hidden_layers=1, **tiny, **{**pads, "eos_token_id": 0})
        )
        pipe.register_modules(
            text_encoder=randomise(llama, 9),
            tokenizer=tokenizer(400),
            text_encoder_2=randomise(clip, 10),
            tokenizer_2=tokenizer(77),
        )
        return
    if name == "ltx2":
        config = t.Gemma3TextConfig(
            hidden_size=12, num_hidden_layers=1, num_key_value_heads=2, head_dim=6, **tiny, **pads
        )
        encoder: Any = t.Gemma3TextModel(config)
    else:
        kind, config_kind = (
            (t.UMT5EncoderModel, t.UMT5Config) if name.startswith("wan") else (t.T5EncoderModel, t.T5Config)
        )
        encoder = kind(config_kind(vocab_size=8, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2))
    pipe.register_modules(text_encoder=randomise(encoder, 9), tokenizer=tokenizer(512))


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("name", ["wan", "wan22_ti2v", "ltx", "ltx2", "cogvideox", "hunyuan_video"])
def test_encode_gives_what_the_pipeline_makes_of_prompts(name, guidance):
    """A run on encoded prompts is bit-equal to the pipeline called with the prompts themselves."""
    fixture = importlib.import_module(f"tests.families.{name}")
    pipe = fixture.build()
    give_text_encoders(pipe, name)
    shared, per_run = fixture.arguments(pipe, steps=2, guidance=guidance)
    latents = {key: value for key, value in per_run.items() if key.endswith("latents")}
    family, prompts = family_of(type(pipe).__name__), ["a red ball falls", "a blue ball rises"]
    if name == "cogvideox":
        shared["max_sequence_length"] = pipe.transformer.config.max_text_seq_length
    negative = {"negative_prompt": ["", ""]} if name == "hunyuan_video" and guidance else {}
    expected = pipe(**shared, **latents, **negative, prompt=prompts, output_type="latent", return_dict=False)[0]
    encoded = family.encode(pipe, prompts, guidance)
    found = pipe(**shared, **latents, **encoded, output_type="latent", return_dict=False)[0]
    assert torch.equal(found, expected)
    assert (found[0] - found[1]).abs().max() > 1e-4
    assert {len(value) for value in encoded.values()} == {2}
    assert any(key.startswith("negative") for key in encoded) == guidance


def test_latents_that_are_not_packed_are_refused():
    fixture = importlib.import_module("tests.families.ltx")
    pipe = fixture.build()
    shared, per_run = fixture.arguments(pipe)
    extent = family_of("LTXPipeline").extent
    assert extent(pipe, shared, per_run["latents"]) == (FRAMES, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"shape \(2, 29, 4\); give .* with 5 x 2 x 3 tokens"):
        extent(pipe, shared, per_run["latents"][:, 1:])
    with pytest.raises(ValueError, match=r"give \(rows, tokens, channels\)"):
        extent(pipe, shared, per_run["latents"].unflatten(1, (FRAMES, HEIGHT, WIDTH)).movedim(-1, 1))


@pytest.mark.parametrize(
    ("change", "extra"),
    [
        ({"stg_scale": 1.0}, "stg"),
        ({"audio_stg_scale": 0.5}, "stg"),
        ({"modality_scale": 3.0}, "modality"),
        ({"modality_scale": 2.0, "audio_modality_scale": 0.0}, "modality"),
    ],
)
def test_guidance_that_adds_denoiser_calls_is_refused(change, extra):
    """LTX-2 has two more kinds of guidance, on unless they are set to off."""
    fixture = importlib.import_module("tests.families.ltx2")
    pipe = fixture.build()
    shared, _ = fixture.arguments(pipe, guidance=False)
    guidance = family_of("LTX2Pipeline").guidance
    assert guidance(shared) is False
    assert guidance({**shared, "audio_guidance_scale": 2.0}) is True
    with pytest.raises(ValueError, match=f"{extra}_scale=.*Set both"):
        guidance({**shared, **change})
    with pytest.raises(ValueError, match=r"stg_scale=1\.0"):
        guidance({})


def variant(name: str) -> Any:
    """Build a tiny pipeline of a checkpoint that is configured otherwise than the fixture of its family."""
    import diffusers

    if name == "wan22_a14b_i2v":
        from tests.families import wan, wan22_ti2v

        channels = wan.LATENT_SHAPE[0]
        return diffusers.WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=wan22_ti2v.autoencoder(2),
            scheduler=wan.scheduler(3.0),
            transformer=wan.transformer(0, in_channels=2 * channels + 4),
            transformer_2=wan.transformer(1, in_channels=2 * channels + 4),
            boundary_ratio=0.9,
        )
    module = importlib.import_module(f"tests.families.{name.split('-')[0]}")
    pipe = module.build()
    changes = {
        "cogvideox-2b": {"use_rotary_positional_embeddings": False},
        "cogvideox-1.5": {"patch_size_t": 2, "patch_bias": False},
        "hunyuan_video-undistilled": {"guidance_embeds": False},
    }
    if name == "wan-ti2v_5b":
        pipe.register_to_config(expand_timesteps=True)
    elif name == "cogvideox-5b":
        pipe.register_modules(scheduler=diffusers.CogVideoXDPMScheduler.from_config(pipe.scheduler.config))
    else:
        config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
        pipe.register_modules(transformer=randomise(type(pipe.transformer)(**{**config, **changes[name]}), 0))
    return pipe


VARIANTS = (
    "wan22_a14b_i2v",
    "wan-ti2v_5b",
    "cogvideox-2b",
    "cogvideox-1.5",
    "cogvideox-5b",
    "hunyuan_video-undistilled",
)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_other_checkpoints_of_a_family_run(name, guidance):
    """The example fits them; recording is exact, a self-patch an identity and a patch has an effect."""
    pipe = variant(name)
    engine = Engine(pipe, family_of(type(pipe).__name__))
    shared, per_run = engine.family.example(pipe, 3, guidance)
    record = engine.record(RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,)))
    geometry, scale = record.geometry, float(record.final.abs().max())
    assert (geometry.frames, geometry.height, geometry.width) == (3, 2, 3)
    assert geometry.frame_patch == (2 if name == "cogvideox-1.5" else 1)
    assert geometry.given_frames == 0
    assert torch.equal(record.final, engine.bare(record.inputs))
    itself, patch = (Patch(step=1, layer=1, component="update", direction=d) for d in ("self", "denoising"))
    final = engine.fork(record, [itself, patch]).final
    assert (final[0] - record.final[0]).abs().max() <= 1e-6 * scale
    assert (final[1] - record.final[1]).abs().max() > 1e-4 * scale
