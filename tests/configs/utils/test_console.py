"""Progress bars and the lines above them. Training's live line is in tests/train/reporting/test_progress.py."""

from __future__ import annotations

import io
import sys

import pytest

from configs.utils import console
from configs.utils.console import counted, duration, fold, other_output_above_bars, progress_bar
from configs.utils.errors import print_error
from configs.utils.warnings import warn
from helpers.terminal import Terminal


@pytest.fixture(autouse=True)
def _each_update_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "REFRESH_S", 0)


@pytest.mark.parametrize("columns", [40, 100])
def test_messages_of_any_code_appear_above_the_bar(columns: int) -> None:
    terminal = Terminal(columns)
    long = "a long warning of this project with many words, which has to be folded on any terminal " * 2
    with terminal.opened(), progress_bar(total=8, desc="bar") as bar, other_output_above_bars():
        for write in (
            lambda: print("print to stdout"),
            lambda: print("print to stderr", file=sys.stderr),
            lambda: warn(long + str(columns)),
            lambda: sys.stdout.write("two parts "),
            lambda: sys.stdout.write("of one line\nand the start of the next"),
        ):
            bar.update()
            write()
    lines = terminal.lines()
    assert lines[:2] == ["print to stdout", "print to stderr"]
    assert f"warning: {long}{columns}" in " ".join(line.strip() for line in lines)
    assert lines[-2:] == ["two parts of one line", "and the start of the next"]
    assert not terminal.wraps()
    assert not any("bar:" in line for line in lines)
    assert any("bar:" in screen[-1] for screen in terminal.screens() if screen)
    assert all(sum("bar:" in line for line in screen) <= 1 for screen in terminal.screens())


def test_error_removes_bars_for_good() -> None:
    terminal = Terminal(80)
    with terminal.opened():
        bar = progress_bar(total=3)
        bar.update()
        print_error("error: this is the end")
        bar.update()
    assert terminal.lines() == ["error: this is the end"]


def test_bars_are_not_shown_without_terminal_or_on_other_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def use_bars() -> None:
        for _ in progress_bar(range(3)):
            pass

    use_bars()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "1")
    terminal = Terminal(80)
    with terminal.opened():
        use_bars()
    assert terminal.output == b""
    monkeypatch.setenv("RANK", "0")
    with terminal.opened():
        use_bars()
    assert b"3/3" in terminal.output


def test_redirected_text_is_not_folded() -> None:
    text = "many words " * 50
    assert fold(text, io.StringIO()) == text


def test_paths_stay_whole_when_text_is_folded() -> None:
    path = "/a-long/path-with/hyphens" * 4
    terminal = Terminal(60)
    with terminal.opened():
        assert fold(f"see {path} for more", sys.stdout).splitlines() == ["see", f"  {path}", "  for more"]


def test_counts_and_durations_have_the_right_units() -> None:
    assert [counted(number, "epoch") for number in (0, 1, 1000)] == ["0 epochs", "1 epoch", "1,000 epochs"]
    assert counted(2, "class", "classes") == "2 classes"
    times = (0.04, 59.94, 59.96, 61, 3599.6, 3723, float("nan"))
    assert [duration(time_s) for time_s in times] == ["0.0 s", "59.9 s", "1:00", "1:01", "1:00:00", "1:02:03", "?"]
