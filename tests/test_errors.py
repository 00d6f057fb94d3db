"""What is shown of errors."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

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


SCRIPT = "from configs.errors import run_main\ndef main():\n    print('told')\n    return 0\nrun_main(main)"


@pytest.mark.parametrize(
    ("redirected", "code", "err"),
    [
        (
            "> /dev/full",
            2,
            "error: all is done but for what was to be printed here (No space left on device); print it",
        ),
        (">&-", 0, ""),
        ("| true", 0, ""),
    ],
)
def test_what_cannot_be_printed_is_no_traceback(redirected: str, code: int, err: str) -> None:
    wait = "import time; time.sleep(0.3)\n" if redirected == "| true" else ""  # until its reader is gone
    command = f'set -o pipefail; "$0" -c "$1" {redirected}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, wait + SCRIPT],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(err)
    assert len(done.stderr.splitlines()) == (1 if err else 0)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("return 129", 129),
        ("raise UserError('x')", 2),
        ("return 0", 2),
        ("sys.stderr.write('x'); return 143", 143),
    ],
)
def test_a_terminal_that_is_gone_changes_no_exit_code_but_that_of_a_result_nobody_saw(end: str, code: int) -> None:
    lines = ["sys.stdin.readline()", "sys.stdout.write('told')", end]
    main = "def main():\n" + "".join(f"    {line}\n" for line in lines)
    script = f"import sys\nfrom configs.errors import UserError, run_main\n{main}run_main(main)"
    ours, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=terminal, stderr=terminal,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    os.close(terminal)
    os.close(ours)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == code


def test_a_closed_stderr_takes_nothing_into_a_file_that_is_opened_later(tmp_path: Path) -> None:
    script = SCRIPT.replace("print('told')", "import sys; file = open(sys.argv[1], 'w'); print('x', file=sys.stderr); "
                                             "import os; os.write(2, b'y'); print(sys.stderr.isatty())")  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" "$2" 2>&-', sys.executable, script, tmp_path / "file"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "False\n")
    assert (tmp_path / "file").read_bytes() == b""
