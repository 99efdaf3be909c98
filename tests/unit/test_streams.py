"""Views of tensors: what is read is what is written back, in every layout."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from diffusers.utils import BaseOutput
from hypothesis import given
from hypothesis import strategies as st

from interventions.families.family import Blocks, Tap
from interventions.sites import Geometry
from interventions.streams import (
    argument,
    from_canonical,
    from_rows,
    gather,
    main_tensor,
    read_tap,
    to_canonical,
    to_rows,
    with_argument,
    with_main_tensor,
    write_tap,
)

GEOMETRY = Geometry(steps=1, blocks=1, frames=3, given_frames=0, height=2, width=5)
ROWS, CHANNELS, TEXT = 2, 4, 6
TOKENS = GEOMETRY.tokens


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def blocks(tap: Tap, layout: str = "rows") -> Blocks:
    return Blocks(path="b", taps={"residual": tap}, layout=layout)  # type: ignore[arg-type]


class TestRows:
    @pytest.mark.parametrize("layout", ["rows", "frames", "places"])
    def test_a_token_is_where_its_frame_and_place_say(self, layout):
        """Value (row, frame, place, channel) in each layout reads as row, frame-major token."""
        full = numbered(ROWS, GEOMETRY.frames, GEOMETRY.tokens_per_frame, CHANNELS)
        stored = {
            "rows": full.flatten(1, 2),
            "frames": full.flatten(0, 1),
            "places": full.transpose(1, 2).flatten(0, 1),
        }[layout]
        assert torch.equal(to_rows(stored, layout, GEOMETRY), full.flatten(1, 2))
        assert torch.equal(from_rows(full.flatten(1, 2), layout, GEOMETRY), stored)


class TestTaps:
    @pytest.mark.parametrize("index", [None, 0, 1])
    @pytest.mark.parametrize(("part", "stream"), [("all", "video"), ("first", "video"), ("last", "video"),
                                                  ("first", "text"), ("last", "text")])  # fmt: skip
    def test_what_is_written_is_read_and_the_rest_stays(self, index, part, stream):
        tap = Tap(index=index, part=part)
        length = TOKENS if part == "all" else TOKENS + TEXT
        value = numbered(ROWS, length, CHANNELS)
        raw = value if index is None else tuple(value if i == index else numbered(1) for i in range(2))
        old = read_tap(raw, tap, blocks(tap), stream, GEOMETRY)
        assert old.shape[1] == (TEXT if stream == "text" else TOKENS)
        new = write_tap(raw, old + 1000, tap, blocks(tap), stream, GEOMETRY)
        assert torch.equal(read_tap(new, tap, blocks(tap), stream, GEOMETRY), old + 1000)
        tensor = new if index is None else new[index]
        assert int((tensor != value).any(-1).sum()) == ROWS * old.shape[1]
        assert torch.equal(value, numbered(ROWS, length, CHANNELS)), "what the model holds is not written into"

    def test_first_and_last_parts_are_complements(self):
        value = numbered(ROWS, TOKENS + TEXT, CHANNELS)
        for video, text in (("first", "last"), ("last", "first")):
            one, other = Tap(part=video), Tap(part=text)
            parts = [
                read_tap(value, one, blocks(one), "video", GEOMETRY),
                read_tap(value, other, blocks(other), "text", GEOMETRY),
            ]
            joined = torch.cat(parts if video == "first" else parts[::-1], dim=1)
            assert torch.equal(joined, value)

    def test_the_rest_of_a_tuple_is_the_same_object(self):
        tap, other = Tap(index=0), object()
        new = write_tap((numbered(ROWS, TOKENS, CHANNELS), other), numbered(ROWS, TOKENS, CHANNELS), tap, blocks(tap),
                        "video", GEOMETRY)  # fmt: skip
        assert new[1] is other

    @pytest.mark.parametrize("layout", ["frames", "places"])
    def test_folded_layouts_are_written_back_folded(self, layout):
        tap = Tap()
        stored = from_rows(numbered(ROWS, TOKENS, CHANNELS), layout, GEOMETRY)
        same = write_tap(stored, to_rows(stored, layout, GEOMETRY), tap, blocks(tap, layout), "video", GEOMETRY)
        assert torch.equal(same, stored)


class TestLatents:
    @given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
    def test_every_layout_is_undone(self, channels, frames, height, width):
        canonical = numbered(2, channels, frames, height, width)
        for layout in ("CFHW", "FCHW", "FHWC", "packed"):
            stored = from_canonical(canonical, layout)
            assert torch.equal(to_canonical(stored, layout, (frames, height, width)), canonical)

    def test_packed_latents_are_frame_by_frame(self):
        stored = from_canonical(numbered(1, 2, 3, 2, 2), "packed")
        assert stored.shape == (1, 12, 2)
        assert stored[0, :4, 0].tolist() == [0, 1, 2, 3]
        assert stored[0, 4, 0] == 4


@dataclass
class Output(BaseOutput):
    sample: torch.Tensor
    extra: torch.Tensor | None = None


OUTPUTS = {
    "tensor": numbered(3, 2),
    "tuple": (numbered(3, 2), numbered(3, 1) + 50),
    "dataclass": Output(sample=numbered(3, 2)),
}


class TestOutputs:
    @pytest.mark.parametrize("kind", OUTPUTS)
    def test_rows_are_gathered_in_any_structure(self, kind):
        got = gather(OUTPUTS[kind], [2, 0, 2])
        assert type(got) is type(OUTPUTS[kind])
        assert torch.equal(main_tensor(got), numbered(3, 2)[[2, 0, 2]])
        if kind == "tuple":
            assert torch.equal(got[1], (numbered(3, 1) + 50)[[2, 0, 2]])

    @pytest.mark.parametrize("kind", OUTPUTS)
    def test_the_prediction_is_replaced_and_nothing_else(self, kind):
        new = with_main_tensor(OUTPUTS[kind], numbered(3, 2) + 7)
        assert type(new) is type(OUTPUTS[kind])
        assert torch.equal(main_tensor(new), numbered(3, 2) + 7)
        assert torch.equal(main_tensor(OUTPUTS[kind]), numbered(3, 2))
        if kind == "tuple":
            assert torch.equal(new[1], OUTPUTS[kind][1])

    def test_what_is_no_tensor_passes(self):
        assert gather((numbered(2, 2), None), [0])[1] is None

    def test_a_mapping_keeps_its_order(self):
        given_ = Output(sample=numbered(2, 1), extra=numbered(2, 2))
        assert list(OrderedDict(gather(given_, [1]))) == ["sample", "extra"]


class TestArguments:
    def test_by_name_before_position(self):
        assert argument((1, 2), {"x": 3}, (0, "x")) == 3
        assert argument((1, 2), {}, (1, "x")) == 2

    def test_replaced_where_it_was_found(self):
        assert with_argument((1, 2), {"x": 3}, (0, "x"), 9) == ((1, 2), {"x": 9})
        assert with_argument((1, 2), {"y": 3}, (1, "x"), 9) == ((1, 9), {"y": 3})
