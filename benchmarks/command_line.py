"""Run a benchmark's command line; errors become one line and an exit code, as in the package."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from prioritycut_ray.errors import UserError


def run_command(main: Callable[..., Any]) -> None:
    """Run a function by its arguments on the command line."""
    try:
        typer.run(main)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
