"""A thousand damaged configs: each is planned or refused in sentences, never with a traceback and never without end."""

from __future__ import annotations

import functools
import random

import pytest

from pipeline import plan
from pipeline.cli import BAD_INPUT, OK, main
from pipeline.config import LONGEST_TEXT, MOST_PROBLEMS
from pipeline.experiment import MOST_CELLS
from pipeline.models import ModelError, describe
from pipeline.plan import MOST_SAMPLES
from pipeline.wording import plain, shown
from pipeline.yaml_source import MOST_BYTES, MOST_VALUES
from tests.families import checkpoints
from tests.mutations import LAUGHS, MERGED, SHIPPED, mutant

MUTANTS, BATCH = 1000, 50
PATCH = next(path for path in SHIPPED if path.stem == "patch")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint in the place of those on the hub."""
    return checkpoints.save("wan", tmp_path_factory.mktemp("hub") / "wan")


@pytest.fixture(scope="module")
def describe_once(checkpoint):
    """Describe models, each once, as that hashes weights; a hub name means the tiny checkpoint, or nothing."""

    @functools.lru_cache
    def described(model_id, *, pickled_weights=False):
        if model_id.startswith("Wan-AI/"):
            return describe(str(checkpoint))
        if model_id.count("/") == 1 and not model_id.startswith((".", "/", "~")):
            raise ModelError(f"model {shown(model_id)} could not be fetched from the hub: there is no network.")
        return describe(model_id, pickled_weights=pickled_weights)

    return described


@pytest.fixture(autouse=True)
def models_on_disk_only(describe_once, monkeypatch):
    monkeypatch.setattr(plan, "describe", describe_once)


def planned(folder, capsys, content: bytes) -> tuple[int, str]:
    """Plan a config and return exit code and message, which must be one or more whole sentences of a known form."""
    file = folder / "c.yaml"
    file.write_bytes(content)
    code = main(["plan", str(file), "--no-calibrate"])
    captured = capsys.readouterr()
    said = captured.err
    assert code in (OK, BAD_INPUT)
    assert "Traceback" not in said
    if code == OK:
        assert said == ""
        assert "row forwards" in captured.out
        return code, said
    assert captured.out == ""
    assert said.startswith("stepscope: ")
    assert said.endswith("\n")
    said = said.removeprefix("stepscope: ")
    assert plain(said, lines=True) == said
    lines = said.splitlines()
    assert 1 <= len(lines) <= 10 * MOST_PROBLEMS
    in_example = False
    for line in lines:
        starts = line.startswith((f"{file}:", f"cannot read config {file}:"))
        # Only the example of a kind takes more lines than one.
        assert starts or in_example, line
        assert line.strip()
        assert len(line) <= LONGEST_TEXT + 400
        in_example = line.endswith("example:") if starts else in_example
    return code, said


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first", range(0, MUTANTS, BATCH))
def test_damage_is_planned_or_refused(first, tmp_path, capsys):
    codes = []
    for seed in range(first, first + BATCH):
        try:
            codes.append(planned(tmp_path, capsys, mutant(seed))[0])
        except BaseException as error:
            error.add_note(f"seed {seed}:\n{mutant(seed)[:2000]!r}")
            raise
    # Damage that nothing notices, or that nothing survives, would test little.
    assert BAD_INPUT in codes


def test_the_damage_is_what_it_was():
    """Seeds name configs: the same one each time, and no two alike."""
    assert [mutant(s) for s in range(20)] == [mutant(s) for s in range(20)]
    assert len({mutant(s) for s in range(MUTANTS)}) > 0.9 * MUTANTS


@pytest.mark.parametrize("config", SHIPPED, ids=lambda path: path.stem)
def test_what_is_not_damaged_is_planned(config, tmp_path, capsys):
    assert planned(tmp_path, capsys, config.read_bytes()) == (OK, "")


BASE = PATCH.read_text()
assert "mazes: 6" in BASE
WIDE = f"{{kind: latent_noise, step: all, strength: {[i + 0.5 for i in range(1200)]}}}"
TOO_MUCH = {
    "billion-laughs": (BASE + "\n" + LAUGHS, f"more than {MOST_VALUES:,} values, those of aliases included"),
    "billion-merges": (BASE + "\n" + MERGED, f"more than {MOST_VALUES:,} values"),
    "alias-of-itself": (BASE + "\nx: &x [*x]\n", "an alias inside of what it names"),
    "deep": (BASE + "\nx: " + "[" * 50_000 + "\n", "nested too deeply"),
    "long": (BASE + "\n# " + "x" * MOST_BYTES, f"longer than {MOST_BYTES:,} characters"),
    "many-values": (BASE + "\nx: [" + "1, " * MOST_VALUES + "1]\n", f"more than {MOST_VALUES:,} values"),
    "many-digits": (BASE.replace("mazes: 6", "mazes: " + "9" * 5000), "a number of 5000 digits; at most 100 are read"),
    "many-mazes": (
        BASE.replace("mazes: 6", "mazes: 1000000000"),
        f"a sweep has at most {MOST_SAMPLES:,}: make several",
    ),
    "more-mazes": (BASE.replace("mazes: 6", "mazes: 1000000001"), "less than or equal to 1000000000"),
    "many-seeds": (BASE.replace("mazes: 6", "mazes: 6, seeds: 100000000"), "makes 600,000,000 samples"),
    "many-cells": (
        BASE.replace("steps: 8", "steps: 1000").replace("run:", f"  wide: {WIDE}\nrun:"),
        f"1,200,000 cells a sample; an experiment has at most {MOST_CELLS:,}: sweep less",
    ),
    "many-problems": (BASE + "\n" + "\n".join(f"x{i}: 1" for i in range(3000)), "2950 more problems are not listed"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("content", "reason"), TOO_MUCH.values(), ids=list(TOO_MUCH))
def test_too_much_is_refused_soon(content, reason, tmp_path, capsys):
    code, said = planned(tmp_path, capsys, content.encode())
    assert code == BAD_INPUT
    assert reason in said


def test_large_is_not_too_large(tmp_path, capsys):
    code, _ = planned(tmp_path, capsys, BASE.replace("mazes: 6", "mazes: 20000").encode())
    assert code == OK


@pytest.mark.parametrize(
    "text", ["step: '-:'", "step: ':-'", "step: '-'", "step: '1:-'", "step: ':::'", "step: '1:2:0'"]
)
def test_what_looks_like_a_slice_is_refused(text, tmp_path, capsys):
    config = BASE.split("experiments:")[0] + f"experiments:\n  m: {{kind: step_skip, mode: drop, {text}}}\n"
    code, said = planned(tmp_path, capsys, config.encode())
    assert code == BAD_INPUT
    assert "experiments.m.step: Input should be a valid integer" in said


def test_tags_that_would_run_code_run_none(tmp_path, capsys):
    marker = tmp_path / "marker"
    for tag in (
        "!!python/object/apply:os.system",
        "!!python/object/new:os.system",
        "!!python/object/apply:pathlib.Path",
    ):
        _, said = planned(tmp_path, capsys, f"{BASE}\nx: {tag} ['touch {marker}']\n".encode())
        assert "not valid YAML here: tag !!python" in said
    assert not marker.exists()


def test_a_random_file_is_no_config(tmp_path, capsys):
    rng = random.Random(7)
    for size in (1, 10, 1000, 100_000):
        assert planned(tmp_path, capsys, rng.randbytes(size))[0] == BAD_INPUT
