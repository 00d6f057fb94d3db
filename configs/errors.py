"""The one error that means: the user can mend this. Entry points print it as one sentence and exit with 2."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Control characters of terminals (8-bit ones too), line ends, marks that turn the direction of writing, surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """Bad input: the message says what is wrong, the value, what is allowed and how to mend it, in one sentence."""


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """What the system says against looking at a file or reading it, as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); mend that and start again") from None


def printable(text: str) -> str:
    """One line that is safe to show, whatever names and values of foreign files are in it: `\\x1b` for an escape."""
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape", "surrogatepass").decode(), text)


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
