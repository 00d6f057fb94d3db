"""What is shown of errors."""

from __future__ import annotations

import pytest

from configs.errors import UserError, printable, run_main


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcödé, 猫, a b", "plain, ünïcödé, 猫, a b"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("two\nlines\r\n", "two\\nlines\\r\\n"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\udcff", "\\udcff"),
    ],
)
def test_control_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_an_error_is_one_line_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise UserError("a name\n\x1b[2J of a file")

    with pytest.raises(SystemExit) as stopped:
        run_main(fail)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: a name\\n\\x1b[2J of a file\n"
