"""Run code and commands in a pseudo-terminal, and render what they print with a terminal emulator.

As a program, draw the last screen of a command whose last line contains a text:

    python tests/helpers/terminal.py docs/images/terminal.svg "epoch 13/" python train/ddp.py --cfg FILE
"""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from xml.sax.saxutils import escape

import pyte

LINES = 200  # enough that nothing scrolls away


class Terminal:
    """A terminal of a given width. Its text is complete after the context of `opened` or after `run`."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.output = b""

    def run(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> int:
        """Run a command in a folder, with this terminal as stdin, stdout and stderr, and return its exit code."""
        with self._device() as device:
            done = subprocess.run(
                command,
                stdin=device,
                stdout=device,
                stderr=device,
                env=_without_size(environment),
                cwd=folder,
                check=False,
            )
        return done.returncode

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let sys.stdout and sys.stderr of this process be this terminal."""
        with self._device() as device:
            streams = [open(os.dup(device), "w", encoding="utf-8", buffering=1) for _ in range(2)]  # noqa: SIM115
            with streams[0], streams[1], redirect_stdout(streams[0]), redirect_stderr(streams[1]):
                yield

    @contextmanager
    def _device(self) -> Iterator[int]:
        """Yield the file descriptor of the terminal for programs, and collect their output."""
        reader, device = pty.openpty()
        fcntl.ioctl(device, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, self.columns, 0, 0))
        thread = threading.Thread(target=self._collect, args=(reader,))
        thread.start()
        try:
            yield device
        finally:
            os.close(device)  # the last one, so that reading ends
            thread.join()
            os.close(reader)

    def _collect(self, reader: int) -> None:
        while True:
            try:
                content = os.read(reader, 65536)
            except OSError:  # EIO: no program has the terminal open
                return
            if not content:
                return
            self.output += content

    def screens(self) -> list[list[str]]:
        """Return the lines of the screen after each control character or text of the output."""
        screen = pyte.Screen(self.columns, LINES)
        stream = pyte.ByteStream(screen)
        found = []
        for part in self.output.replace(b"\r", b"\0\r").split(b"\0"):
            stream.feed(part)
            found.append(_text(screen))
        return found

    def lines(self, columns: int | None = None) -> list[str]:
        """Return the lines of the final screen, or of the same output on a screen of another width."""
        screen = pyte.Screen(columns or self.columns, LINES)
        pyte.ByteStream(screen).feed(self.output)
        return _text(screen)

    def wraps(self) -> bool:
        """Return True if any line was too long for the terminal."""
        return self.lines() != self.lines(20 * self.columns)


def svg(lines: Sequence[str], columns: int) -> str:
    """Return a picture of the lines of a screen."""
    width, height = 8.43 * columns + 32, 18 * len(lines) + 32
    text = "".join(f'<text x="16" y="{18 * n + 28}">{escape(line)}</text>' for n, line in enumerate(lines))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}">'
        '<rect width="100%" height="100%" rx="8" fill="#1e1e1e"/>'
        f'<g fill="#d8d8d8" font-family="monospace" font-size="14" xml:space="preserve">{text}</g></svg>\n'
    )


def _text(screen: pyte.Screen) -> list[str]:
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        del lines[-1]
    return lines


def _without_size(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}


if __name__ == "__main__":
    file, wanted, *command = sys.argv[1:]
    terminal = Terminal(100)
    terminal.run(command, os.environ, Path.cwd())
    chosen = [screen for screen in terminal.screens() if screen and wanted in screen[-1]][-1]
    Path(file).write_text(svg(chosen, terminal.columns), encoding="utf-8")
