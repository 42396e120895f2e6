"""Options from the command line and from a file; none is passed over, a misspelt one is an error that names the nearest."""

import argparse
import difflib
import os
import sys
import tomllib
from typing import Any, NoReturn


class Settings(argparse.ArgumentParser):
    """A parser whose options can stand in a TOML file too, `--config FILE`, by their names with underscores.

    What the command line says goes before what the file says. An error is told once, by the first of several processes, and ends
    each of them with exit code 2; to be used before they become a cluster.
    """

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self.add_argument("--config", metavar="FILE", help="a TOML file with any of these options, as new_tokens = 8")
        self._where = ""

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        args = sys.argv[1:] if args is None else list(args)
        options = self._parse(args)
        if options.config is None:
            return options
        # What is wrong with the file is said of the file.
        self._where = f"{options.config}: "
        from_file = self._read(options.config)
        self._parse(from_file)
        self._where = ""
        return self._parse(from_file + args)

    def error(self, message: str) -> NoReturn:
        if os.environ.get("LAUNCH_PROCESS", "0") == "0":
            print(f"{self.prog}: error: {self._where}{message}", file=sys.stderr, flush=True)
        sys.exit(2)

    def _parse(self, args: list[str]) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args(args)
        for arg in unknown:
            if arg.startswith("--"):
                self._unknown("option", arg.split("=")[0], [name for name in self._option_string_actions if name.startswith("--")])
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return namespace

    def _read(self, file: str) -> list[str]:
        """The options of a file as arguments of a command line."""
        try:
            with open(file, "rb") as opened:
                keys = tomllib.load(opened)
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            self.error(str(error))
        known = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        args: list[str] = []
        for key, value in keys.items():
            if key not in known:
                self._unknown("key", key, list(known))
            args += self._as_arguments(known[key], value)
        return args

    def _as_arguments(self, action: argparse.Action, value: Any) -> list[str]:
        name = action.option_strings[-1]
        flag, several = action.nargs == 0, action.nargs == "*"
        if flag != isinstance(value, bool) or several != isinstance(value, list) or isinstance(value, dict):
            expected = "true or false" if flag else "an array" if several else "a number or a string"
            self.error(f"{action.dest} is {value!r}; expected {expected}")
        if flag:
            return [name] if value else []
        return [name, *map(str, value)] if several else [f"{name}={value}"]

    def _unknown(self, kind: str, name: str, known: list[str]) -> NoReturn:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        self.error(f"unknown {kind} {name}; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"))
