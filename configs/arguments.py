"""Parsers of the commands. Importing this module is fast, so that --help and wrong arguments are answered at once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

from configs.utils.errors import UserError


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that keeps the line breaks of its description."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line. If the shell asks for completions of a word, print these instead and exit."""
    complete(parser)
    return parser.parse_args(argv)


def complete(parser: argparse.ArgumentParser) -> None:
    """If the shell asks for completions of a word, print them and exit."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that give a config: CONFIG and KEY=VALUE, or --cfg and --opts. Use `parse_config` to parse."""
    words = parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG KEY=VALUE",
        help="config file, configs/….yaml, and settings that override it, such as train.epochs=5",
    )
    words.completer = complete_words  # type: ignore[attr-defined]  # read by argcomplete
    parser.add_argument("--cfg", metavar="FILE", help="same as CONFIG")
    opts = parser.add_argument(
        "--opts",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="same as KEY=VALUE, also with a space: train.epochs 5",
    )
    opts.completer = complete_words  # type: ignore[attr-defined]


def parse_config(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, *, is_required: bool = True
) -> argparse.Namespace:
    """Parse the command line of a parser with `add_config`. The result has the config file in `cfg` and all KEY=VALUE,
    in ascending precedence, in `opts`. Without `is_required`, a missing config file is None.
    """
    complete(parser)
    parsed, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        advice = "write settings as KEY=VALUE, such as train.epochs=3"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; {advice}")
    return take_words(parser, parsed, is_required=is_required)


def take_words(
    parser: argparse.ArgumentParser, parsed: argparse.Namespace, *, is_required: bool = True
) -> argparse.Namespace:
    """Move the positional arguments of `add_config` to `cfg` and `opts`, and return the arguments."""
    words = parsed.words
    if is_required or words:
        take_config(parser, parsed, words)
    if wrong := [word for word in words if "=" not in word]:
        parser.error(f"{wrong[0]!r} is not a setting: write KEY=VALUE, such as train.epochs=5")
    parsed.opts = [*words, *parsed.opts]
    del parsed.words
    return parsed


def take_config(parser: argparse.ArgumentParser, parsed: argparse.Namespace, words: list[str]) -> None:
    """Without --cfg, remove the first of the positional arguments, and set `parsed.cfg` to it."""
    if parsed.cfg is None:
        if not words or ("=" in words[0] and not os.path.exists(words[0])):
            parser.error("the config file is missing: give configs/….yaml first, or --cfg FILE")
        parsed.cfg = words.pop(0)
        if not os.path.exists(parsed.cfg) and (near := similar_config(parsed.cfg)) is not None:
            parser.error(f"{parsed.cfg} does not exist; did you mean {near}?")


def similar_config(name: str) -> str | None:
    """Return the config file with the same name in another folder or with another suffix, or None."""
    stem = os.path.splitext(os.path.basename(name))[0]
    files = [os.path.join(os.path.dirname(name) or "configs", f"{stem}.yaml"), os.path.join("configs", f"{stem}.yaml")]
    return next((file for file in files if os.path.exists(file)), None)


def complete_words(prefix: str, **_: object) -> list[str]:
    """Return the YAML files and folders that start with `prefix`, and `KEY=` of every setting."""
    from argcomplete.completers import FilesCompleter

    from configs.schema import all_settings, is_section

    keys = [f"{key}=" for key, field in all_settings() if not is_section(field)]
    return [*FilesCompleter(("yaml", "yml"))(prefix), *keys]


def flag_name(name: str) -> str:
    """Return the command-line flag of an argument, such as `--top-k` for `top_k`."""
    return f"--{name.replace('_', '-')}"


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raise UserError if any of the named integer arguments is below 1. Arguments that are None are skipped."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"{flag_name(name)}={value} is not a positive whole number; use 1 or more")


def whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Return an argparse type for integers from `minimum` to `maximum`, without an upper bound if `maximum` is None."""
    limits = f"from {minimum} to {maximum}" if maximum is not None else f"of at least {minimum}"

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = minimum - 1
        if number < minimum or (maximum is not None and number > maximum):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {limits}")
        return number

    return parse
