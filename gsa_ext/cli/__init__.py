"""The ``gsa-ext`` command. One module for each subcommand, with ``add_parser(subparsers)`` and ``run(args) -> exit status``."""

from __future__ import annotations

import argparse
import importlib
import sys

from gsa_ext import _load

COMMANDS = ("info", "verify", "bench", "t2r", "convert", "eval", "generate")


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, 1 when something was found wrong, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="gsa-ext", description="Gated Slot Attention: check the installation, measure, turn a Transformer into a GSA model.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    modules = {name: importlib.import_module(f"gsa_ext.cli.{name}") for name in COMMANDS}
    for module in modules.values():
        module.add_parser(subparsers)
    args = parser.parse_args(argv)
    if args.command != "info" and (note := _load.built().cpu_only):  # pip does not show what setup.py says
        print(f"gsa-ext: {note}", file=sys.stderr, flush=True)
    return modules[args.command].run(args)
