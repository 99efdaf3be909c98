"""Where a block computed alone holds its tokens: one token is moved at a time, and what follows it is looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from interventions.families.family import Tap
from interventions.probing.forward import Forward, Moved, Where, forward
from interventions.probing.run import named
from interventions.sites import Stream


class Tokens:
    """The tokens of a block, computed alone on the arguments of one call of it.

    Parameters
    ----------
    video : its argument with the video tokens. texts : arguments that may carry text tokens.
    """

    def __init__(
        self,
        block: nn.Module,
        given: tuple[Sequence[Any], Mapping[str, Any]],
        *,
        video: Where,
        texts: Sequence[Where],
    ) -> None:
        self.block, self.given = block, given
        self.doubts: list[str] = []
        arguments = named(block, *given)
        self.video_tokens = arguments[video].shape[1]
        self.lengths = {where: arguments[where].shape[1] for where in texts}
        self.shapes = {where: arguments[where].shape for where in (video, *texts)}
        self.video, self.text = video, texts[0] if texts else None
        self.mixing: dict[str, None] = {}
        self.plain = forward(block, self.given, local=False)
        self._settle(texts)

    def holds(self, path: str, stream: Stream, end: Literal["output", "input"] = "output") -> Tap | None:
        """Return where a module's output, or first input, holds the tokens of a stream in their order."""
        visit = self.still.visits.get(path)
        if visit is None or visit.times > 1:
            return None
        if end == "input":
            part = self._part(visit.entered, stream, lambda m: m.entering(path))
            return Tap(path=path, end="input", part=part) if part else None
        left = visit.left
        for index in range(len(left)) if isinstance(left, (tuple, list)) else (None,):
            value = left if index is None else left[index]
            if part := self._part(value, stream, lambda m, index=index: m.leaving(path, index)):  # type: ignore[misc]
                return Tap(path=path, index=index, part=part)
        return None

    def _part(
        self, value: Any, stream: Stream, of: Callable[[Moved], frozenset[int] | None]
    ) -> Literal["all", "first", "last"] | None:
        if not isinstance(value, torch.Tensor) or value.ndim < 3:
            return None
        count = value.flatten(1, -2).shape[1]
        text = self.lengths[self.text] if self.text else 0
        own, other = (self.video_tokens, text) if stream == "video" else (text, self.video_tokens)
        moves, others = (self.moves, self.text_moves) if stream == "video" else (self.text_moves, self.moves)
        if not moves:
            return None
        if count == own:
            alone = all(of(m) == m.at(0) for m in moves) and not any(of(m) for m in others)
            return "all" if alone else None
        if count != own + other:
            return None
        if all(of(m) == m.at(0) for m in moves):
            return "first"
        return "last" if all(of(m) == m.at(other) for m in moves) else None

    @property
    def moves(self) -> list[Moved]:
        """Forwards with one video token moved."""
        return self._moves[self.video]

    @property
    def text_moves(self) -> list[Moved]:
        """Forwards with one text token moved, without tokens that no attention reads because a mask hides them."""
        moves = self._moves[self.text] if self.text else []
        calls = range(len(self.still.attended))
        return [m for m in moves if any(m.attention(call, "key") for call in calls)] or moves

    def _settle(self, texts: Sequence[Where]) -> None:
        """Move tokens; modules that exchange tokens outside of softmax attention are silenced, so that others show."""
        for _ in range(4):
            self.still = forward(self.block, self.given, local=True, silent=self.mixing)
            self._moves = {where: self._moving(where) for where in (self.video, *texts)}
            silent = tuple(self.mixing)
            mixers = [p for p in self.still.visits if p and not below(p, silent) and self._mixes(p)]
            if not mixers:
                return
            self.mixing |= dict.fromkeys(p for p in mixers if not below(p, [q for q in mixers if q != p]))
        self.doubts.append("its modules exchange tokens in ways that could not be taken apart")

    def _mixes(self, path: str) -> bool:
        return any(
            m.entering(path) == m.at(0) and (left := m.leaving(path, None)) is not None and len(left) > 1
            for m in self.moves
        )

    def _moving(self, where: Where) -> list[Moved]:
        count = self.shapes[where][1]
        return [
            Moved(token, self.still, self._moving_one(where, token)) for token in sorted({0, count // 2, count - 1})
        ]

    def _moving_one(self, where: Where, token: int) -> Forward:
        return forward(self.block, self.given, local=True, moving=(where, token), silent=self.mixing)


def below(path: str, others: Sequence[str]) -> bool:
    """Tell whether a module is one of some others, or inside one."""
    return any(path == other or path.startswith(f"{other}.") for other in others)
