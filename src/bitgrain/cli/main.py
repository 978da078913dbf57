"""The command line: which commands there are, and how an error reaches the user.

Exit status: 0 done; 1 a BitgrainError, a plan with problems or a check that failed; 2 the command line is wrong;
130 stopped by Ctrl-C. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn

import bitgrain
from bitgrain.cli import (
    calibrate,
    convert,
    demo,
    eval,
    finetune,
    inspect,
    merge,
    plan,
    quantize,
    schemes,
    show,
    train,
    verify,
)
from bitgrain.cli.terminal import print_error, quieten_libraries
from bitgrain.errors import BitgrainError

COMMANDS = {
    "quantize": quantize,
    "plan": plan,
    "eval": eval,
    "inspect": inspect,
    "convert": convert,
    "show": show,
    "verify": verify,
    "train": train,
    "calibrate": calibrate,
    "finetune": finetune,
    "merge": merge,
    "schemes": schemes,
    "demo": demo,
}
DESCRIPTION = "Smaller, faster models in formats that engines already read, with the evidence of what it cost."
EPILOG = """\
start here:
  bitgrain demo                                      every kind of scheme on a built-in model, measured
  bitgrain plan MODEL --scheme W4A16                 what it would cost, before it starts
  bitgrain quantize MODEL --scheme W4A16 -o OUT      do it

MODEL is a folder or a name on the Hugging Face hub. `bitgrain COMMAND --help` tells the options."""


class _UsageError(Exception):
    """The command line is wrong; `str(error)` is for the user."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message}; see {self.prog} --help")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Room for the longest command: argparse forgets that commands are indented once more than options."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            self._action_max_length = max(self._action_max_length, 4 + max(map(len, COMMANDS)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    sys.excepthook = _report_bug
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(arguments)
    except _UsageError as error:
        print_error(str(error))
        return 2
    quieten_libraries()
    try:
        status = COMMANDS[args.command].run(args)
        sys.stdout.flush()
    except BitgrainError as error:
        if args.debug:
            raise
        print_error(str(error))
        return 1
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader went away (`bitgrain plan ... | head`); what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _build_parser()
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command is None and not {"-h", "--help", "--version"}.intersection(arguments):
        parser.print_help(sys.stderr)
        raise _UsageError(f"say what to do: {', '.join(COMMANDS)}")
    if command is not None and command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(COMMANDS)}"
        raise _UsageError(f"unknown command {command!r}; {hint}")
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        options = _options(parser, args.command)
        near = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see bitgrain {args.command} --help"
        what = "option" if unknown[0].startswith("-") else "argument"
        raise _UsageError(f"unknown {what} {unknown[0]!r}; {hint}")
    if "complaint" in args and (complaint := args.complaint(args)) is not None:
        raise _UsageError(complaint)
    return args


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="bitgrain",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bitgrain {bitgrain.__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0].rstrip(".")
        command = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:],
            description=(module.__doc__ or "").strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        module.add_arguments(command)
    return parser


def _options(parser: argparse.ArgumentParser, command: str) -> list[str]:
    """Every option that `command` knows."""
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            one: argparse.ArgumentParser = action.choices[command]
            return list(one._option_string_actions)  # pyright: ignore[reportPrivateUsage]
    return []


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What no one foresaw keeps its traceback, and says whose fault it is."""
    traceback.print_exception(kind, error, trace)
    if not issubclass(kind, BitgrainError | KeyboardInterrupt):
        print_error("this is a bug in bitgrain: please report it, with the lines above and the command")
