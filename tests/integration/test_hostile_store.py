"""A store from a stranger: every command that opens it works or says one sentence; nothing runs, nothing else changes.

Each row damages a finished store in one way. Code that would run writes a marker; whatever lies beside the store is
compared before and after.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

from pipeline.cli import BAD_INPUT, FAILED, OK, main
from pipeline.store import Lease

CONFIG = """\
name: tiny
model: {id: "embedded:maze"}
task: {name: maze, mazes: 2}
sampler: {steps: 2}
metrics: [goal_evidence]
experiments:
  map: {kind: patch, step: all, layer: [0, 1], component: attn2}
previews: {samples: [0]}
run: {replicas: 0}
"""
INJECTED = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished store with effects."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "c.yaml").write_text(CONFIG)
    assert main(["run", str(folder / "c.yaml"), "--store", str(folder / "s.zarr")]) == OK
    assert main(["effects", str(folder / "s.zarr"), "--replicates", "20"]) == OK
    return folder


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    """A working directory with a copy of the store, and private files that it must not touch."""
    shutil.copytree(finished / "s.zarr", tmp_path / "s.zarr")
    shutil.copy(finished / "c.yaml", tmp_path)
    private = tmp_path / "private"
    private.mkdir()
    (private / "notes.txt").write_text("mine\n")
    (private / "deeper").mkdir()
    (private / "deeper" / "more.txt").write_text("mine too\n")
    monkeypatch.chdir(tmp_path)
    # What waits for the holder of a lease that cannot be read need not wait for long.
    monkeypatch.setitem(Lease.__init__.__kwdefaults__, "ttl", 0.2)
    return tmp_path


def meta(store: Path, at: str = "") -> dict[str, Any]:
    return json.loads((store / at / "zarr.json").read_text())


def write_meta(store: Path, at: str, data: Any) -> None:
    (store / at / "zarr.json").write_text(json.dumps(data))


def attribute(at: str, name: str, value: Any):
    """Set one attribute, or take it away."""

    def damage(store: Path) -> None:
        data = meta(store, at)
        data["attributes"].pop(name, None)
        if value is not ...:
            data["attributes"][name] = value
        write_meta(store, at, data)

    return damage


def field(at: str, name: str, value: Any):
    """Set one field of a node's metadata."""

    def damage(store: Path) -> None:
        write_meta(store, at, {**meta(store, at), name: value})

    return damage


def journal(*lines: str | bytes):
    def damage(store: Path) -> None:
        with (store / "journal.jsonl").open("ab") as file:
            for line in lines:
                file.write((line.encode() if isinstance(line, str) else line) + b"\n")

    return damage


def text(at: str, content: str | bytes):
    """Write a file of the store anew."""

    def damage(store: Path) -> None:
        (store / at).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def gone(at: str):
    def damage(store: Path) -> None:
        shutil.rmtree(store / at) if (store / at).is_dir() else (store / at).unlink()

    return damage


def link(at: str, target: str):
    """Put a link to something outside in the place of a part of the store."""

    def damage(store: Path) -> None:
        if (store / at).exists():
            gone(at)(store)
        os.symlink(store.parent / target, store / at)

    return damage


def renamed(at: str, to: str):
    def damage(store: Path) -> None:
        (store / at).rename(store / to)

    return damage


def fifo(at: str):
    def damage(store: Path) -> None:
        if (store / at).exists():
            gone(at)(store)
        os.mkfifo(store / at)

    return damage


class _Runs:
    """Unpickled, it writes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def pickled_group(at: str, array: str):
    """Put a group of Zarr format 2 there, one of whose arrays of objects is decoded by pickle."""

    def damage(store: Path) -> None:
        if (store / at).exists():
            gone(at)(store)
        group = zarr.open_group(str(store / at), mode="w", zarr_format=2)
        made = group.create_array(array, shape=(1,), dtype="int64", attributes={"_ARRAY_DIMENSIONS": ["sample"]})
        made[:] = 1
        about = json.loads((store / at / array / ".zarray").read_text())
        about |= {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 4}], "compressor": None, "fill_value": None}
        (store / at / array / ".zarray").write_text(json.dumps(about))
        values = np.array([_Runs(store.parent / "marker")], dtype=object)
        (store / at / array / "0").write_bytes(numcodecs.Pickle().encode(values))

    return damage


def pickled_chunk(at: str):
    """Name the pickle codec in an array of format 3, over a chunk that it would decode."""

    def damage(store: Path) -> None:
        codecs = [{"name": "numcodecs.pickle", "configuration": {"protocol": 4}}]
        write_meta(store, at, {**meta(store, at), "codecs": codecs})
        for chunk in (p for p in (store / at / "c").rglob("*") if p.is_file()):
            chunk.write_bytes(pickle.dumps(_Runs(store.parent / "marker")))

    return damage


def both(*damages):
    def damage(store: Path) -> None:
        for one in damages:
            one(store)

    return damage


def pending(store: Path) -> None:
    """Make every unit pending again, so that a resumed run computes and writes."""
    for name in ("baseline", "map"):
        zarr.open_group(str(store), mode="r+")[f"{name}/status"][:] = 0
    (store / "journal.jsonl").unlink(missing_ok=True)


UNKNOWN = json.dumps({"experiments": {"map": {"kind": "run_code", "x": "__import__('os')"}}, "metrics": 3, "name": []})
DEEP = "[" * 5000 + "]" * 5000
METRIC, STATUS = "map/goal_evidence", "map/status"

DAMAGE = {
    "journal-list": journal("[]", "1", '"x"', "null", "true"),
    "journal-no-index": journal('{"group": "map"}'),
    "journal-odd-group": journal(
        '{"group": [], "index": 0}', '{"group": {"a": 1}, "index": 0}', '{"group": 1, "index": 0}'
    ),
    "journal-odd-index": journal(
        *(json.dumps({"group": "map", "index": i}) for i in ("0", True, -1, 1e9, 10**30, None, [0]))
    ),
    "journal-odd-counts": journal(
        *(json.dumps({"group": "map", "index": 0, "failed": f}) for f in ("many", -5, {"a": 1}, 1e400))
    ),
    "journal-odd-errors": journal(
        '{"group": "map", "index": 0, "error": {"a": [1]}}', '{"group": "map", "index": 0, "error": 5}'
    ),
    "journal-deep": journal(DEEP),
    "journal-huge-number": journal('{"group": "map", "index": ' + "9" * 5000 + "}"),
    "journal-binary": journal(b"\xff\xfe\x00\x01", b"\x00" * 100),
    "journal-path": journal('{"group": "../private", "index": 0}', '{"group": "/etc", "index": 0}'),
    "journal-folder": both(gone("journal.jsonl"), lambda s: (s / "journal.jsonl").mkdir()),
    "journal-pipe": fifo("journal.jsonl"),
    "journal-link": link("journal.jsonl", "private/notes.txt"),
    "lease-link": link("lease", "private"),
    "lease-pipe": both(lambda s: shutil.rmtree(s / "lease"), fifo("lease")),
    "lease-odd": both(
        lambda s: shutil.rmtree(s / "lease"), lambda s: (s / "lease").mkdir(), text("lease/000001.json", DEEP)
    ),
    "stop-odd": text("lease/stop.json", DEEP),
    "segments-link": link("journal", "private"),
    "segment-link": both(lambda s: (s / "journal").mkdir(), link("journal/000001-000001.jsonl", "private/notes.txt")),
    "effects-link": link("effects", "private"),
    "one-effect-link": link("effects/map", "private"),
    "group-link": link("map", "private"),
    "chunks-link": both(pending, link(f"{METRIC}/c", "private")),
    "root-metadata-link": both(
        lambda s: shutil.copy(s / "zarr.json", s.parent / "private" / "z.json"), link("zarr.json", "private/z.json")
    ),
    "partial-link": link("x.partial", "private/notes.txt"),
    "schema-word": attribute("", "schema_version", "newest"),
    "schema-list": attribute("", "schema_version", []),
    "schema-null": attribute("", "schema_version", None),
    "schema-huge": attribute("", "schema_version", 10**30),
    "schema-fraction": attribute("", "schema_version", 2.5),
    "hash-number": attribute("", "config_sha256", 7),
    "hash-list": attribute("", "config_sha256", [1]),
    "config-no-json": both(attribute("", "config_json", "{"), attribute("", "config_sha256", "x")),
    "config-unknown-kinds": both(attribute("", "config_json", UNKNOWN), attribute("", "config_sha256", "x")),
    "config-unknown-kinds-same-hash": attribute("", "config_json", UNKNOWN),
    "config-list": attribute("", "config_json", "[1, 2]"),
    "config-number": both(attribute("", "config_json", 5), attribute("", "config_sha256", "x")),
    "config-deep": both(attribute("", "config_json", DEEP), attribute("", "config_sha256", "x")),
    "config-missing": both(attribute("", "config_json", ...), attribute("", "config_sha256", "x")),
    "digest-missing": attribute("", "model_digest", ...),
    "digest-list": attribute("", "model_digest", [1]),
    "title-mapping": attribute("", "title", {"a": [1]}),
    "model-odd": attribute("", "model", [1, {"a": None}]),
    "root-no-json": text("zarr.json", "{"),
    "root-list": text("zarr.json", "[]"),
    "root-deep": text("zarr.json", DEEP),
    "root-binary": text("zarr.json", b"\xff\xfe\x00"),
    "root-array": field("", "node_type", "array"),
    "root-odd-attributes": field("", "attributes", [1]),
    "root-format-9": field("", "zarr_format", 9),
    "root-consolidated-odd": field(
        "",
        "consolidated_metadata",
        {
            "kind": "inline",
            "must_understand": False,
            "metadata": {"../private": {"zarr_format": 3, "node_type": "group"}},
        },
    ),
    "group-metadata-gone": gone("map/zarr.json"),
    "group-no-json": text("map/zarr.json", "{"),
    "samples-gone": gone("samples"),
    "baseline-gone": gone("baseline"),
    "experiment-gone": gone("map"),
    "status-gone": gone(STATUS),
    "metric-gone": gone(METRIC),
    "pairs-gone": gone("samples/pair"),
    "recipient-unknown": attribute("map", "recipient", "nobody"),
    "recipient-list": attribute("map", "recipient", [1]),
    "recipient-axis": attribute("map", "recipient", "by direction"),
    "contrast-mapping": attribute("map", "contrast", {"a": 1}),
    "fixed-no-json": attribute("map", "fixed", "{"),
    "fixed-list": attribute("map", "fixed", [1]),
    "kind-list": attribute("map", "kind", ["patch"]),
    "formula-number": attribute("map", "formula", 5),
    "screen-odd": attribute("map", "screen", "yes"),
    "coordinates-odd": attribute("map", "coordinates", [1]),
    "coordinates-unknown": attribute("map", "coordinates", "nothing at all"),
    "previews-patched-odd": attribute("previews", "patched", "[1]"),
    "status-words": field(STATUS, "data_type", "string"),
    "status-floats": field(STATUS, "data_type", "float64"),
    "status-long": field(STATUS, "shape", [10**4]),
    "status-flat": field(STATUS, "shape", []),
    "status-codes": lambda s: zarr.open_group(str(s), mode="r+")[STATUS].__setitem__(slice(None), 77),
    "metric-shape": field(METRIC, "shape", [2, 2, 99]),
    "metric-flat": field(METRIC, "shape", [2]),
    "metric-endless": field(METRIC, "shape", [2, 2, 10**15]),
    "metric-negative": field(METRIC, "shape", [-2, 2, 2]),
    "metric-type-unknown": field(METRIC, "data_type", "object"),
    "metric-type-named": field(METRIC, "data_type", {"name": "numpy.object", "configuration": {}}),
    "metric-double": field(METRIC, "data_type", "float64"),
    "metric-complex": field(METRIC, "data_type", "complex64"),
    "metric-pickle-codec": pickled_chunk(METRIC),
    "pairs-pickle-codec": pickled_chunk("samples/pair"),
    "metric-python-codec": field(METRIC, "codecs", [{"name": "builtins.eval", "configuration": {"x": "1"}}]),
    "metric-json-codec": field(METRIC, "codecs", [{"name": "numcodecs.json2", "configuration": {}}]),
    "metric-no-codecs": field(METRIC, "codecs", []),
    "metric-dimensions-gone": field(METRIC, "dimension_names", None),
    "metric-dimensions-double": field(METRIC, "dimension_names", ["sample", "step", "step"]),
    "metric-dimensions-odd": field(METRIC, "dimension_names", ["a b", "../x", ""]),
    "metric-fill-odd": field(METRIC, "fill_value", "0xzz"),
    "metric-chunks-zero": field(METRIC, "chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [0, 0, 0]}}),
    "metric-transformer": field(METRIC, "storage_transformers", [{"name": "x", "configuration": {}}]),
    "metric-scaled": attribute(METRIC, "scale_factor", "many"),
    "metric-time": attribute(METRIC, "units", "days since never"),
    "metric-fill-attribute": attribute(METRIC, "_FillValue", {"a": 1}),
    "metric-type-attribute": attribute(METRIC, "dtype", "object"),
    "metric-name-attribute": attribute(METRIC, "long_name", {"a": 1}),
    "metric-mathtext": attribute("baseline/goal_evidence", "long_name", r"cost $\frac{1$ of $x"),
    "run-names": lambda s: zarr.open_group(str(s), mode="r+")["baseline/run"].__setitem__(
        slice(None), np.array(["a", "b"], dtype=object)
    ),
    "group-format-2": pickled_group("samples", "prompt"),
    "baseline-format-2": pickled_group("baseline", "run"),
    "previews-format-2": pickled_group("previews", "x0_hat"),
    "effects-format-2": pickled_group("effects/map", "pair"),
    "new-group-format-2": pickled_group("other", "x"),
    "group-name-script": renamed("map", INJECTED.replace("/", "_")),
    "group-name-newline": renamed("map", "a\nb\x1b[31m"),
    "group-name-dots": renamed("map", "..."),
    "group-name-long": renamed("map", "x" * 250),
    "group-name-math": renamed("map", "$x_{$"),
    "metric-name-script": renamed(METRIC, f"map/{INJECTED.replace('/', '_')}"),
    "chunk-cut": lambda s: next(p for p in (s / METRIC / "c").rglob("*") if p.is_file()).write_bytes(b"x"),
    "chunk-folder": lambda s: [(p.unlink(), p.mkdir()) for p in list((s / METRIC / "c").rglob("*")) if p.is_file()],
    "prompts-script": lambda s: zarr.open_group(str(s), mode="r+")["samples/clean_prompt"].__setitem__(
        slice(None), np.array([INJECTED] * 2, dtype=object)
    ),
    "title-script": attribute("", "title", INJECTED),
    "every-text-script": both(
        *(
            attribute("", n, INJECTED)
            for n in ("title", "model", "created", "code_version", "solver", "libraries", "hardware")
        )
    ),
    "group-texts-script": both(
        *(attribute("map", n, INJECTED) for n in ("kind", "formula")),
        attribute("map", "fixed", json.dumps({INJECTED: INJECTED})),
        attribute("effects/map", "formula", INJECTED),
        attribute("effects/map", "kind", INJECTED),
        attribute("effects/map", "fixed", json.dumps({INJECTED: INJECTED})),
    ),
    "metric-texts-script": both(
        *(attribute("baseline/goal_evidence", n, INJECTED) for n in ("long_name", "description", "units"))
    ),
    "effect-texts-script": both(
        *(
            attribute("effects/map", n, INJECTED)
            for n in ("method_interval", "replicates", "seed", "experimental_unit", "caveat", "sign_convention")
        )
    ),
    "effect-level-script": attribute("effects/map", "level", INJECTED),
    "previews-script": attribute("previews", "patched", json.dumps({INJECTED: INJECTED, "direction": INJECTED})),
    "config-script": attribute(
        "", "config_json", json.dumps({"name": INJECTED, "metrics": [INJECTED], "experiments": {INJECTED: 1}})
    ),
}
"""What is wrong with the store, by name."""

COMMANDS = {
    "status": ["status", "s.zarr"],
    "effects": ["effects", "s.zarr", "--replicates", "20"],
    "report": ["report", "s.zarr", "--out", "out"],
    "export": ["export", "s.zarr", "out.zip", "--force", "--partial"],
    "verify": ["verify", "s.zarr"],
    "run": ["run", "c.yaml", "--store", "s.zarr"],
}


def outside(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder but those of the store and of the report."""
    own = ("s.zarr", "out", "out.zip")
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.relative_to(folder).parts[0] not in own
    }


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_damage_is_survived(damage, place, capsys):
    damage(place / "s.zarr")
    before = outside(place)
    for name, arguments in COMMANDS.items():
        code = main(arguments)
        said = capsys.readouterr().err
        assert code in (OK, FAILED, BAD_INPUT), name
        if code == BAD_INPUT:
            # Before it may be told what was waited for or restored.
            (sentence,) = [line for line in said.splitlines() if line.startswith("stepscope: ")]
            assert said.endswith(f"{sentence}\n"), (name, said)
            assert len(sentence) < 1500
        assert "Traceback" not in said
        assert not (place / "marker").exists(), f"{name} ran code of the store"
        assert outside(place) == before, f"{name} changed something outside of the store"
    page = place / "out" / "report.html"
    if page.exists():
        assert "<script" not in page.read_text()
