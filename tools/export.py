"""Export a trained model to files for other programs. Each file is verified against the checkpoint.

    python tools/export.py --checkpoint output/cifar10_lenet

This writes to output/cifar10_lenet/export:

  model.safetensors   weights of the network, whose inputs are normalized floats
  config.json         architecture, mean, std, crop and classes, in the layout of timm's folders. Load a timm/NAME
                      model with timm.create_model("local-dir:FOLDER", pretrained=True), and a built-in model with
                      build_model and safetensors.torch.load_file; the tool prints the code
  model.pt2           torch.export: raw pixels, uint8 [batch, 3, H, W] -> logits float32 [batch, classes]
  model.onnx          the same for ONNX Runtime: input `images`, output `logits`; its metadata contains the classes,
                      image size, crop and origin
  export.json         the values of the printed table, package versions, and how to use each file

All models are float32, accept any batch size and do not use test-time augmentation. Prepare images as in evaluation:
convert them to RGB, resize the shorter side to image_size / crop_fraction, and crop the center. With crop_mode squash,
resize height and width to image_size instead.

Each format is loaded from disk and run on images of the validation split, or on random pixels if the run's data set
does not exist, in batches of 1, 7 and 64. If logits differ from the checkpoint's by more than --tolerance (or a
millionth of the largest absolute logit, if that is more), the format is not written, and an older file is left
unchanged.

Exit codes: 0: all formats were written; 1: at least one format was not written, and stderr says why; 2: invalid input
(nothing was written), or export.json cannot be written.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument, path_text
from models import PixelClassifier, model_options
from tools.common.cli import check_positive
from tools.common.tables import Row, make_folder, markdown, write_json
from tools.inference.export_check import CPU, ExpectedLogits, expected_logits
from tools.inference.export_formats import FORMATS, Exportable, usage_snippet
from tools.inference.exporter import export_format
from tools.inference.trained_model import TrainedModel, load_trained_model
from train.distributed.process_group import Ranks, process_group

PACKAGES = ("torch", "safetensors", "timm", "onnx", "onnxscript", "onnxruntime")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=path_argument, required=True, metavar="RUN", help="run folder or .pt file")
    add("--format", nargs="+", choices=list(FORMATS), default=list(FORMATS), help="formats to write (default: all)")
    add("--out", type=path_argument, metavar="FOLDER", help="output folder (default: export, beside the checkpoint)")
    add("--verify-images", type=int, default=256, metavar="N", help="images to verify on (default: %(default)s)")
    tolerance = (
        "largest allowed difference of logits (default: 1e-4, or a millionth of the largest logit if that is more)"
    )
    add("--tolerance", type=float, default=1e-4, help=tolerance)
    data = "converted data set, if it was moved since training"
    add("--data-path", type=path_text, metavar="FOLDER", help=data)
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

    size = f"{len(exportable.classes)} classes, {exportable.image_size} pixels"
    print(f"{exportable.name} of {trained.title}: {size}")
    if (tta := trained.config.eval.tta) != "none":
        print(f"eval.tta={tta} is not exported: expect the accuracy of a single view")
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name in dict.fromkeys(arguments.format):
        try:
            row = export_format(name, exportable, expected, arguments.tolerance, folder)
        except UserError as error:
            failed[name] = str(error)
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            rows.append(row)
            print(f"{name}: written, largest difference of logits {row['max difference']:.1e}", flush=True)
    write_report(exportable, expected, rows, failed, folder)
    return 1 if failed else 0


def build_exportable(trained: TrainedModel) -> Exportable:
    """Return a copy of the model with its metadata. The copy is float32 and in the contiguous memory format."""
    model = copy.deepcopy(trained.state.network).float().to(memory_format=torch.contiguous_format).eval()
    assert isinstance(model, PixelClassifier)
    settings, evaluation = trained.config.model, trained.config.eval
    activation = {"activation": settings.activation} if settings.activation is not None else {}
    return Exportable(
        model=model,
        name=settings.name,
        arguments={**model_options(settings), **activation},
        classes=trained.dataset.classes,
        image_size=trained.dataset.image_size,
        interpolation=trained.config.data.interpolation,
        crop_mode=evaluation.crop_mode,
        crop_fraction=evaluation.crop_fraction if evaluation.crop_mode == "center" else 1.0,
        origin={
            "dataset": trained.dataset.name,
            "epochs": trained.epochs,
            "checkpoint": str(trained.path),
            "checkpoint_sha256": hashlib.sha256(trained.path.read_bytes()).hexdigest(),
        },
    )


def write_report(
    exportable: Exportable, expected: ExpectedLogits, rows: list[Row], failed: dict[str, str], folder: Path
) -> None:
    """Write export.json, and print the table of the written formats and the code that uses them.

    `failed` contains the error message of each format that was not written. Raises UserError if export.json cannot be
    written.
    """
    snippets = {row["format"]: usage_snippet(row["format"], exportable, folder) for row in rows}
    content = {
        **exportable.metadata,
        "formats": [row | {"use": snippets[row["format"]].splitlines()} for row in rows],
        "failed": failed,
        "verified_on": expected.source,
        "largest_logit": expected.max_abs,
        "versions": {package: version(package) for package in PACKAGES},
        "date": date.today().isoformat(),
    }
    write_json(folder / "export.json", content)
    if rows:
        print(f"\nin {folder}, verified on {expected.source}:\n\n{markdown(rows)}")
        print("\nUse, with images a uint8 tensor [batch, 3, height, width]:")
    for text in snippets.values():
        print("\n    " + text.replace("\n", "\n    "))


if __name__ == "__main__":
    run_main(main)
