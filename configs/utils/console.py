"""Progress bars at the bottom of the terminal, and lines of text above them.

tqdm owns the terminal: before other text is written, it removes its bars, and it draws them again below the text. So
bars come from `progress_bar`, and text that may be written while a bar is shown goes through `above_bars`. Without a
terminal there are no bars, and text is written as it is.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

REFRESH_S = 0.25  # minimum time between two updates of a bar


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Return a tqdm bar on stderr that disappears when it is closed, see `bar_options`.

    Args:
        iterable: Items to count, or None to call `update`.
        **options: Other options of tqdm.
    """
    from tqdm import tqdm  # takes 0.1 s, and --help needs no bars

    return tqdm(iterable, **(bar_options() | options))


def bar_options(*, is_shown: bool = True) -> dict[str, Any]:
    """Return the options that all bars have. Bars are shown only on a terminal and on rank 0, if `is_shown`."""
    return {
        "file": _bar_stream(),
        "leave": False,
        "dynamic_ncols": True,
        "mininterval": REFRESH_S,
        "disable": not (is_shown and shows_bars()),
    }


def shows_bars() -> bool:
    """Return True if progress bars of this process are shown."""
    return sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"


@contextmanager
def above_bars() -> Iterator[None]:
    """Remove all progress bars in this context, so that whole lines can be written, and then draw them again."""
    if "tqdm" not in sys.modules:  # then no bar exists
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=_bar_stream()):
        yield


def remove_bars() -> None:
    """Remove all progress bars for good, since the command ends."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(tqdm._instances):  # type: ignore[attr-defined]
            bar.close()


class LinesAboveBars:
    """A text stream that passes whole lines to another stream, above the progress bars."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._pending = ""

    def write(self, text: str) -> int:
        lines, newline, self._pending = (self._pending + text).rpartition("\n")
        if newline:
            self._pass(lines + newline)
        return len(text)

    def close_line(self) -> None:
        """End a line that has not ended yet."""
        if self._pending:
            self.write("\n")

    def _pass(self, text: str) -> None:
        with above_bars():
            self.stream.write(text)
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def other_output_above_bars() -> Iterator[None]:
    """Let whole lines that any Python code writes to sys.stdout and sys.stderr appear above the progress bars."""
    streams = LinesAboveBars(sys.stdout), LinesAboveBars(sys.stderr)
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):  # type: ignore[type-var]
        try:
            yield
        finally:
            for stream in streams:
                stream.close_line()


def _bar_stream() -> TextIO:
    return sys.stderr.stream if isinstance(sys.stderr, LinesAboveBars) else sys.stderr


def terminal_width(stream: TextIO | None = None) -> int:
    """Return the columns of the terminal that `stream` (default: stdout) writes to. Otherwise, return COLUMNS or 80."""
    with suppress(OSError, ValueError):
        if columns := os.get_terminal_size((stream or sys.stdout).fileno()).columns:
            return columns
    return shutil.get_terminal_size().columns


def fold(text: str, stream: TextIO) -> str:
    """Return text with line breaks between words, so that it fits the terminal. Without a terminal, return it as it is.

    Words that are longer than a line, such as paths, stay whole.
    """
    if not stream.isatty():
        return text
    wrapper = textwrap.TextWrapper(
        terminal_width(stream), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(map(wrapper.fill, text.splitlines()))


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its unit in singular or plural, such as `1 epoch` and `1,000 epochs`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """Return a duration as `8.1 s`, `12:34` (minutes and seconds) or `1:02:03`."""
    if not 0 <= seconds < float("inf"):
        return "?"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
