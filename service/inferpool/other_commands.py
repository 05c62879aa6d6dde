"""The commands that have modules of their own, in one table. `serve` starts sooner without their imports."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from inferpool.admin_commands import COMMANDS, add_admin_commands, run_admin_command
from inferpool.evaluate_command.command import add_evaluate_command, run_evaluate_command
from inferpool.import_command.command import add_import_command, run_import_command
from inferpool.optimise_command.command import add_optimise_command, run_optimise_command
from inferpool.predict_command.command import add_predict_command, run_predict_command
from inferpool.profile_command.command import add_profile_command, run_profile_command
from inferpool.sample_commands import add_sample_commands, run_sample_command
from inferpool.sign_commands import SIGN_COMMANDS, add_sign_commands, run_sign_command


def add_work_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that work on files of models and rows."""
    add_predict_command(commands)
    add_import_command(commands)
    add_evaluate_command(commands)
    add_optimise_command(commands)
    add_profile_command(commands)


def add_server_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands about samples, signatures and running servers."""
    add_sample_commands(commands)
    add_sign_commands(commands)
    add_admin_commands(commands)


def run_other_command(command: str, flags: dict[str, Any], environ: Mapping[str, str]) -> int:
    """Run a command of this table; returns its exit status."""
    if command in COMMANDS:
        return run_admin_command(command, flags, environ)
    if command == "predict":
        return run_predict_command(flags, environ)
    if command == "import":
        return run_import_command(flags, environ)
    if command == "evaluate":
        return run_evaluate_command(flags, environ)
    if command in ("optimise", "optimize"):
        return run_optimise_command(flags, environ)
    if command == "profile":
        return run_profile_command(flags, environ)
    if command == "samples":
        return run_sample_command(flags, environ)
    assert command in SIGN_COMMANDS
    return run_sign_command(command, flags, environ)
