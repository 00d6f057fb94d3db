"""The one error that means: the user can mend this. Entry points print it as one sentence and exit with 2."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


def run_main(main: Callable[[], int | None], *, is_result_printed: bool = True) -> None:
    """Run an entry point; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130.

    is_result_printed: then it is an error where stdout does not take the last of it, as on a full disk.
    """
    _open_standard_streams()
    _use_utf8()
    try:
        code = main()
        lost = _flush()
        if lost and is_result_printed and not code:
            raise UserError(f"all is done but for what was to be printed here ({lost}); print it elsewhere")
    except UserError as error:
        _say(f"error: {printable(str(error))}")
        code = 2
    except KeyboardInterrupt:
        _say("interrupted")
        code = 130
    sys.exit(code)


def _use_utf8() -> None:
    """Restart the program in Python's UTF-8 mode if the locale has another encoding, such as de_DE.ISO-8859-1.

    Files could not be named with letters that this encoding lacks. Processes of multiprocessing are not restarted:
    their command line cannot be repeated, and they inherit the mode.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":  # 1, and yet not: -X utf8=0
        return
    from multiprocessing import parent_process

    if parent_process() is None:
        _flush()
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _open_standard_streams() -> None:
    """Where the program was started with one closed (`2>&-`), what it prints would go into a file that it opens."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    sys.stdin, sys.stdout, sys.stderr = (
        stream if stream is not None else open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 (never closed)
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w"))
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # letters that the terminal lacks, as `\xf6`


def _flush() -> str | None:
    """Why stdout does not take what is left to be printed; a reader that has gone (`| head`) has enough.

    Python would flush again at its end, and make 120 of the exit code.
    """
    lost: dict[str, OSError] = {}
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError as error:
            lost[name] = error
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    why = lost.get("stdout")
    return None if why is None or isinstance(why, BrokenPipeError) else why.strerror


def _say(text: str) -> None:
    with suppress(OSError):  # of a terminal that is gone
        print(text, file=sys.stderr)
    _flush()
