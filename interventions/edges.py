"""Attention edges between latent frames as data: which are removed, who still reads what, where the tokens sit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Pattern = Literal["causal", "anti_causal", "local", "from_frames", "to_frames", "between", "text"]
Order = Literal["video", "video_text", "text_video", "cross"]
Span = tuple[int, int]
"""First token and the one after the last."""


@dataclass(frozen=True, slots=True)
class Edges:
    """Which attention edges are removed, over latent frames.

    Attributes
    ----------
    pattern : "causal" leaves keys of the query's own and earlier frames, "anti_causal" of its own and later ones,
        "local" of frames at most ``window`` away. "from_frames": no other frame reads ``frames``, each still reads
        itself; "to_frames": each of ``frames`` reads only itself; "between": ``queries`` do not read ``frames``, not
        even where the two overlap; "text": no video token reads text. All but "text" leave text keys in place.
    window : frames on either side, for "local"; 0 leaves the own frame.
    frames : frame indices, for "from_frames", "to_frames" and "between".
    queries : frame indices, for "between".
    heads : heads that lose the edges; None for every head.

    Raises
    ------
    ValueError
        If the pattern is unknown, lacks what it needs, or is given frames it would ignore.
    """

    pattern: Pattern
    window: int = 1
    frames: tuple[int, ...] = ()
    queries: tuple[int, ...] = ()
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.pattern not in get_args(Pattern):
            raise ValueError(f"unknown pattern {self.pattern!r}: use one of {', '.join(get_args(Pattern))}")
        if self.window < 0:
            raise ValueError(f"window={self.window} of a {self.pattern!r} knock-out is negative: use 0 or more frames")
        needed = {
            "frames": self.pattern in ("from_frames", "to_frames", "between"),
            "queries": self.pattern == "between",
        }
        for name, wanted in needed.items():
            given = getattr(self, name)
            if bool(given) != wanted:
                verb = "needs" if wanted else "does not use"
                raise ValueError(f"pattern {self.pattern!r} {verb} {name}, which is {given!r}")
        if self.heads is not None and not self.heads:
            raise ValueError("heads=() would remove no edge: name heads, or give None for every head")
        for name in ("frames", "queries", "heads"):
            if any(i < 0 for i in getattr(self, name) or ()):
                raise ValueError(f"{name}={getattr(self, name)!r} has a negative index: count from 0")

    @property
    def keeps_text(self) -> bool:
        """Whether video queries still read text keys."""
        return self.pattern != "text"

    def allowed(self, frames: int) -> torch.Tensor:
        """Return which key frames each query frame may still read: bool (frames, frames), [query, key].

        Raises
        ------
        ValueError
            If a frame index is not below ``frames``.
        """
        for name in ("frames", "queries"):
            if any(i >= frames for i in getattr(self, name)):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} of {self.pattern!r}: there are {frames} latent frames"
                )
        index = torch.arange(frames, device="cpu")
        query, key = index[:, None], index[None, :]
        hit_keys = torch.isin(key, torch.tensor(self.frames, dtype=torch.long, device="cpu"))
        hit_queries = torch.isin(query, torch.tensor(self.queries or self.frames, dtype=torch.long, device="cpu"))
        match self.pattern:
            case "causal":
                return key <= query
            case "anti_causal":
                return key >= query
            case "local":
                return (query - key).abs() <= self.window
            case "from_frames":
                return ~hit_keys | (query == key)
            case "to_frames":
                return ~hit_queries | (query == key)
            case "between":
                return ~(hit_queries & hit_keys)
            case "text":
                return torch.ones(frames, frames, dtype=torch.bool, device="cpu")


@dataclass(frozen=True, slots=True)
class Reads:
    """What a set of heads still reads: for every query frame its key frames, and whether video reads text."""

    heads: tuple[int, ...]
    frames: tuple[tuple[int, ...], ...]
    text: bool

    def groups(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return (query frames, key frames) pairs, query frames with equal key sets together."""
        found: dict[tuple[int, ...], list[int]] = {}
        for query, keys in enumerate(self.frames):
            found.setdefault(keys, []).append(query)
        return [(tuple(queries), keys) for keys, queries in found.items()]


def union(edges: Sequence[Edges], frames: int, heads: int) -> list[Reads]:
    """Remove all edges that any of ``edges`` removes; heads that end up equal share one entry, every head is in one.

    Raises
    ------
    ValueError
        If a head or frame index is out of range.
    """
    for edge in edges:
        if edge.heads is not None and max(edge.heads) >= heads:
            raise ValueError(f"heads={edge.heads!r} of {edge.pattern!r}: this attention has {heads} heads")
    allowed = [edge.allowed(frames) for edge in edges]
    members: dict[tuple[int, ...], list[int]] = {}
    for head in range(heads):
        acting = tuple(i for i, edge in enumerate(edges) if edge.heads is None or head in edge.heads)
        members.setdefault(acting, []).append(head)
    found = []
    for acting, group in members.items():
        left = torch.ones(frames, frames, dtype=torch.bool, device="cpu")
        for i in acting:
            left &= allowed[i]
        keys = tuple(tuple(k for k, kept in enumerate(row) if kept) for row in left.tolist())
        found.append(Reads(tuple(group), keys, all(edges[i].keeps_text for i in acting)))
    return found


@dataclass(frozen=True, slots=True)
class Layout:
    """Where tokens sit in one attention call; video tokens are frame-major.

    Attributes
    ----------
    frames : latent frames.
    tokens_per_frame : video tokens of one latent frame.
    order : "video" is self-attention over video alone; "video_text" and "text_video" are joint attention; "cross" has
        video queries and text keys.
    rows_fold : batch entries that belong to one row, next to each other. Temporal attention that folds space into the
        batch (Latte) has height * width of them, with one token per frame each.
    text_tokens : number of text tokens if known; calls with another number do not fit (image keys beside text keys).
    """

    frames: int
    tokens_per_frame: int
    order: Order = "video"
    rows_fold: int = 1
    text_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(f"unknown order {self.order!r}: use one of {', '.join(get_args(Order))}")
        if min(self.frames, self.tokens_per_frame, self.rows_fold) < 1:
            raise ValueError(f"frames, tokens_per_frame and rows_fold must be at least 1: {self}")

    def fits(self, queries: int, keys: int) -> bool:
        """Tell whether a call with this many query and key tokens can have this layout."""
        video = self.frames * self.tokens_per_frame
        if self.order == "video":
            return queries == keys == video
        text = keys if self.order == "cross" else keys - video
        shape = queries == (video if self.order == "cross" else keys)
        return shape and text >= 0 and self.text_tokens in (None, text)

    def blocks(self, reads: Reads, keys: int) -> Iterator[tuple[list[Span], list[Span]]]:
        """Yield the token spans (queries, keys) of every group of a call with ``keys`` key tokens.

        Text queries of joint attention are a group of their own that reads everything.
        """
        video = self.frames * self.tokens_per_frame
        at = keys - video if self.order == "text_video" else 0
        text = {"video": (0, 0), "video_text": (video, keys), "text_video": (0, at), "cross": (0, keys)}[self.order]
        for query_frames, key_frames in reads.groups():
            pieces = [] if self.order == "cross" else self._spans(key_frames, at)
            yield _merged(self._spans(query_frames, at)), _merged([*pieces, *([text] if reads.text else [])])
        if self.order in ("video_text", "text_video") and text[0] < text[1]:
            yield [text], [(0, keys)]

    def _spans(self, frames: Sequence[int], at: int) -> list[Span]:
        size = self.tokens_per_frame
        return [(at + f * size, at + (f + 1) * size) for f in frames]


def _merged(spans: Sequence[Span]) -> list[Span]:
    """Sort spans, drop empty ones and join those that touch."""
    found: list[Span] = []
    for start, stop in sorted(s for s in spans if s[0] < s[1]):
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return found
