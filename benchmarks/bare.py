"""The denoiser of a pipeline alone: no nnsight, no loop, no solver, no store."""

from __future__ import annotations

from typing import Any

import torch

from interventions.record import RunInputs


class BareDenoiser:
    """A pipeline's denoiser with the arguments that the pipeline gives it in the middle of a run.

    Parameters
    ----------
    pipe : a diffusers pipeline that nothing of ours has wrapped. inputs : of its runs; the second one is used.
    """

    def __init__(self, pipe: Any, inputs: RunInputs) -> None:
        seen: list[dict[str, Any]] = []
        hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
        pipe(**inputs.shared, **inputs.rows([1]), output_type="latent", return_dict=False)
        hook.remove()
        self._denoiser, self._given = pipe.transformer, seen[len(seen) // 2]

    def forwards(self, rows: int, times: int) -> None:
        """Run some forwards of so many rows."""
        given = {
            name: v.repeat(rows, *[1] * (v.ndim - 1)) if isinstance(v, torch.Tensor) else v
            for name, v in self._given.items()
        }
        with torch.no_grad():
            for _ in range(times):
                self._denoiser(**given)
