"""Export a trained model with `tools/export.py`."""

from __future__ import annotations

import argparse
import copy
import hashlib
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from configs.utils.errors import UserError
from models import PixelClassifier, model_options
from tools.common.tables import Row, make_folder, markdown, write_json
from tools.inference.export_check import CPU, ExpectedLogits, expected_logits
from tools.inference.export_formats import Exportable, usage_snippet
from tools.inference.exporter import export_format
from train.distributed.process_group import Ranks, process_group
from train.trained_model import TrainedModel, load_trained_model

PACKAGES = ("torch", "safetensors", "timm", "onnx", "onnxscript", "onnxruntime")


def run(arguments: argparse.Namespace) -> int:
    """Export a model as the arguments of `tools/export.py` say, and return the exit status."""
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
