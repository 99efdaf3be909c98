"""YAML is read as people mean it, every key knows its line, and anything else is one sentence with file and line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.yaml_source import SourceError, line_of, read, read_file, read_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        pytest.param("off", "off", id="off-is-a-word"),
        pytest.param("on", "on", id="on-is-a-word"),
        pytest.param("no", "no", id="no-is-a-word"),
        pytest.param("yes", "yes", id="yes-is-a-word"),
        pytest.param("y", "y", id="y-is-a-word"),
        pytest.param("true", True, id="true-is-a-boolean"),
        pytest.param("False", False, id="capital-false-is-a-boolean"),
        pytest.param("1e-3", 0.001, id="exponent-without-dot"),
        pytest.param("1E5", 1e5, id="capital-exponent"),
        pytest.param("-1.5e+2", -150.0, id="signed-exponent"),
        pytest.param(".5", 0.5, id="leading-dot"),
        pytest.param("5.", 5.0, id="trailing-dot"),
        pytest.param(".inf", math.inf, id="infinity"),
        pytest.param("-.inf", -math.inf, id="negative-infinity"),
        pytest.param("12:30", "12:30", id="clock-time-is-no-number"),
        pytest.param("1:", {1: None}, id="key-without-value"),
        pytest.param("1:20", "1:20", id="slice-is-no-number"),
        pytest.param("2:8:2", "2:8:2", id="stride-is-no-number"),
        pytest.param("010", 10, id="leading-zero-is-not-octal"),
        pytest.param("08", 8, id="leading-zero-eight"),
        pytest.param("+3", 3, id="plus-sign"),
        pytest.param("-3", -3, id="minus-sign"),
        pytest.param("0x10", "0x10", id="hexadecimal-is-a-word"),
        pytest.param("1_000", "1_000", id="underscore-is-a-word"),
        pytest.param("2024-01-31", "2024-01-31", id="date-is-a-word"),
        pytest.param("1.2.3", "1.2.3", id="version-is-a-word"),
        pytest.param("e5", "e5", id="exponent-alone-is-a-word"),
        pytest.param("null", None, id="null"),
        pytest.param("~", None, id="tilde"),
        pytest.param("", None, id="nothing"),
        pytest.param('"3"', "3", id="quoted-number-is-a-word"),
        pytest.param("red/blue", "red/blue", id="slash"),
        pytest.param("[a, 1, 2.5]", ["a", 1, 2.5], id="list"),
    ],
)
def test_scalar_is_read_as_in_yaml_1_2(text, value):
    read_as = read_value(text)
    if isinstance(value, dict):
        value = {str(k): v for k, v in value.items()}
    assert read_as == value
    assert type(read_as) is type(value)


def test_nan_is_a_number():
    assert math.isnan(read_value(".nan"))


@given(st.floats(allow_nan=False))
def test_every_float_survives_its_repr(number):
    assert float(read_value(repr(number).replace("inf", ".inf"))) == number


@given(st.integers(-(10**12), 10**12))
def test_every_integer_survives_its_repr(number):
    assert read_value(str(number)) == number


TEXT = """\
# a comment
name: demo

sampler:
  steps: 3        # with a comment
experiments:
  first:
    kind: patch
    layer:
      - 0
      - 1
  second: {kind: noise, at: step}
"""


@pytest.mark.parametrize(
    ("loc", "line"),
    [
        pytest.param(("name",), 2, id="top"),
        pytest.param(("sampler", "steps"), 5, id="nested"),
        pytest.param(("experiments", "first"), 7, id="section"),
        pytest.param(("experiments", "first", "layer"), 9, id="list"),
        pytest.param(("experiments", "first", "layer", 1), 11, id="item-of-a-list"),
        pytest.param(("experiments", "second", "at"), 12, id="flow-mapping"),
    ],
)
def test_every_key_path_has_its_line(loc, line):
    assert read(TEXT, "demo.yaml")[1][loc] == line


@pytest.mark.parametrize(
    ("loc", "line"),
    [
        pytest.param(("sampler", "missing"), 4, id="missing-key-has-the-line-of-its-section"),
        pytest.param(("experiments", "first", "layer", 1, "deeper"), 11, id="below-an-item"),
        pytest.param(("nowhere",), None, id="not-in-the-file"),
        pytest.param((), None, id="whole-file"),
    ],
)
def test_path_that_is_not_in_the_file_has_the_line_of_its_parent(loc, line):
    assert line_of(loc, read(TEXT, "demo.yaml")[1]) == line


def test_values_are_plain():
    data, _ = read(TEXT, "demo.yaml")
    assert data["experiments"]["first"] == {"kind": "patch", "layer": [0, 1]}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        pytest.param("3: a", "3", id="number"),
        pytest.param("true: a", "true", id="boolean"),
        pytest.param("off: a", "off", id="word"),
        pytest.param("1e3: a", "1e3", id="exponent"),
        pytest.param("007: a", "007", id="zeros-in-front"),
        pytest.param("~: a", "~", id="tilde"),
    ],
)
def test_keys_are_words(text, key):
    assert list(read(text, "x.yaml")[0]) == [key]


def test_aliases_and_merge_keys_work():
    data, _ = read("base: &b {steps: 3}\nother:\n  <<: *b\n  extra: 1\n", "x.yaml")
    assert data["other"] == {"steps": 3, "extra": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("a: [1\nb: 2\n", r"^x\.yaml:2: not valid YAML: ", id="open-bracket"),
        pytest.param("a: b\n\tc: d\n", r"^x\.yaml:2: not valid YAML: found character '\\t'", id="tab"),
        pytest.param("a: b: c\n", r"^x\.yaml:1: not valid YAML: mapping values are not allowed", id="two-colons"),
        pytest.param("a: *b\n", r"^x\.yaml:1: not valid YAML: found undefined alias 'b'", id="unknown-alias"),
        pytest.param(
            "a: 1\n---\nb: 2\n", r"^x\.yaml:2: not valid YAML: but found another document", id="two-documents"
        ),
        pytest.param("a: 'b\n", r"^x\.yaml:2: not valid YAML: found unexpected end of stream", id="open-quote"),
        pytest.param('a: "\x00"\n', r"^x\.yaml: not valid YAML: unacceptable character #x0000", id="null-character"),
        pytest.param("a: 1\na: 2\n", r"^x\.yaml:2: key a is given twice \(first on line 1\)$", id="duplicate-top"),
        pytest.param(
            "a:\n  b: 1\n  c: 1\n  b: 2\n",
            r"^x\.yaml:4: key a\.b is given twice \(first on line 2\)$",
            id="duplicate-nested",
        ),
        pytest.param("a: [{b: 1, b: 2}]\n", r"^x\.yaml:1: key a\.0\.b is given twice", id="duplicate-in-a-list"),
        pytest.param('1: a\n"1": b\n', r"^x\.yaml:2: key 1 is given twice", id="duplicate-number-and-word"),
        pytest.param("", r"^x\.yaml:1: no settings in it", id="empty"),
        pytest.param("# nothing\n", r"^x\.yaml:1: no settings in it", id="only-a-comment"),
        pytest.param("- a\n", r"^x\.yaml:1: expected a mapping of settings at the top, got \['a'\]$", id="list"),
        pytest.param("hello\n", r"^x\.yaml:1: expected a mapping of settings at the top, got 'hello'$", id="word"),
        pytest.param("? [a, b]\n: 1\n", r"^x\.yaml:1: not valid YAML: found unhashable key", id="list-as-key"),
        pytest.param(
            "a: 1\nb: !!python/object:os.system {}\n", r"^x\.yaml:2: .*tag !!python/object:os\.system", id="python-tag"
        ),
        pytest.param("a: !!binary aGk=\n", r"^x\.yaml:1: .*tag !!binary", id="binary-tag"),
        pytest.param("a: !custom 1\n", r"^x\.yaml:1: .*tag !custom", id="custom-tag"),
        pytest.param("a: !!set {b, c}\n", r"^x\.yaml:1: .*tag !!set", id="set-tag"),
        pytest.param("a: !!bool maybe\n", r"^x\.yaml: not valid YAML: ", id="bool-tag-on-a-word"),
        pytest.param("a: !!int many\n", r"^x\.yaml: not valid YAML: ", id="int-tag-on-a-word"),
        pytest.param(
            "a: &a [*a]\n", r"^x\.yaml: not valid YAML: .*an alias inside of what it names", id="alias-of-itself"
        ),
        pytest.param("a: " + "[" * 600, r"^x\.yaml: not valid YAML: nested too deeply", id="deep-nesting"),
    ],
)
def test_text_that_is_no_mapping_is_refused_with_file_and_line(text, message):
    with pytest.raises(SourceError, match=message) as caught:
        read(text, "x.yaml")
    assert "\n" not in str(caught.value)


def test_file_is_read_with_its_path_as_name(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: 1\na: 2\n")
    with pytest.raises(SourceError, match=rf"^{path}:2: key a is given twice"):
        read_file(path)


def test_umlauts_are_read_as_utf_8(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("a: größer\n".encode())
    assert read_file(path)[0] == {"a": "größer"}


def test_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_file(path)[0] == {"a": 1}


def make_missing(folder: Path) -> Path:
    return folder / "missing.yaml"


def make_folder(folder: Path) -> Path:
    return folder


def make_below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("a: 1\n")
    return folder / "file" / "c.yaml"


def make_latin_1(folder: Path) -> Path:
    (folder / "c.yaml").write_bytes("a: größer\n".encode("latin-1"))
    return folder / "c.yaml"


def make_long_name(folder: Path) -> Path:
    return folder / ("n" * 300)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(make_missing, "No such file or directory", id="missing"),
        pytest.param(make_folder, "Is a directory", id="folder"),
        pytest.param(make_below_a_file, "Not a directory", id="below-a-file"),
        pytest.param(make_latin_1, "not UTF-8 text", id="latin-1"),
        pytest.param(make_long_name, "File name too long", id="long-name"),
    ],
)
def test_unreadable_file_is_refused_with_path_and_reason(tmp_path, make, reason):
    path = make(tmp_path)
    with pytest.raises(SourceError) as caught:
        read_file(path)
    assert str(caught.value) == f"cannot read config {path}: {reason}"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[a", id="open-bracket"),
        pytest.param("{a: 1, a: 2}", id="duplicate-key"),
        pytest.param("a\n---\nb", id="two-documents"),
        pytest.param("!!python/name:os.system", id="python-tag"),
    ],
)
def test_override_value_is_as_strict_as_a_file(text):
    with pytest.raises(SourceError):
        read_value(text)
