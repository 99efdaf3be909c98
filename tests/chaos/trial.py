"""One trial: drivers start, are struck, the store is damaged, verified and resumed, and the result is judged."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from pipeline.plan import Plan
from tests.chaos import check, forks
from tests.chaos.damage import JOURNAL, apply
from tests.chaos.draw import BIRTH, DEPOSE, FREEZE, KILL, MODEL, NODE, RAY, REPLICA, TERM, Round, Strike, Trial
from tests.chaos.nodes import Nodes
from tests.chaos.tally import Tally
from tests.synthetic import Script

_TICK_S = 0.002
_PATIENCE_S = 180.0
"""After this a driver counts as hung, and the trial as broken."""
_TRIES = 8
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Runner:
    """Runs one trial in a folder of its own.

    Parameters
    ----------
    reference : store of the undisturbed run. nodes : the cluster, for trials on Ray. say : told what happens.
    """

    def __init__(
        self,
        trial: Trial,
        folder: Path,
        config: Path,
        plan: Plan,
        reference: Path,
        nodes: Nodes | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.trial, self.folder, self.plan, self.reference = trial, folder, plan, reference
        self.nodes, self.say, self.tally = nodes, say, Tally(trials=1)
        self.store, self.log = folder / "run.zarr", folder / "drivers.log"
        folder.mkdir(parents=True)
        script = Script(folder=folder / "script", faults=trial.faults, unit_s=trial.unit_s)
        self.driver = forks.Driver(
            config=config,
            store=self.store,
            script=None if trial.kind == MODEL else script,
            ray=nodes.address if trial.kind == RAY and nodes is not None else None,
        )
        self._frozen: list[int] = []

    def run(self) -> Tally:
        """Run the trial and return what it came to."""
        try:
            for number, round_ in enumerate(self.trial.rounds):
                self.say(f"round {number + 1}")
                self._play(round_)
            self._finish()
            self._judge()
        finally:
            for process in self._frozen:
                _signal(process, signal.SIGKILL)
        return self.tally

    def _play(self, round_: Round) -> None:
        process = self._start()
        code = self._watch(process, list(round_.strikes))
        if code is None:
            self._succeed(process, late=round_)
            return
        self._expect(code, "driver", allowed=(DONE, FAILED, BAD_INPUT, INTERRUPTED, -signal.SIGKILL))
        self._damage(round_)

    def _start(self, **changes: Any) -> int:
        self.tally.drivers += 1
        return forks.fork(replace(self.driver, **changes).run, self.log)

    def _watch(self, process: int, strikes: list[Strike]) -> int | None:
        """Strike a driver as its journal grows; returns its exit code, None for one that is left frozen."""
        begun, deadline = self._lines(), time.monotonic() + _PATIENCE_S
        while (code := forks.poll(process)) is None:
            if strikes and self._is_due(strikes[0], begun):
                strike = strikes.pop(0)
                if self._strike(strike, process):
                    self.tally.kills[strike.what] += 1
                    self.say(f"{strike.what} at line {self._lines()}")
                if strike.what == DEPOSE:
                    return None
            if time.monotonic() > deadline:
                _signal(process, signal.SIGKILL)
                self.tally.broken.append("a driver did not end")
                return forks.wait(process)
            time.sleep(_TICK_S)
        return code

    def _is_due(self, strike: Strike, begun: int) -> bool:
        if strike.lines == BIRTH:
            return next(self.folder.glob("run.zarr*"), None) is not None
        return self._lines() - begun >= strike.lines

    def _strike(self, strike: Strike, process: int) -> bool:
        """Do it; returns False if there was nothing to hit."""
        match strike.what:
            case what if what in (KILL, TERM):
                _signal(process, signal.SIGKILL if what == KILL else signal.SIGTERM)
            case what if what == REPLICA:
                living = self._replicas()
                if living:
                    _signal(Random(strike.seed).choice(living), signal.SIGKILL)
                return bool(living)
            case what if what == NODE:
                assert self.nodes is not None
                self.nodes.replace(strike.seed)
            case what if what == FREEZE:
                _signal(process, signal.SIGSTOP)
                self._expect(forks.wait(self._start()), "driver beside a frozen one", allowed=(BAD_INPUT,))
                self.tally.refused += 1
                _signal(process, signal.SIGCONT)
            case what if what == DEPOSE:
                _signal(process, signal.SIGSTOP)
                self._frozen.append(process)
        return True

    def _succeed(self, deposed: int, late: Round) -> None:
        """Let a driver on another machine take over from a frozen one, which wakes up later."""
        code = self._watch(self._start(host="elsewhere"), [])
        self._expect(code, "driver that takes over", allowed=(DONE, FAILED, BAD_INPUT, -signal.SIGKILL))
        if late.thawed_late:
            # Its replicas go on writing while it sleeps, if they are other processes.
            self._damage(late, orphans=False)
        _signal(deposed, signal.SIGCONT)
        self._frozen.remove(deposed)
        code = self._watch(deposed, [])
        self._expect(code, "deposed driver", allowed=(DONE, BAD_INPUT, -signal.SIGKILL))
        self.tally.taken_over += code == BAD_INPUT
        if not late.thawed_late:
            self._damage(late)

    def _damage(self, round_: Round, *, orphans: bool = True) -> None:
        """Damage the store once nobody writes to it any more, and verify it if the round says so."""
        if orphans:
            self._settle()
        for damage in round_.damage if self.store.exists() else ():
            path = apply(damage, self.store)
            if path is not None:
                self.tally.damage[str(damage)] += 1
                self.say(f"{damage}: {path.relative_to(self.store)}")
        if round_.verified and self.store.exists():
            self._verify()

    def _settle(self) -> None:
        """Wait until the replicas of dead drivers are gone: what they still write would be right, but late."""
        deadline = time.monotonic() + _PATIENCE_S
        while self._replicas():
            if time.monotonic() > deadline:
                self.tally.broken.append(f"replicas outlive their driver: {self._replicas()}")
                return
            time.sleep(_TICK_S)

    def _verify(self) -> bool:
        """Run ``stepscope verify`` and compare what it finds with what is there; returns whether all is good."""
        known = self._ask(check.judge)
        out = self.folder / "verify.json"
        code = forks.wait(forks.fork(functools.partial(forks.verify, self.store, out), self.log))
        self.tally.verifications += 1
        self._expect(code, "verify", allowed=(DONE, FAILED))
        if code not in (DONE, FAILED):
            return False
        found = json.loads(out.read_text())
        self.say(f"verify: {json.dumps({k: v for k, v in found.items() if v})}")
        self._compare(known, found)
        return code == DONE

    def _compare(self, known: dict[str, list[Any]], found: dict[str, Any]) -> None:
        units = {tuple(unit) for unit in known["units"]}
        undone = {(unit["group"], unit["index"]) for unit in found["bad"]}
        unchecked = set(found["unchecked"])
        named = [*found["template"], *found["rebuilt"]]
        strays = {path: any(_is_about(text, path) for text in named) for path in known["strays"]}
        missed = [u for u in units - undone if u[0] not in unchecked]
        missed += [(path,) for path, told in strays.items() if not told and path.split("/")[0] not in unchecked]
        self.tally.damaged += len(units) + len(strays)
        self.tally.found += len(units & undone) + sum(strays.values())
        self.tally.missed += len(missed)
        if missed:
            self.say(f"MISSED {missed}")
        wrong = self._ask(lambda *given: sorted(map(list, check.differing_units(*given)))) if undone - units else []
        self.tally.false_alarms += len(undone - {tuple(unit) for unit in wrong} - units)

    def _finish(self) -> None:
        """Run the same command, undisturbed, until it and a verification have nothing left to do."""
        for _ in range(_TRIES):
            self._settle()
            code = self._watch(self._start(), [])
            self._expect(code, "undisturbed driver", allowed=(DONE, FAILED, BAD_INPUT, -signal.SIGKILL))
            # A driver that only fails for what a verification repairs says so with exit code 2.
            if code in (DONE, BAD_INPUT) and self._verify() and code == DONE:
                return
        self.tally.broken.append(f"not finished after {_TRIES} undisturbed drivers")

    def _judge(self) -> None:
        verdict = self._ask(check.verdict)
        self.tally.lost, self.tally.wrong = len(verdict["lost"]), len(verdict["wrong"])
        if verdict["lost"] or verdict["wrong"]:
            self.say(f"LOST {verdict['lost']} WRONG {verdict['wrong']}")
        self.tally.recomputed = max(0, self._ends() - len(self.plan.layout))
        attempts = {int(path.name): path.stat().st_size for path in (self.folder / "script" / "attempts").glob("*")}
        self.tally.faults.update(
            what for (unit, attempt), what in self.trial.faults.items() if attempts.get(unit, 0) >= attempt
        )

    def _ask(self, question: Callable[[Path, Path, Plan], Any]) -> Any:
        return forks.call(lambda: question(self.store, self.reference, self.plan), self.folder)

    def _expect(self, code: int | None, who: str, allowed: tuple[int, ...]) -> None:
        self.say(f"{who}: exit code {code}")
        if code not in allowed:
            self.tally.broken.append(f"{who} ended with {code}")
            self.say(self.log.read_text()[-4000:] if self.log.exists() else "no log")

    def _lines(self) -> int:
        try:
            return (self.store / JOURNAL).read_bytes().count(b"\n")
        except OSError:
            return 0

    def _ends(self) -> int:
        """Count the units that ran to their end, as far as the journal still knows."""
        try:
            return sum(b'"cells"' in line for line in (self.store / JOURNAL).read_bytes().splitlines())
        except OSError:
            return 0

    def _replicas(self) -> list[int]:
        """Return the living processes that hold a replica, other than drivers."""
        folder = self.folder / "script" / "replicas"
        if self.driver.ray is None or not folder.exists():
            return []
        return sorted(pid for pid in (int(path.name) for path in folder.iterdir()) if _is_replica(pid))


def _is_about(text: str, path: str) -> bool:
    """Whether a finding names an array, or the selection that it belongs to, or the metadata above it."""
    subject = text.split(" ")[0].removesuffix("/zarr.json")
    group = path.rpartition("/")[0]
    return subject in (path, group) or (subject == f"{group}/exact" and path == f"{group}/drawn")


def _is_replica(process: int) -> bool:
    """Whether a number still is that of a replica's process, and not of a later one."""
    with suppress(OSError):
        stat = Path(f"/proc/{process}/stat").read_text()
        ended = stat.rpartition(")")[2].split()[0] in "ZX"
        return not ended and b"ray::" in Path(f"/proc/{process}/cmdline").read_bytes()
    return False


def _signal(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)
