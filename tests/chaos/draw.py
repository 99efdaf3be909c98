"""What happens in a trial, drawn from its seed before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from tests.chaos.damage import Damage
from tests.chaos.damage import draw as draw_damage
from tests.synthetic import FAULTS

INLINE, RAY, MODEL = "inline", "ray", "model"
KINDS = (INLINE, RAY, MODEL)
"""Synthetic units in the driver's process; on replicas over several nodes; the real tiny model in the driver's."""
SHARE = (25, 25, 10)

KILL, TERM, FREEZE, DEPOSE = "driver killed", "driver told to stop", "driver frozen", "driver deposed"
REPLICA, NODE = "replica killed", "node killed"
ENDING = (KILL, TERM, DEPOSE)
BIRTH = -1


@dataclass(frozen=True, slots=True)
class Strike:
    """What is done to a sweep while it runs.

    Attributes
    ----------
    lines : new lines of the journal after which it is done; ``BIRTH`` for the moment in which the store is created.
    seed : draws which replica or node it hits.
    """

    what: str
    lines: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One driver with what is done to it, and what happens to the store afterwards.

    Attributes
    ----------
    verified : whether the store is verified before the next driver; the last one always is.
    thawed_late : whether a deposed driver sleeps on until the damage is done.
    """

    strikes: tuple[Strike, ...]
    damage: tuple[Damage, ...]
    verified: bool
    thawed_late: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A trial.

    Attributes
    ----------
    faults : what happens to units at their attempts, counted over all processes.
    unit_s : seconds that a unit takes.
    """

    number: int
    kind: str
    rounds: tuple[Round, ...]
    faults: dict[tuple[int, int], str] = field(default_factory=dict)
    unit_s: float = 0.0


def kind_of(number: int, kinds: tuple[str, ...] = KINDS) -> str:
    """Return the kind of a trial: kinds take turns, in proportion to their shares."""
    shares = [SHARE[KINDS.index(kind)] for kind in kinds]
    turns = [(position / share, kind) for kind, share in zip(kinds, shares, strict=True) for position in range(share)]
    return sorted(turns, key=lambda turn: (turn[0], kinds.index(turn[1])))[number % len(turns)][1]


def draw(seed: int, number: int, kind: str, units: int) -> Trial:
    """Draw a trial of a sweep of that many units: a function of its arguments alone."""
    rng = Random(f"chaos {seed} {number} {kind}")
    swaps = rng.random() < 0.4
    rounds = tuple(_round(rng, kind, units, first=i == 0, swaps=swaps) for i in range(rng.choice((1, 2, 2, 3))))
    if kind == MODEL:
        return Trial(number=number, kind=kind, rounds=rounds)
    unit_s = rng.choice((0.02, 0.05)) if kind == RAY else rng.choice((0.0, 0.004, 0.01))
    return Trial(number=number, kind=kind, rounds=rounds, faults=_faults(rng, kind, units), unit_s=unit_s)


def _round(rng: Random, kind: str, units: int, *, first: bool, swaps: bool) -> Round:
    strikes = sorted(_strikes(rng, kind, units), key=lambda strike: strike.lines)
    ends = next((i for i, strike in enumerate(strikes) if strike.what in ENDING), len(strikes))
    if first and rng.random() < 0.15:
        strikes, ends = [Strike(KILL, BIRTH, 0)], 0
    damage = tuple(draw_damage(rng, swaps=swaps) for _ in range(rng.choice((0, 1, 2, 3, 5))))
    return Round(
        strikes=tuple(strikes[: ends + 1]),
        damage=damage,
        verified=rng.random() < 0.7,
        thawed_late=rng.random() < 0.5,
    )


def _strikes(rng: Random, kind: str, units: int) -> list[Strike]:
    whats = [KILL, KILL, KILL, TERM, FREEZE, DEPOSE]
    if kind == RAY:
        whats += [REPLICA] * 5 + [NODE] * 2
    longest = max(1, units * 2 // 3)
    return [
        Strike(rng.choice(whats), rng.randint(1, longest), rng.randrange(2**32)) for _ in range(rng.choice((1, 1, 2)))
    ]


def _faults(rng: Random, kind: str, units: int) -> dict[tuple[int, int], str]:
    # In the driver's own process nobody would end a unit that hangs.
    names = [name for name in FAULTS if kind == RAY or name != "hang"]
    faults = {}
    for unit in rng.sample(range(units), rng.choice((0, 1, 2, 3))):
        for attempt in range(1, rng.choice((2, 2, 3))):
            faults[unit, attempt] = rng.choice(names)
    return faults
