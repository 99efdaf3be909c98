"""Prompts encoded once each, by text encoders that are on the GPU only while they encode."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

KEPT = 64
"""Encoded calls that are remembered; two prompts of 512 tokens take about 8 MB in half precision."""


class Conditioning:
    """Wrap a pipeline's ``encode_prompt``: equal calls give the tensors of the first, and encoders rest on the CPU.

    The text encoder of a video model is often as large as a third of its denoiser and used once a prompt. The VAE
    stays where it is: image-to-video pipelines encode their image in every run.

    Parameters
    ----------
    pipe : a diffusers pipeline; ``release`` undoes the wrap.
    parks : whether encoders go to the CPU while they are idle; None for where the pipeline is on one GPU.
    """

    def __init__(self, pipe: Any, *, parks: bool | None = None) -> None:
        self._pipe, self._encode = pipe, getattr(pipe, "encode_prompt", None)
        self._home = pipe.device
        spread = getattr(pipe, "hf_device_map", None) is not None
        self.parks = (self._home.type == "cuda" and not spread) if parks is None else parks
        self._known: OrderedDict[str, Any] = OrderedDict()
        if self._encode is not None:
            pipe.encode_prompt = self._once
        self._park()

    def release(self) -> None:
        """Give the pipeline its own method and its encoders back."""
        if self._encode is not None:
            del self._pipe.encode_prompt
        for encoder in self._encoders():
            encoder.to(self._home)

    def _once(self, *args: Any, **kwargs: Any) -> Any:
        if not _has_text([args, kwargs]):
            # The pipeline's own call, which was given embeddings and only arranges them.
            return self._encode(*args, **kwargs)  # type: ignore[misc]
        key = _key([args, kwargs])
        if key is None:
            with self._awake():
                return self._encode(*args, **kwargs)  # type: ignore[misc]
        if key not in self._known:
            with self._awake():
                self._known[key] = self._encode(*args, **kwargs)  # type: ignore[misc]
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    @contextmanager
    def _awake(self) -> Iterator[None]:
        try:
            for encoder in self._encoders() if self.parks else ():
                encoder.to(self._home)
            yield
        finally:
            self._park()

    def _park(self) -> None:
        for encoder in self._encoders() if self.parks else ():
            encoder.to("cpu")

    def _encoders(self) -> list[Any]:
        names = sorted(name for name in self._pipe.components if name.startswith("text_encoder"))
        return [encoder for name in names if (encoder := getattr(self._pipe, name, None)) is not None]


def _has_text(value: Any) -> bool:
    if isinstance(value, str):
        return True
    if isinstance(value, Mapping):
        return any(_has_text(v) for v in value.values())
    return isinstance(value, Sequence) and any(_has_text(v) for v in value)


def _key(value: Any) -> str | None:
    """Return what tells calls apart, None for a call with values whose text does not say what they hold."""
    import torch

    if isinstance(value, Mapping):
        return _key(sorted(value.items()))
    if isinstance(value, list | tuple):
        parts = [_key(v) for v in value]
        return None if None in parts else f"[{','.join(map(str, parts))}]"
    known = (str, int, float, bool, type(None), torch.device, torch.dtype)
    return repr(value) if isinstance(value, known) else None
