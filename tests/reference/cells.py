"""Representative cells: every kind with all its modes, at every sort of site."""

from __future__ import annotations

from typing import Any

from interventions import kinds  # noqa: F401  (registers every kind)
from interventions.base import KINDS, Intervention


def cell(kind: str, **fields: Any) -> Intervention:
    return KINDS[kind](**fields)


def compose(**fields: Any) -> Intervention:
    return KINDS["compose"].model_validate(fields)


def cells(first: int = 0) -> dict[str, Intervention]:
    """Return cells of runs of 4 steps, at least 4 frames of 2 x 3 tokens and 2 heads, by name.

    Parameters
    ----------
    first : the first block that has video tokens; cells in the text stream are in blocks 0 and 1.
    """
    return {
        # Every component, every way to choose tokens, windows, branches, donors.
        "patch_attn1": cell("patch", step=2, layer=first + 1, component="attn1"),
        "patch_attn2": cell("patch", step=1, layer=first, component="attn2"),
        "patch_ffn": cell("patch", step=3, layer=first + 1, component="ffn"),
        "patch_update": cell("patch", step=0, layer=first + 1, component="update"),
        "patch_residual": cell("patch", step=2, layer=first, component="residual"),
        "patch_noising": cell("patch", step=1, layer=first + 1, direction="noising"),
        "patch_alpha": cell("patch", step=3, layer=first, alpha=0.4),
        "patch_beyond": cell("patch", step=1, layer=first + 1, component="residual", alpha=1.5),
        "patch_frame": cell("patch", step=2, layer=first + 1, frame=2),
        "patch_frames": cell("patch", step=2, layer=first + 1, component="attn1", frames="0,2-3"),
        "patch_box": cell("patch", step=1, layer=first + 1, component="residual", box="0:1,1:3"),
        "patch_frame_box": cell("patch", step=1, layer=first, component="ffn", frames="1-2", box="1:2,0:2"),
        "patch_head": cell("patch", step=2, layer=first + 1, component="attn1", head=1),
        "patch_head_attn2": cell("patch", step=2, layer=first, component="attn2", head=0),
        "patch_head_frame": cell("patch", step=2, layer=first + 1, component="attn1", head=0, frame=3),
        "patch_text_residual": cell("patch", step=1, layer=0, component="residual", stream="text"),
        "patch_text_update": cell("patch", step=2, layer=1, component="update", stream="text", branch="cond"),
        "patch_text_attn1": cell("patch", step=1, layer=0, component="attn1", stream="text"),
        "patch_text_ffn": cell("patch", step=2, layer=0, component="ffn", stream="text", alpha=0.5),
        "patch_cond": cell("patch", step=1, layer=first, component="residual", branch="cond"),
        "patch_uncond": cell("patch", step=2, layer=first + 1, component="residual", branch="uncond"),
        "patch_window": cell("patch", step=1, steps=2, layer=first, layers=2, component="update"),
        "patch_all_steps": cell("patch", step=0, steps=4, layer=first + 1, component="attn1", alpha=0.3),
        "patch_late": cell("patch", step=3, layer=first + 1, component="residual"),
        "patch_other_sample": cell("patch", step=1, layer=first + 1, component="residual", donor_sample=1),
        "patch_first_expert": cell("patch", step=1, layer=first + 1, component="residual", denoiser="transformer"),
        "patch_second_expert": cell("patch", step=2, layer=first + 1, component="residual", denoiser="transformer_2"),
        "ablate_zero": cell("ablate", value="zero", step=1, layer=first + 1, component="attn1"),
        "ablate_zero_head": cell(
            "ablate", value="zero", step=1, layer=first, component="attn1", head=1, branch="uncond"
        ),
        "ablate_zero_text": cell("ablate", value="zero", step=1, layer=0, component="update", stream="text"),
        "ablate_mean": cell("ablate", value="mean", reference=3, step=2, layer=first, component="residual"),
        "ablate_mean_other_run": cell(
            "ablate", value="mean", reference=2, reference_run="corrupted", step=1, layer=first + 1, component="ffn"
        ),
        "ablate_resample": cell("ablate", value="resample", donor_sample=2, step=1, layer=first + 1, run="corrupted"),
        "ablate_gaussian": cell("ablate", value="gaussian", step=2, layer=first + 1, component="ffn"),
        "ablate_gaussian_frame": cell("ablate", value="gaussian", step=0, layer=first + 1, frame=1),
        "ablate_gaussian_head": cell("ablate", value="gaussian", step=2, layer=first, component="attn1", head=0),
        "hidden_noise": cell("hidden_noise", step=1, layer=first, component="residual", run="corrupted"),
        "hidden_noise_region": cell("hidden_noise", strength=0.5, step=2, layer=first + 1, frames="1-3", box="0:2,0:2"),
        "hidden_noise_head": cell("hidden_noise", step=2, layer=first + 1, component="attn1", head=1, branch="cond"),
        "hidden_noise_text": cell("hidden_noise", step=1, layer=0, component="residual", stream="text"),
        "steer": cell("steer", step=1, layer=first, component="residual", reference=3),
        "steer_per_token": cell(
            "steer", step=2, layer=first + 1, per_token=True, reference=2, strength=-0.5, run="clean"
        ),
        "ensemble": cell("seed_ensemble", seeds=3, step=0, layer=first, layers=2),
        "ensemble_update": cell("seed_ensemble", seeds=2, step=1, layer=first, layers=2, component="update"),
        "ensemble_attn1": cell("seed_ensemble", seeds=2, step=1, layer=first + 1, component="attn1", run="corrupted"),
        "ensemble_attn2": cell("seed_ensemble", seeds=2, step=1, layer=first + 1, component="attn2", frames="1-2"),
        "ensemble_ffn": cell("seed_ensemble", seeds=2, step=2, layer=first, component="ffn", branch="uncond"),
        # What the blocks compute, and what their attention reads.
        "block_skip": cell("block_skip", mode="skip", step=1, layer=first + 1),
        "block_skip_window": cell("block_skip", mode="skip", step=1, steps=2, layer=0, layers=2, run="corrupted"),
        "block_skip_uncond": cell("block_skip", mode="skip", step=2, layer=first, branch="uncond"),
        "block_repeat": cell("block_skip", mode="repeat", step=2, layer=first + 1),
        "block_repeat_window": cell("block_skip", mode="repeat", step=1, layer=first, layers=2, branch="cond"),
        "block_swap": cell("block_skip", mode="swap", step=1, layer=0),
        "block_swap_far": cell("block_skip", mode="swap", step=1, layer=first, other=first + 2),
        "cut_causal": cell("knockout", pattern="causal", step=1, layer=first + 1),
        "cut_anti_causal": cell("knockout", pattern="anti_causal", step=2, layer=first + 1, branch="cond"),
        "cut_local": cell("knockout", pattern="local", reach=1, step=1, steps=2, layer=first, layers=2),
        "cut_own_frame": cell("knockout", pattern="local", reach=0, step=3, layer=first + 1, branch="uncond"),
        "cut_from": cell("knockout", pattern="from_frames", frames="1,3", step=1, layer=first + 1, run="corrupted"),
        "cut_to": cell("knockout", pattern="to_frames", frame=2, step=1, layer=first + 1),
        "cut_between": cell("knockout", pattern="between", frames="0-1", queries="1-3", step=2, layer=first + 1),
        "cut_head": cell("knockout", pattern="causal", head=1, step=1, layer=first + 1),
        "cut_text": cell("knockout", pattern="text", step=1, layer=first),
        "cut_text_head": cell("knockout", pattern="text", head=0, step=2, layer=first, branch="cond"),
        "cut_attn1": cell("knockout", pattern="to_frames", frames="0-1", component="attn1", step=0, layer=first + 1),
        "cut_text_attn1": cell("knockout", pattern="text", component="attn1", step=1, layer=first + 1),
        "cut_text_attn2": cell("knockout", pattern="text", component="attn2", step=1, steps=2, layer=first, layers=2),
        # The latents, the prompt, and the steps.
        "latent_noise": cell("latent_noise", step=2),
        "latent_noise_first": cell("latent_noise", step=0, frames="1-2"),
        "latent_noise_window": cell("latent_noise", step=1, steps=3, frame=2),
        "latent_noise_box": cell("latent_noise", step=1, box="0:2,1:3", run="corrupted"),
        "latent_noise_additive": cell("latent_noise", form="additive", strength=0.3, step=1, steps=2, frames="1,3"),
        "latent_swap": cell("latent_swap", step=2),
        "latent_swap_alpha": cell("latent_swap", step=1, steps=2, alpha=0.4, frames="1-2", box="0:1,0:3"),
        "latent_swap_seed": cell("latent_swap", donor="seed", offset=2, step=1, frame=3),
        "latent_swap_entry": cell("latent_swap", donor="seed", step=0, frame=2),
        "latent_swap_sample": cell("latent_swap", donor="sample", step=3, run="corrupted"),
        "latent_swap_final": cell("latent_swap", step=4),
        "noise_step_off": cell("noise", at="step", path="off_path", step=2),
        "noise_step_on": cell("noise", at="step", step=1),
        "noise_frame_off": cell("noise", at="frame", path="off_path", frame=2),
        "noise_frame_on": cell("noise", at="frame", frame=3, run="corrupted"),
        "shuffle_permute": cell("frame_shuffle", mode="permute", step=1),
        "shuffle_reverse": cell("frame_shuffle", mode="reverse", step=2),
        "shuffle_entry": cell("frame_shuffle", mode="reverse", step=0),
        "shuffle_freeze": cell("frame_shuffle", mode="freeze", frame=2, step=3, run="corrupted"),
        "shuffle_drop": cell("frame_shuffle", mode="drop", frame=1, step=1, steps=2),
        "shuffle_hidden": cell("frame_shuffle", space="hidden", mode="permute", step=1, layer=first + 1),
        "shuffle_hidden_window": cell(
            "frame_shuffle", space="hidden", mode="reverse", component="attn1", step=1, steps=2, layer=first, layers=2
        ),
        "shuffle_hidden_drop": cell(
            "frame_shuffle",
            space="hidden",
            mode="drop",
            frame=3,
            step=2,
            layer=first + 1,
            component="update",
            branch="cond",
        ),
        "shuffle_hidden_attn2": cell(
            "frame_shuffle", space="hidden", mode="freeze", frame=1, step=2, layer=first, component="attn2"
        ),
        "shuffle_hidden_ffn": cell(
            "frame_shuffle", space="hidden", mode="reverse", step=2, layer=first + 1, component="ffn", branch="uncond"
        ),
        "prompt_swap": cell("prompt_swap", step=1),
        "prompt_swap_once": cell("prompt_swap", step=2, steps=1, run="corrupted"),
        "prompt_swap_sample": cell("prompt_swap", donor="sample", offset=2, step=0, steps=2, branch="both"),
        "prompt_swap_uncond": cell("prompt_swap", donor="sample", step=1, branch="uncond"),
        "reuse": cell("step_skip", mode="reuse", step=2),
        "reuse_cond": cell("step_skip", mode="reuse_branch", branch="cond", step=1),
        "reuse_uncond": cell("step_skip", mode="reuse_branch", branch="uncond", step=3),
        "freeze": cell("step_skip", mode="freeze", step=1, run="corrupted"),
        "freeze_last": cell("step_skip", mode="freeze", step=3),
        "drop": cell("step_skip", mode="drop", step=2),
        "drop_first": cell("step_skip", mode="drop", step=0, run="corrupted"),
        "drop_last": cell("step_skip", mode="drop", step=3),
        "repeat": cell("step_skip", mode="repeat", step=1),
        "swap_steps": cell("step_skip", mode="swap", step=1),
        "swap_far_steps": cell("step_skip", mode="swap", step=0, other=2),
        # Several at once: at one point, at points that meet in one block, and beside a changed schedule.
        "compose_latents": compose(
            parts={
                "1": {"kind": "frame_shuffle", "mode": "reverse", "step": 1},
                "2": {"kind": "latent_noise", "form": "additive", "strength": 0.3, "step": 1, "frame": 2},
            }
        ),
        "compose_sites": compose(
            step=1,
            layer=first + 1,
            parts={
                "1": {"kind": "hidden_noise", "component": "residual", "frames": "1-2", "strength": 0.5},
                "2": {"kind": "ablate", "value": "zero", "component": "attn1", "head": 1},
                "3": {"kind": "patch", "direction": "noising", "component": "residual", "alpha": 0.5},
                "4": {"kind": "patch", "direction": "noising", "component": "update", "step": 2},
            },
        ),
        "compose_attention": compose(
            step=2,
            parts={
                "1": {"kind": "knockout", "pattern": "causal", "layer": first + 1, "head": 0},
                "2": {"kind": "knockout", "pattern": "from_frames", "frames": "2", "layer": first + 1},
                "3": {"kind": "prompt_swap"},
            },
        ),
        "compose_blocks": compose(
            step=1,
            parts={
                "1": {"kind": "block_skip", "mode": "repeat", "layer": first},
                "2": {"kind": "hidden_noise", "component": "update", "layer": first},
                "3": {"kind": "step_skip", "mode": "reuse", "step": 2},
            },
        ),
        "compose_drop": compose(
            parts={
                "1": {"kind": "step_skip", "mode": "drop", "step": 2},
                "2": {"kind": "patch", "direction": "noising", "step": 1, "layer": first, "component": "residual"},
                "3": {"kind": "latent_noise", "form": "additive", "strength": 0.2, "step": 3, "frames": "1-2"},
            }
        ),
        "compose_swap": compose(
            step=3,
            parts={
                "1": {"kind": "step_skip", "mode": "swap", "step": 1},
                "2": {"kind": "latent_noise", "frame": 1},
                "3": {"kind": "ablate", "value": "gaussian", "layer": first + 1, "component": "attn1"},
            },
        ),
    }
