"""UserError, for problems that the user can fix, and wrappers that raise or print it."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.utils.console import remove_bars

# Control characters of terminals (also 8-bit), line ends, bidirectional marks and surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """A problem that the user can fix, such as bad input.

    The message is one sentence that says what is wrong, the value, what is allowed and how to fix it.
    """


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Convert an OSError from examining or reading `file` in this context into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); fix that and start again") from None


def printable(text: str) -> str:
    """Return text as one line that is safe to print, with control characters escaped, e.g. `\\x1b`."""
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape", "surrogatepass").decode(), text)


def run_main(main: Callable[[], int | None], *, is_result_printed: bool = True) -> None:
    """Run an entry point and exit with its exit code.

    A UserError is printed as one line on stderr, with exit code 2. Ctrl-C exits with code 130.

    Args:
        main: The entry point. Returns the exit code, or None for 0.
        is_result_printed: Whether stdout is the result. If so, failing to write to it, e.g. on a full disk, is an
            error.
    """
    _open_standard_streams()
    _use_utf8()
    try:
        code = main()
        lost = flush_streams()
        if lost and is_result_printed and not code:
            raise UserError(f"the command succeeded, but its output could not be written ({lost}); print it elsewhere")
    except UserError as error:
        print_error(f"error: {printable(str(error))}")
        code = 2
    except KeyboardInterrupt:
        print_error("interrupted")
        code = 130
    sys.exit(code)


def _use_utf8() -> None:
    """Restart in Python's UTF-8 mode if the locale, e.g. de_DE.ISO-8859-1, does not use UTF-8.

    Other encodings cannot represent every character in a file name. multiprocessing children inherit the mode. They are
    not restarted, since their command line cannot be re-executed.
    """
    # With -X utf8=0, PYTHONUTF8=1 has no effect, so a restart would not help.
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    from multiprocessing import parent_process

    if parent_process() is None:
        flush_streams()
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _open_standard_streams() -> None:
    """Open /dev/null for each standard stream that the parent process closed (`2>&-`).

    Otherwise, a data file could get the descriptor of the stream, and messages would be written to this file. Also
    escape characters that the encoding of stdout or stderr lacks.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free descriptor is this one
    sys.stdin, sys.stdout, sys.stderr = (
        stream if stream is not None else open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 (never closed)
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w"))
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # prints characters that the terminal lacks as `\xf6`


def flush_streams() -> str | None:
    """Flush stdout and stderr. Return the reason if flushing stdout failed, or None.

    A closed pipe (`| head`) is not a failure. A stream that failed is replaced, since Python would flush it again at
    exit and exit with code 120.
    """
    reason = None
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
            if name == "stdout" and not isinstance(error, BrokenPipeError):
                reason = getattr(error, "strerror", None) or str(error)
    return reason


def print_error(text: str) -> None:
    """Print text to stderr in one call, since several ranks may share stderr."""
    flush_streams()
    with suppress(OSError, ValueError):  # the terminal was closed
        remove_bars()
        sys.stderr.write(f"{text}\n")
    flush_streams()
