"""One transformer block computed alone: which of its modules hold which tokens, found by moving one token at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from interventions.families.family import Attention, Tap
from interventions.probing.forward import Where
from interventions.probing.run import Attended
from interventions.probing.tokens import Tokens, below
from interventions.sites import Component

Order = Literal["video", "video_text", "text_video", "cross"]


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What one block shows.

    Attributes
    ----------
    taps : components in forward order, as a family declares them. attention : attentions whose edges can be cut.
    text_input : the argument that carries text, where the block gives text back. heads : of its attentions.
    guessed : components that were told by their names. doubts : what could not be decided, in sentences.
    """

    taps: Mapping[str, Tap]
    attention: Mapping[Component, Attention]
    text_input: Where | None
    heads: int
    guessed: tuple[str, ...]
    doubts: tuple[str, ...]


@dataclass(slots=True)
class _Found:
    """One attention of the block: its module, its order of tokens, its calls, and the text that it reads."""

    path: str
    order: Order
    calls: list[int]
    text: Where | None


_NAMES = {"attn": "attn1", "attention": "attn1", "ff": "ffn", "mlp": "ffn", "feed_forward": "ffn"}
"""Parts of the names of modules, where what a module does cannot be seen."""


class Dissection(Tokens):
    """A block taken apart.

    Parameters
    ----------
    prompt_tokens : length of the prompt that the denoiser is given. The others are those of ``Tokens``.
    """

    def __init__(
        self,
        block: nn.Module,
        given: tuple[Sequence[Any], Mapping[str, Any]],
        *,
        video: Where,
        texts: Sequence[Where],
        prompt_tokens: int,
    ) -> None:
        super().__init__(block, given, video=video, texts=texts)
        self.prompt_tokens = prompt_tokens
        self.guessed: list[str] = []

    def anatomy(self) -> Anatomy:
        """Find the components."""
        attentions = self._attentions()
        self.text = next((a.text for a in attentions.values() if a.text), None)
        found: dict[str, Tap] = {}
        attention: dict[Component, Attention] = {}
        heads = 0
        for component, one in attentions.items():
            heads = self._attention(component, one, found, attention, heads)
        self._mixers(found)
        self._feed_forwards(found, [a.path for a in attentions.values()])
        for key, stream, where in (("residual", "video", self.video), ("residual.text", "text", self.text)):
            tap = self.holds("", stream) if where else None  # type: ignore[arg-type]
            if tap and tap.part == "all" and self._output("", tap.index).shape == self.shapes[where]:  # type: ignore[index]
                found[key] = tap
        return Anatomy(
            taps=dict(sorted(found.items(), key=self._when)),
            attention=attention,
            text_input=self.text if "residual.text" in found else None,
            heads=heads,
            guessed=tuple(self.guessed),
            doubts=tuple(self.doubts),
        )

    def _attentions(self) -> dict[Component, _Found]:
        """Return the attentions with video queries, by component."""
        at: dict[str, list[tuple[int, Order, Where | None]]] = {}
        for call, attended in enumerate(self.still.attended):
            if all(not m.attention(call, "query") for m in self.moves):
                continue
            order, text = self._order(call)
            if order is None:
                self.doubts.append(
                    f"{attended.path} lets video read other tokens than video and text in a known order: no component"
                )
                continue
            at.setdefault(self._module_of(attended.path), []).append((call, order, text))
        found: dict[Component, list[_Found]] = {}
        for path, calls in at.items():
            if not path or len({(order, text) for _, order, text in calls}) > 1:
                self.doubts.append("an attention is not a module of its own, or reads different tokens by turns")
                continue
            (_, order, text), component = calls[0], "attn2" if calls[0][1] == "cross" else "attn1"
            found.setdefault(component, []).append(_Found(path, order, [c for c, _, _ in calls], text))  # type: ignore[arg-type]
        for component, several in found.items():
            if len(several) > 1:
                paths = ", ".join(a.path for a in several)
                self.doubts.append(f"{paths} would all be {component}, so none of them is")
        return {component: several[0] for component, several in found.items() if len(several) == 1}

    def _order(self, call: int) -> tuple[Order | None, Where | None]:
        """Return what the video queries of an attention call read, by what moves in its keys."""
        tokens, keys = (x.shape[2] for x in (self.still.attended[call].query, self.still.attended[call].key))
        queries = [(m.token, m.attention(call, "query"), m.attention(call, "key")) for m in self.moves]
        readers = [w for w in self.lengths if any(m.attention(call, "key") for m in self._moves[w])]
        if len(readers) > 1:
            return None, None
        text = readers[0] if readers else None
        offset = tokens - self.video_tokens
        if all(q == {j} for j, q, _ in queries) and offset == 0:
            if text and all(not k for _, _, k in queries):
                asks = any(m.attention(call, "query") for m in self._moves[text])
                return (None, None) if asks else ("cross", text)
            alone = not text and keys == tokens and all(k == q for _, q, k in queries)
            return ("video", None) if alone else (None, None)
        # More than video and text would be tokens of a third kind, such as registers.
        if not text or keys != tokens or not 0 < offset <= self.lengths[text] or any(k != q for _, q, k in queries):
            return None, None
        first = self._moves[text][0]
        start = first.attention(call, "key")
        if start != first.attention(call, "query"):
            return None, None
        if all(q == {j} for j, q, _ in queries) and start == {self.video_tokens}:
            return "video_text", text
        if all(q == {j + offset} for j, q, _ in queries) and start == {0}:
            return "text_video", text
        return None, None

    def _module_of(self, path: str) -> str:
        """Return the innermost module around an attention call that gives video tokens, or nothing."""
        while path and not self._gives_video(path):
            path = path.rpartition(".")[0]
        return path

    def _gives_video(self, path: str) -> bool:
        # Joint attention needs the text stream to be known, which any candidate may turn out to be.
        kept = self.text
        for text in (*self.lengths, None):
            self.text = text
            if found := self.holds(path, "video"):
                break
        self.text = kept
        return found is not None

    def _attention(
        self,
        component: Component,
        one: _Found,
        found: dict[str, Tap],
        attention: dict[Component, Attention],
        heads: int,
    ) -> int:
        """Add an attention, its heads and its edges, and return the number of heads."""
        video, text = self.holds(one.path, "video"), self.holds(one.path, "text")
        assert video is not None
        found[component] = video
        if text:
            found[f"{component}.text"] = text
        results = [self.plain.attended[c] for c in one.calls]
        batch = self.shapes[self.video][0]
        fitting = [r for r in results if one.order != "cross" or r.key.shape[2] == self.prompt_tokens]
        one_by_one = all(r.query.shape[0] == 1 for r in fitting) and len(fitting) == batch
        if len(fitting) == 1 or one_by_one:
            attention[component] = Attention(path=one.path, order=one.order)
        else:
            lengths = sorted({r.key.shape[2] for r in results})
            self.doubts.append(
                f"edges of {one.path} cannot be cut: it reads {lengths} keys in {len(results)} calls, and the prompt "
                f"has {self.prompt_tokens} tokens"
            )
        count = results[0].result.shape[1]
        tap = self._heads(one, results, batch)
        if tap is None or (heads and heads != count):
            self.doubts.append(f"heads of {one.path} are left out: {count} heads, no module is given them side by side")
            return heads
        found[f"{component}.heads"] = tap
        return count

    def _heads(self, one: _Found, results: list[Attended], batch: int) -> Tap | None:
        """Return where the video tokens' heads lie side by side: where a tensor equals what the attention gave."""
        start = results[0].query.shape[2] - self.video_tokens if one.order == "text_video" else 0
        video = [r.result[:, :, start : start + self.video_tokens].transpose(1, 2).flatten(2) for r in results]
        split = len(video) == batch and all(len(v) == 1 for v in video)
        expected = torch.cat(video) if split else torch.stack(video).sum(0)
        inside = [p for p in self.still.visits if below(p, [one.path])]
        taps = [tap for p in inside for end in ("input", "output") if (tap := self.holds(p, "video", end))]  # type: ignore[arg-type]
        return next((tap for tap in taps if _equal(self._tokens(tap), expected)), None)

    def _tokens(self, tap: Tap) -> torch.Tensor:
        """Return the video tokens of a tap when the block is computed as it is."""
        value = self.plain.visits[tap.path].entered if tap.end == "input" else self._output(tap.path, tap.index)
        assert value is not None
        n = self.video_tokens
        return {"all": value, "first": value[:, :n], "last": value[:, -n:]}[tap.part]

    def _output(self, path: str, index: int | None) -> Any:
        left = self.plain.visits[path].left
        return left if index is None else left[index]

    def _mixers(self, found: dict[str, Tap]) -> None:
        """Name the modules that exchange tokens without softmax attention; what they are follows from their names."""
        for path in self.mixing:
            name = path.rpartition(".")[2].lower()
            component = next((c for part, c in _NAMES.items() if part in name), None)
            output, whole = self.plain.visits[path].left, self.holds(path, "video", "input")
            count = output.flatten(1, -2).shape[1] if isinstance(output, torch.Tensor) and output.ndim > 2 else 0
            if component and component not in found and whole and whole.part == "all" and count == self.video_tokens:
                found[component] = Tap(path=path)
                self.guessed.append(component)
                self.doubts.append(
                    f"{path} exchanges tokens without softmax attention. It is taken for {component} by its name, its "
                    "output for tokens in the order of its input; its edges cannot be cut and it has no heads"
                )
            else:
                self.doubts.append(f"{path} exchanges tokens in a way that is not known; it is no component")

    def _feed_forwards(self, found: dict[str, Tap], attentions: Sequence[str]) -> None:
        """Add the outermost modules with two layers or more on tokens and no attention, one for each stream."""
        for stream, key in (("video", "ffn"), ("text", "ffn.text")):
            moves = self.moves if stream == "video" else self.text_moves
            layers = [
                path
                for path, module in self.block.named_modules()
                if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
                and path in self.still.visits
                and any(m.entering(path) for m in moves)
            ]
            busy = [*attentions, *(a.path for a in self.still.attended), *self.mixing]
            candidates = [
                path
                for path in self.still.visits
                if path
                and sum(layer.startswith(f"{path}.") for layer in layers) >= 2
                and not any(_nested(path, other) for other in busy)
                and self.holds(path, stream)  # type: ignore[arg-type]
            ]
            outermost = [p for p in candidates if not below(p, [q for q in candidates if q != p])]
            if key in found:
                continue
            if len(outermost) == 1:
                tap = self.holds(outermost[0], stream)  # type: ignore[arg-type]
                assert tap is not None
                found[key] = tap
            elif outermost or stream == "video":
                several = f"{', '.join(outermost)} could all be it" if outermost else "no module is one by itself"
                self.doubts.append(f"there is no {key}: {several}")

    def _when(self, item: tuple[str, Tap]) -> tuple[bool, int, bool]:
        key, tap = item
        visit = self.plain.visits[tap.path]
        return key.startswith("residual"), visit.began if tap.end == "input" else visit.ended, "heads" not in key


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def _nested(path: str, other: str) -> bool:
    return below(path, [other]) or below(other, [path])
