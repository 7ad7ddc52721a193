"""``fxpipe completion``: what a shell needs to complete commands and options."""

from __future__ import annotations

import argparse
from typing import Any

from fxpipe.cli.options import add_command
from fxpipe.errors import PlanError


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "completion",
        _run,
        help="print the completion script of a shell",
        examples="""
        eval "$(fxpipe completion bash)"
        fxpipe completion zsh > ~/.zfunc/_fxpipe
        """,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")


def _run(options: argparse.Namespace) -> None:
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise PlanError("completion needs shtab\n  pip install 'fxpipe[cli]'") from error
    print(shtab.complete(options.parser, shell=options.shell))
