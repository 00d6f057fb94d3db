"""Export a trained model to files for other programs. Each file is verified against the checkpoint.

    python tools/export.py --checkpoint output/cifar10_lenet

writes to output/cifar10_lenet/export:

  model.safetensors   weights of the network, whose input is normalised floats
  config.json         architecture, mean, std, crop and classes, in the layout of timm's folders. A model timm/NAME is
                      loaded by timm.create_model("local-dir:FOLDER", pretrained=True), a built-in one by build_model
                      and safetensors.torch.load_file; the tool prints the code
  model.pt2           torch.export: raw pixels, uint8 [batch, 3, H, W] -> logits float32 [batch, classes]
  model.onnx          the same for ONNX Runtime: input `images`, output `logits`; its metadata contains the classes,
                      image size, crop and origin
  export.json         the values of the printed table, package versions, and how to use each file

All models are float32, take any batch size and use no test-time augmentation. Prepare images as in evaluation: RGB, the
shorter side resized to image_size / crop_fraction, the center cropped; with crop_mode squash, both sides resized to
image_size.

Each format is loaded from disk and run on images of the validation split, or on random pixels if the data set does not
exist, in batches of 1, 7 and 64. If logits differ from the checkpoint's by more than --tolerance (or a millionth of the
largest logit, if that is more), the format is not written and an older file is left unchanged.

Exit codes: 0: all formats were written; 1: at least one was not, for the reason on stderr; 2: invalid input, nothing
was written.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument, path_text
from models import PixelClassifier, model_options
from tools.common.cli import check_positive
from tools.common.tables import Row, make_folder, markdown, write_text
from tools.inference.export_check import CPU, ExpectedLogits, compare_logits, expected_logits
from tools.inference.export_formats import FORMATS, Exportable, usage_snippet
from tools.inference.trained_model import TrainedModel, load_trained_model
from train.distributed.process_group import Ranks, process_group

ROUNDING = 1e-6  # rounding error of float32 after many layers, relative to the largest logit
PACKAGES = ("torch", "safetensors", "timm", "onnx", "onnxscript", "onnxruntime")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=path_argument, required=True, metavar="RUN", help="run folder or .pt file")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=list(FORMATS),
        default=list(FORMATS),
        help="formats to write (default: all)",
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="FOLDER", help="output folder (default: export, beside the checkpoint)"
    )
    parser.add_argument(
        "--verify-images", type=int, default=256, metavar="N", help="images to verify on (default: %(default)s)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest allowed difference of logits (default: 1e-4, or a millionth of the largest logit if that is "
        "more)",
    )
    parser.add_argument(
        "--data-path", type=path_text, metavar="FOLDER", help="converted data set, if it was moved since training"
    )
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse_arguments(sys.argv[1:])
    check_positive(arguments, "verify_images")
    if not arguments.tolerance >= 0:
        raise UserError(f"--tolerance={arguments.tolerance} is not a number of at least 0; use 1e-4")
    with process_group(Ranks.alone("tools/export.py")):
        trained = load_trained_model(arguments.checkpoint, CPU)
    expected = expected_logits(trained, arguments.data_path, arguments.verify_images)
    exportable = build_exportable(trained)
    folder = make_folder(arguments.out or trained.path.parent / "export")

    print(f"{exportable.name} of {trained.title}: {len(trained.classes)} classes, {trained.image_size} pixels")
    if (tta := trained.config.eval.tta) != "none":
        print(f"eval.tta={tta} is not exported: expect the accuracy of a single view")
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name in dict.fromkeys(arguments.format):
        try:
            row = export(name, exportable, expected, arguments.tolerance, folder)
        except UserError as error:
            failed[name] = str(error)
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            rows.append(row)
            print(f"{name}: written, largest difference of logits {row['max difference']:.1e}", flush=True)
    write_report(exportable, expected, rows, failed, folder)
    return 1 if failed else 0


def build_exportable(trained: TrainedModel) -> Exportable:
    """Return a contiguous float32 copy of the model, for any memory format of the run."""
    model = copy.deepcopy(trained.training.network).float().to(memory_format=torch.contiguous_format).eval()
    assert isinstance(model, PixelClassifier)
    settings, evaluation = trained.config.model, trained.config.eval
    activation = {"activation": settings.activation} if settings.activation is not None else {}
    return Exportable(
        model=model,
        name=settings.name,
        arguments={**model_options(settings), **activation},
        classes=trained.classes,
        image_size=trained.image_size,
        interpolation=trained.config.data.interpolation,
        crop_mode=evaluation.crop_mode,
        crop_fraction=evaluation.crop_fraction if evaluation.crop_mode == "center" else 1.0,
        origin={
            "dataset": trained.name,
            "epochs": trained.epochs,
            "checkpoint": str(trained.path),
            "checkpoint_sha256": hashlib.sha256(trained.path.read_bytes()).hexdigest(),
        },
    )


def export(name: str, exportable: Exportable, expected: ExpectedLogits, tolerance: float, folder: Path) -> Row:
    """Write one format to a temporary folder, verify it, and move its files to `folder`.

    Args:
        name: the format, a key of FORMATS.
        exportable: the model.
        expected: the checkpoint's logits.
        tolerance: largest allowed difference of logits.
        folder: of the written files.

    Returns:
        The row of the printed table.

    Raises:
        UserError: the format cannot be written or run, or its logits differ; `folder` is unchanged.
    """
    form = FORMATS[name]
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as temporary:
        aside = Path(temporary)
        try:
            with quiet():
                holds = form.write(exportable, aside)
        except Exception as error:  # exporters raise all kinds of errors for unsupported models
            raise UserError(
                f"format {name} cannot be exported: {root_cause(error)}; leave it out with --format"
            ) from None
        try:
            with quiet():
                result = compare_logits(form.load(aside), expected)
        except Exception as error:
            raise UserError(
                f"format {name} was written but cannot be run: {root_cause(error)}; nothing is kept"
            ) from None
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
        "holds": holds,
        "size, MiB": round(size_mib, 3),
        "max difference": result.max_difference,
        "same top-1": f"{result.same_top1} of {len(expected.images)}",
        "verified on": expected.kind,
    }


def move_files(files: list[Path], folder: Path) -> None:
    """Move files into `folder` and give them its read permissions: safetensors only lets the owner read."""
    try:
        for file in files:
            file.chmod(0o600 | folder.stat().st_mode & 0o066)
            file.replace(folder / file.name)
    except OSError as error:
        raise UserError(f"cannot write {folder / file.name}: {error.strerror}; give another --out") from None


def write_report(
    exportable: Exportable, expected: ExpectedLogits, rows: list[Row], failed: dict[str, str], folder: Path
) -> None:
    """Print the table and the snippets, and write both to export.json."""
    snippets = {row["format"]: usage_snippet(row["format"], exportable, folder) for row in rows}
    content: dict[str, Any] = {
        **exportable.metadata,
        "formats": [row | {"use": snippets[row["format"]].splitlines()} for row in rows],
        "failed": failed,
        "verified_on": expected.source,
        "largest_logit": expected.max_abs,
        "versions": {package: version(package) for package in PACKAGES},
        "date": date.today().isoformat(),
    }
    write_text(folder / "export.json", json.dumps(content, indent=2) + "\n")
    if rows:
        print(f"\nin {folder}, verified on {expected.source}:\n\n{markdown(rows)}")
        print("\nUse, with images a uint8 tensor [batch, 3, height, width]:")
    for text in snippets.values():
        print("\n    " + text.replace("\n", "\n    "))


def root_cause(error: BaseException) -> str:
    """Return the message at the root of an exporter's error, in one line and without colors."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:400].rstrip(".")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the output, warnings and logs of exporters; errors are still raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


if __name__ == "__main__":
    run_main(main)
