"""Export a model in one format: write it to a temporary folder, verify it, and move its files into place."""

from __future__ import annotations

import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from configs.utils.errors import UserError
from tools.common.tables import Row
from tools.inference.export_check import ExpectedLogits, compare_logits
from tools.inference.export_formats import FORMATS, Exportable

ROUNDING = 1e-6  # rounding error of float32 after many layers, relative to the largest logit


def export_format(name: str, exportable: Exportable, expected: ExpectedLogits, tolerance: float, folder: Path) -> Row:
    """Export the model in one format: write it to a temporary folder, verify it, and move its files to `folder`.

    Args:
        name: The format, a key of FORMATS.
        exportable: The model to export.
        expected: The checkpoint's logits.
        tolerance: Maximum absolute difference between logits. Raised to ROUNDING times the largest absolute logit if
            this is larger.
        folder: Output folder.

    Returns:
        The row for this format in the table that tools/export.py prints.

    Raises:
        UserError: The format cannot be written or run, or its logits differ too much. `folder` is then unchanged. Also
            raised if the files cannot be moved to `folder`.
    """
    form = FORMATS[name]
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as temporary:
        aside = Path(temporary)
        with _one_line_errors(f"format {name} cannot be exported", "leave it out with --format"):
            contents = form.write(exportable, aside)
        with _one_line_errors(f"format {name} was written but cannot be run", "nothing is kept"):
            result = compare_logits(form.load(aside), expected)
        allowed = max(tolerance, ROUNDING * expected.max_abs)
        if not result.max_difference <= allowed:  # NaN too
            raise UserError(
                f"format {name} gives logits that differ by up to {result.max_difference:.2e} from the checkpoint's, "
                f"whose largest is {expected.max_abs:.3g}; {allowed:.1e} is allowed, so nothing is kept: raise "
                "--tolerance if that is good enough for you"
            )
        files = sorted(aside.iterdir(), key=lambda file: -file.stat().st_size)
        size_mib = sum(file.stat().st_size for file in files) / 2**20
        move_files(files, folder)
    return {
        "format": name,
        "file": ", ".join(file.name for file in files),
        "holds": contents,
        "size, MiB": round(size_mib, 3),
        "max difference": result.max_difference,
        "same top-1": f"{result.same_top1} of {len(expected.images)}",
        "verified on": expected.kind,
    }


def move_files(files: list[Path], folder: Path) -> None:
    """Move files into `folder`, and copy the folder's read and write permissions for group and others to the files.

    This is needed since safetensors creates files that only their owner can read. Raises UserError if a file cannot be
    moved.
    """
    try:
        for file in files:
            file.chmod(0o600 | folder.stat().st_mode & 0o066)
            file.replace(folder / file.name)
    except OSError as error:
        raise UserError(f"cannot write {folder / file.name}: {error.strerror}; give another --out") from None


def root_cause(error: BaseException) -> str:
    """Return the type and message of the root cause of `error` as one short line without terminal colors."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:400].rstrip(".")


@contextmanager
def _one_line_errors(what: str, advice: str) -> Iterator[None]:
    """Silence the output, warnings and logs of exporters in this context, and turn their exceptions into UserError.

    Exporters raise all kinds of exceptions for unsupported models.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise UserError(f"{what}: {root_cause(error)}; {advice}") from None
    finally:
        logging.disable(before)
