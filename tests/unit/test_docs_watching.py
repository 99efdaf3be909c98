"""The page on watching: its example and its table are what the code makes, and the alerts read metrics that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from docs.make_watching import PAGE, example, render
from pipeline.cli import app
from pipeline.telemetry import Telemetry

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "configs" / "cluster"


def test_page_is_what_make_watching_page_writes():
    text = PAGE.read_text(encoding="utf-8")
    assert render(text) == text


def test_example_is_the_same_every_time():
    assert example() == example()


def test_table_equals_the_metrics_that_exist():
    found = re.findall(r"^\| `(stepscope_\w+)` \| (\w+) \| (\w*) \| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE)
    assert found == Telemetry().rows
    assert len(found) > 10


def test_commands_parse():
    lines = re.findall(r"^stepscope ([^#\n]+)", PAGE.read_text(), flags=re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        app.parse_args(line.split(), exit_on_error=False, print_error=False)


class TestPrometheus:
    @pytest.fixture
    def rules(self):
        (group,) = yaml.safe_load((CLUSTER / "prometheus_alerts.yml").read_text())["groups"]
        return group["rules"]

    def test_scrape_reads_the_port_of_the_page_and_the_alerts(self):
        config = yaml.safe_load((CLUSTER / "prometheus.yml").read_text())
        (job,) = config["scrape_configs"]
        port = job["static_configs"][0]["targets"][0].rpartition(":")[2]
        assert f"--metrics-port {port}" in PAGE.read_text()
        assert [(CLUSTER / name).is_file() for name in config["rule_files"]] == [True]

    def test_alerts_read_metrics_that_exist(self, rules):
        exist = {name for name, *_ in Telemetry().rows}
        exist |= {f"{name}_count" for name, kind, *_ in Telemetry().rows if kind == "histogram"}
        for rule in rules:
            named = set(re.findall(r"stepscope_\w+", rule["expr"]))
            assert named, rule["alert"]
            assert named <= exist, rule["alert"]

    def test_alerts_say_what_is_wrong(self, rules):
        assert len(rules) == len({rule["alert"] for rule in rules}) == 3
        for rule in rules:
            assert rule["annotations"]["summary"].endswith(".")
            assert rule["expr"].count("(") == rule["expr"].count(")")
