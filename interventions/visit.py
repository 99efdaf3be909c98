"""A visit to the blocks of one denoiser call: activations read or edited, attention cut, computation replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from interventions.attention import AttentionTap, Edges, Layout
from interventions.families.family import BlockAddress, Tap
from interventions.joining import Joining
from interventions.run import BlockWork, Run
from interventions.sites import ALL_HEADS, AttentionAt, Branch, Component, Site, Stream
from interventions.streams import argument, read_tap, to_rows, with_argument, write_tap


class BlockVisitor:
    """Work through the blocks of one denoiser call, strictly in the order in which the model reaches them.

    Parameters
    ----------
    denoiser : the nnsight envoy of the denoiser that is being called. addresses : its blocks.
    run : the run and its plan. step, call : where in the run.
    attention : the tap that cuts attention edges, already entered if the run has any to cut.
    text_tokens : length of the prompt that the denoiser is given, None if it is given none.
    joins : which rows each of the first blocks computes, None if all compute all of them.
    """

    def __init__(
        self,
        denoiser: Any,
        addresses: Sequence[BlockAddress],
        run: Run,
        step: int,
        call: int,
        attention: AttentionTap,
        text_tokens: int | None,
        joins: Joining | None = None,
    ) -> None:
        self.denoiser, self.run, self.step, self.call, self.attention = denoiser, run, step, call, attention
        self.text_tokens, self.joins = text_tokens, joins
        self.addresses = addresses
        self.branches: tuple[Branch, ...] = run.geometry.calls[call]

    def visit(self, block: int, work: BlockWork) -> None:
        """Do everything that is planned for one block."""
        address = self.addresses[block]
        envoy = self.denoiser.get(address.path)
        joined = self.joins is not None and block < len(self.joins.active)
        entering = envoy.inputs if work.needs_inputs or joined else None
        if self.joins is not None and joined:
            entering = self.joins.enter(block, address, entering)
            envoy.inputs = entering
        if not work.needs_inputs:
            entering = None
        for key in address.blocks.taps:
            component, _, detail = key.partition(".")
            if component == "residual":
                continue
            # Heads come before what their attention gives, and the cut before both.
            first = detail == "heads" or f"{component}.heads" not in address.blocks.taps
            cut = work.cuts.get(component) if first and detail != "text" else None  # type: ignore[call-overload]
            if cut:
                self._arm(envoy, address, component, cut)  # type: ignore[arg-type]
            if sites := work.sites.get(key):
                self._sites(envoy, address, key, sites, None)
            if component in work.cuts and detail == "":
                self._disarm(envoy, address, component)  # type: ignore[arg-type]
        if work.programs:
            self._programs(envoy, address, work, entering)
        for key in ("residual", "residual.text"):
            if sites := work.sites.get(key):
                self._sites(envoy, address, key, sites, entering)

    def _sites(self, envoy: Any, address: BlockAddress, key: str, sites: list[Site], entering: Any) -> None:
        """Read or edit the sites of one tap; ``entering`` are the block's arguments where an update is meant."""
        run, blocks, geometry = self.run, address.blocks, self.run.geometry
        tap, stream = blocks.taps[key], sites[0].stream
        where = envoy.get(tap.path) if tap.path else envoy
        raw = where.output if tap.end == "output" else where.input
        value = read_tap(raw, tap, blocks, stream, geometry)
        before = self._entering(address, stream, entering) if entering is not None else None
        if run.gradient is not None:
            for site in sites:
                run.gradient.values[site] = self._of(site, value, before).detach()
            leaf = torch.zeros_like(value, requires_grad=True)
            run.gradient.leaves[self.call, sites[0].block, key] = leaf
            self._put(where, tap, write_tap(raw, value + leaf, tap, blocks, stream, geometry))
            return
        if run.captured is not None:
            for site in sites:
                run.captured[site] = self._of(site, value, before).clone()
            return
        new = value.clone()
        for site in sites:
            for row in run.edits[site]:
                self._edit(site, row, new, before)
        self._put(where, tap, write_tap(raw, new, tap, blocks, stream, geometry))

    def _edit(self, site: Site, row: int, new: torch.Tensor, before: torch.Tensor | None) -> None:
        at = self._row_of(site, row)
        if site.head != ALL_HEADS:
            heads = new[at].unflatten(-1, (self.run.geometry.heads, -1))
            heads[:, site.head] = self.run.edit(site, row, heads[:, site.head].clone())
        elif site.component == "update":
            assert before is not None
            old = new[at] - before[at]
            # The difference form keeps an unchanged update an exact identity.
            new[at] = new[at] + (self.run.edit(site, row, old) - old)
        else:
            new[at] = self.run.edit(site, row, new[at].clone())

    def _row_of(self, site: Site, row: int) -> int:
        if self.joins is None:
            return self.run.row_of(site.branch, row)
        return self.joins.place(site.block, self.branches.index(site.branch), row)

    def _of(self, site: Site, value: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """Return what a site holds, one entry a row of the run."""
        if site.component == "update":
            assert before is not None
            return self.run.at(site, value) - self.run.at(site, before)
        return self.run.at(site, value)

    def _entering(self, address: BlockAddress, stream: Stream, inputs: Any) -> torch.Tensor:
        blocks = address.blocks
        where = blocks.video_input if stream == "video" else blocks.text_input
        args, kwargs = inputs
        return to_rows(argument(args, kwargs, where), blocks.layout, self.run.geometry)

    @staticmethod
    def _put(where: Any, tap: Tap, new: Any) -> None:
        if tap.end == "output":
            where.output = new
        else:
            where.input = new

    def _arm(self, envoy: Any, address: BlockAddress, component: Component, points: list[AttentionAt]) -> None:
        plan: dict[int, list[Edges]] = {}
        for point in points:
            for row in self.run.edits[point]:
                at = self.run.row_of(point.branch, row)
                plan.setdefault(at, []).extend(self.run.interventions[row].cut(point, self.run.geometry))
                self.run.fired += 1
        _ = envoy.get(address.blocks.attention[component].path).inputs
        self.attention.arm(plan, len(self.branches) * self.run.rows, self._layout(address, component))

    def _layout(self, address: BlockAddress, component: Component) -> Layout:
        geometry, blocks, order = self.run.geometry, address.blocks, address.blocks.attention[component].order
        frames, places = geometry.frames, geometry.tokens_per_frame
        # Batch entries that belong to one row, and the frames and places that one entry holds.
        fold, frames, places = {
            "rows": (1, frames, places),
            "frames": (frames, 1, places),
            "places": (places, frames, 1),
        }[blocks.layout]
        # Image-to-video attends to image and text keys in calls of their own; only the text's may be cut.
        text = self.text_tokens if order == "cross" else None
        return Layout(frames=frames, tokens_per_frame=places, order=order, rows_fold=fold, text_tokens=text)

    def _disarm(self, envoy: Any, address: BlockAddress, component: Component) -> None:
        _ = envoy.get(address.blocks.attention[component].path).output
        self.attention.disarm()

    def _programs(self, envoy: Any, address: BlockAddress, work: BlockWork, entering: Any) -> None:
        """Give some rows the result of other blocks than this one, run on the whole batch and picked row by row."""
        output = envoy.output
        chosen: dict[tuple[int, ...], list[int]] = {}
        for point in work.programs:
            for row in self.run.edits[point]:
                program = self.run.interventions[row].program(point)
                chosen.setdefault(program, []).append(self.run.row_of(point.branch, row))
                self.run.fired += 1
        new = output
        for program, rows in chosen.items():
            result = self._run_program(work.programs[0].block, program, output, entering, address)
            new = self._with_rows(new, result, rows, address)
        envoy.output = new

    def _run_program(
        self, block: int, program: tuple[int, ...], output: Any, entering: Any, address: BlockAddress
    ) -> Any:
        blocks, (args, kwargs) = address.blocks, entering
        ends = (("residual", blocks.video_input), ("residual.text", blocks.text_input))
        streams = [(blocks.taps[key], where) for key, where in ends if key in blocks.taps]
        streams += [(Tap(index=index), where) for index, where in blocks.beside.items()]
        if not program:
            for tap, where in streams:
                output = _replaced(output, tap, argument(args, kwargs, where))
            return output
        state = output if program[0] == block else self._other(program[0], args, kwargs)
        for other in program[1:]:
            for tap, where in streams:
                args, kwargs = with_argument(args, kwargs, where, _picked(state, tap))
            state = self._other(other, args, kwargs)
        return state

    def _other(self, block: int, args: Any, kwargs: Any) -> Any:
        # An envoy that is called runs its module aside from the trace: nothing is served and no visit is spent.
        return self.denoiser.get(self.addresses[block].path)(*args, **kwargs)

    def _with_rows(self, output: Any, result: Any, rows: list[int], address: BlockAddress) -> Any:
        blocks, geometry = address.blocks, self.run.geometry
        taps: list[tuple[Tap, Stream]] = [(Tap(index=index), "video") for index in blocks.beside]
        ends: tuple[tuple[str, Stream], ...] = (("residual", "video"), ("residual.text", "text"))
        taps += [(blocks.taps[key], stream) for key, stream in ends if key in blocks.taps]
        for tap, stream in taps:
            new = read_tap(output, tap, blocks, stream, geometry).clone()
            new[rows] = read_tap(result, tap, blocks, stream, geometry)[rows]
            output = write_tap(output, new, tap, blocks, stream, geometry)
        return output


def _picked(output: Any, tap: Tap) -> torch.Tensor:
    value: torch.Tensor = output if tap.index is None else output[tap.index]
    return value


def _replaced(output: Any, tap: Tap, value: torch.Tensor) -> Any:
    if tap.index is None:
        return value
    return tuple(value if i == tap.index else part for i, part in enumerate(output))
