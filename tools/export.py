"""Export a trained model to files for other programs. Each file is verified against the checkpoint.

    zhu export --checkpoint output/cifar10_lenet

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

from configs.arguments import check_positive, new_parser, parse
from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument, path_text

FORMATS = ("safetensors", "torch", "onnx")  # the keys of tools.inference.export_formats.FORMATS


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=path_argument, required=True, metavar="RUN", help="run folder or .pt file")
    add("--format", nargs="+", choices=FORMATS, default=FORMATS, help="formats to write (default: all)")
    add("--out", type=path_argument, metavar="FOLDER", help="output folder (default: export, beside the checkpoint)")
    add("--verify-images", type=int, default=256, metavar="N", help="images to verify on (default: %(default)s)")
    tolerance = (
        "largest allowed difference of logits (default: 1e-4, or a millionth of the largest logit if that is more)"
    )
    add("--tolerance", type=float, default=1e-4, help=tolerance)
    data = "converted data set, if it was moved since training"
    add("--data-path", type=path_text, metavar="FOLDER", help=data)
    return parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    check_positive(arguments, "verify_images")
    if not arguments.tolerance >= 0:
        raise UserError(f"--tolerance={arguments.tolerance} is not a number of at least 0; use 1e-4")
    from tools.inference.export_command import run

    return run(arguments)


if __name__ == "__main__":
    run_main(main)
