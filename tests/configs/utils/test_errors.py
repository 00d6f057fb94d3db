"""Printed errors and exit codes of entry points."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from configs.utils.errors import UserError, printable, run_main
from tools.common.tables import write_text

ROOT = Path(__file__).parents[3]


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
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_error_is_always_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise UserError("a name\n\x1b[2J of a file")

    with pytest.raises(SystemExit) as stopped:
        run_main(fail)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: a name\\n\\x1b[2J of a file\n"


def test_closed_output_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: sys.stdout.close())
    assert stopped.value.code == 2
    assert "its output could not be written (I/O operation on closed file" in capsys.readouterr().err


SCRIPT = "from configs.utils.errors import run_main\ndef main():\n    print('told')\n    return 0\nrun_main(main)"


@pytest.mark.parametrize(
    ("redirected", "code", "err"),
    [
        (
            "> /dev/full",
            2,
            "error: the command succeeded, but its output could not be written (No space left on device); print",
        ),
        (">&-", 0, ""),
        ("| true", 0, ""),
    ],
)
def test_unwritable_output_prints_no_traceback(redirected: str, code: int, err: str) -> None:
    wait = "import time; time.sleep(0.3)\n" if redirected == "| true" else ""  # until its reader has ended
    command = f'set -o pipefail; "$0" -c "$1" {redirected}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, wait + SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
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
def test_closed_terminal_changes_exit_code_only_if_results_are_lost(end: str, code: int) -> None:
    lines = ["sys.stdin.readline()", "sys.stdout.write('told')", end]
    main = "def main():\n" + "".join(f"    {line}\n" for line in lines)
    script = f"import sys\nfrom configs.utils.errors import UserError, run_main\n{main}run_main(main)"
    ours, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    os.close(terminal)
    os.close(ours)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == code


def test_closed_stderr_does_not_write_into_later_files(tmp_path: Path) -> None:
    script = SCRIPT.replace(
        "print('told')",
        "import sys; file = open(sys.argv[1], 'w'); print('x', file=sys.stderr); "
        "import os; os.write(2, b'y'); print(sys.stderr.isatty())",
    )
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" "$2" 2>&-', sys.executable, script, tmp_path / "file"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "False\n")
    assert (tmp_path / "file").read_bytes() == b""


NAMED = """
import sys
from pathlib import Path
from configs.utils.errors import run_main
from configs.load import load_config, to_yaml
from tools.common.tables import write_text

def main():
    config = load_config("configs/digits_lenet.yaml", [f"name={sys.argv[2]}"], output=sys.argv[1])
    folder = Path(config.output) / config.name
    folder.mkdir()
    write_text(folder / "config.yaml", to_yaml(config))
    print(config.name, file=sys.stdout)
    print(config.name, file=sys.stderr)

if __name__ == "__main__":
    run_main(main)
"""


@pytest.mark.parametrize("options", [[], ["-X", "utf8=0"]], ids=["by the environment", "by an option"])
def test_names_outside_the_locale_work_and_print_escaped(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "named.py").write_text(NAMED)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *options, tmp_path / "named.py", tmp_path, "größe_日本"],
        capture_output=True,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    if options:  # the program cannot change it: one sentence, no endless restarts
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1), done.stderr
        return
    shown = b"gr\\xf6\\xdfe_\\u65e5\\u672c\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, shown)
    assert "name: größe_日本" in (tmp_path / "größe_日本" / "config.yaml").read_text(encoding="utf-8")


def test_table_accepts_file_names_of_any_bytes(tmp_path: Path) -> None:
    write_text(tmp_path / "table.csv", os.fsdecode(b"a\xff.png"))
    assert (tmp_path / "table.csv").read_bytes() == b"a\\udcff.png"
