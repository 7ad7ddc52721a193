"""``fxpipe COMMAND …``: the commands, and what their errors look like."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from fxpipe.cli import budget, compare, completion, convert, export, inspect, plan, show, verify
from fxpipe.cli.options import is_first_rank
from fxpipe.errors import FxpipeError, MismatchError

COMMANDS = (plan, budget, show, compare, verify, export, inspect, convert, completion)
EXAMPLE = """examples:
  fxpipe plan llama-8b --stages 8
  fxpipe plan train.py:build --stages 4 --html plan.html"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words of the command line; None for the process's own.

    Returns:
        0; 1 where a verification or comparison failed; 2 where the command or the model does not allow what was asked,
        after one line that says why.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    options.parser = parser
    options.words = ("fxpipe", *(sys.argv[1:] if arguments is None else arguments))
    try:
        return int(options.run(options) or 0)
    except MismatchError as error:
        if is_first_rank():  # every rank has the same
            print(f"fxpipe: {_one_line(str(error))}", file=sys.stderr)
        return 1
    except FxpipeError as error:
        print(f"fxpipe: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def make_parser() -> argparse.ArgumentParser:
    """Give the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="fxpipe",
        description="A pipeline-parallelism compiler for PyTorch.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def _one_line(message: str) -> str:
    """Join what was wrong and the way out.

    >>> _one_line("no such schedule\\n  use GPipe")
    'no such schedule; use GPipe'
    """
    return re.sub(r"\s*\n\s*", "; ", message.strip())
