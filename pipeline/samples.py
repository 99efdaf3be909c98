"""A sample: one generation problem with its contrast pair of runs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One problem and noise seed, run once with each prompt of a pair.

    Attributes
    ----------
    index : position along the store's ``sample`` dimension.
    prompt : identity of the problem, the experimental unit of every interval.
    seed : seed of the initial noise, equal for both runs.
    pair : clean and corrupted prompt as "clean/corrupted".
    clean_prompt, corrupted_prompt : the two prompts.
    parameters : what else the task needs to rebuild the problem.
    """

    index: int
    prompt: str
    seed: int
    pair: str
    clean_prompt: str
    corrupted_prompt: str
    parameters: dict[str, int | float | str] = field(default_factory=dict)
