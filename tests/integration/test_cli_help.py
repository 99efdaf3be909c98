"""The help of every command: examples that parse, and options that no command gains or loses unnoticed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipeline.cli import OK, app, main

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "run", "plan", "submit", "logs", "cancel", "check", "status", "effects", "report", "verify", "export",
    "models", "tasks", "interventions",
)  # fmt: skip


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_example_of_every_command_parses(self, command, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        assert main([command, "--help"]) == OK
        text = capsys.readouterr().out
        examples = re.findall(r"Example:\s+(stepscope .*)", text)
        assert examples[0].split()[1] == command
        for example in examples:
            for part in example.split("&&"):
                words = shlex.split(part)
                assert words[0] == "stepscope"
                function, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
                assert callable(function)
                assert bound is not None

    def test_configs_of_the_examples_are_there(self, capsys):
        named = set()
        for command in COMMANDS:
            main([command, "--help"])
            named |= set(re.findall(r"configs/\w+\.yaml", capsys.readouterr().out))
        assert named
        assert all((ROOT / name).is_file() for name in named)

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=["nothing", "long", "short"])
    def test_all_commands_are_listed(self, arguments, capsys):
        assert main(arguments) == OK
        text = capsys.readouterr().out
        assert all(re.search(rf"\b{command}\b", text) for command in COMMANDS)

    def test_commands_are_these(self):
        """A new command needs its row in the tests."""
        assert {name for name in app if not name.startswith("-")} == set(COMMANDS)

    def test_options_of_run_are_these(self, capsys):
        main(["run", "--help"])
        assert set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out.split("Parameters")[1])) == {
            "--config", "--store", "--set", "--replicas", "--metrics-port", "--metrics-host",
            "--allow-metric", "--allow-pickled-weights",
        }  # fmt: skip

    def test_options_of_status_are_these(self, capsys):
        main(["status", "--help"])
        assert set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out.split("Parameters")[1])) == {
            "--store", "--address", "--watch", "--every", "--json"
        }  # fmt: skip

    def test_options_of_submit_are_these(self, capsys):
        main(["submit", "--help"])
        assert set(re.findall(r"--[a-z]+(?:-[a-z]+)*", capsys.readouterr().out.split("Parameters")[1])) == {
            "--config", "--address", "--store", "--set", "--replicas", "--working-dir", "--env", "--wait", "--follow",
            "--metrics-port", "--metrics-host", "--allow-metric", "--allow-pickled-weights"
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("command", "options"),
        [
            ("logs", {"--job", "--address", "--set", "--follow"}),
            ("cancel", {"--target", "--address", "--set"}),
        ],
    )
    def test_options_for_jobs_are_these(self, capsys, command, options):
        main([command, "--help"])
        assert set(re.findall(r"--[a-z]+", capsys.readouterr().out.split("Parameters")[1])) == options
