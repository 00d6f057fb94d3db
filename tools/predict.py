"""Predict the classes of a split or of your own pictures, with one checkpoint or the average of several.

    python tools/predict.py --checkpoint output/medium_imagenet_96_resnet18 --split test
    python tools/predict.py --checkpoint output/run output/run-2 --split val --tta flip
    python tools/predict.py --checkpoint output/run --split photos/holiday --top-k 3
    python tools/predict.py --checkpoint output/run --split test --sample-submission sample.csv --out result

For one checkpoint, a split's loss, top1 and top5 equal those of `train/ddp.py --eval`. Pictures (image files in a
folder, at any depth) are first converted like the checkpoint's data set. If a split and a folder have the same name,
NAME selects the split and ./NAME selects the folder.

These files are written to --out, with images in stored order. `row` is the row of an image in the source, counted from
0. For pictures, it is the position in the sorted list of paths.

    predictions.npz  logits float32 [N, C], labels int64 [N] (-1: unknown), rows int64 [N], classes, top_classes int64
                     [N, K] and top_probabilities float32 [N, K]; for several checkpoints, logits are the logarithm of
                     the mean probabilities
    predictions.csv  per image: row, file, label, class number, then the best classes and their probabilities
    metrics.json     loss, top1, top5 (null without labels), samples, checkpoints, images without a prediction
    submission.csv   Id and class number of every row of the source; by default only for split test, see --submission

Images that cannot be read are reported and listed in metrics.json. A submission is then refused unless --fill gives
their class, since leaving them out would shift all later ids.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument, path_text
from tools.common.cli import check_positive, flag_name
from tools.common.tables import make_folder, write_json, write_text
from tools.inference import submission
from tools.inference.ensemble import predict, top_classes
from tools.inference.image_sets import ImageSet, dataset_folder, find_picture_folder, open_images
from tools.inference.prediction_files import build_metrics, format_table, write_arrays
from tools.inference.trained_model import TrainedModel, check_same_classes, load_trained_model
from train.distributed.process_group import Ranks, process_group

MAX_SHOWN = 5


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    runs = "run folders (best.pt, else last.pt) or .pt files; several are averaged"
    add("--checkpoint", nargs="+", required=True, type=path_argument, metavar="RUN", help=runs)
    split = "split, or folder of pictures"
    add("--split", type=path_text, required=True, metavar="test|val|train|FOLDER", help=split)
    add("--data-path", type=path_text, metavar="DIR", help="converted data set (default: the checkpoint's)")
    tta = "test-time augmentation (default: the checkpoint's eval.tta)"
    add("--tta", choices=["none", "flip", "flip-translate"], help=tta)
    batch_size = "images per batch (default: the checkpoint's for evaluation)"
    add("--batch-size", type=int, metavar="N", help=batch_size)
    add("--top-k", type=int, default=5, metavar="K", help="number of best classes to list (default: %(default)s)")
    out = "output folder (default: RUN/predictions-SPLIT or RUN/pictures-NAME)"
    add("--out", type=path_argument, metavar="FOLDER", help=out)
    add = parser.add_argument_group("submission").add_argument
    file = "file to write (default: OUT/submission.csv for split test, none otherwise)"
    add("--submission", type=path_text, metavar="FILE|none", help=file)
    add("--sample-submission", type=path_argument, metavar="FILE", help="CSV file to take columns and ids from")
    add("--id-start", type=int, choices=[0, 1], help="first id (default: 1)")
    add("--id-column", metavar="NAME", help=f"name of the id column (default: {submission.ID_COLUMN})")
    category = f"name of the class column (default: {submission.CATEGORY_COLUMN})"
    add("--category-column", metavar="NAME", help=category)
    add("--fill", type=int, metavar="CLASS", help="class number for images that cannot be read")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    check_positive(arguments, "top_k", "batch_size")
    ranks = Ranks.alone("tools/predict.py")
    with process_group(ranks) as device:
        models = [load_trained_model(path, device, compiled=True) for path in arguments.checkpoint]
        for other in models[1:]:
            check_same_classes(models[0], other.dataset.classes, f"checkpoint {other.path}")
        pictures = find_picture_folder(arguments.split, dataset_folder(models[0], arguments.data_path))
        out = make_folder(arguments.out or default_folder(models[0].path, arguments.split, pictures))
        with open_images(arguments.split, pictures, models, arguments.data_path, out) as images:
            run(arguments, models, images, out)


def run(arguments: argparse.Namespace, models: Sequence[TrainedModel], images: ImageSet, out: Path) -> None:
    """Predict the images, write all output files, and print the results."""
    classes = models[0].dataset.classes
    file = submission_file(arguments, images, out)
    form = None
    if file is not None:  # refuse before predicting
        form = submission.build_form(
            images,
            len(classes),
            sample=arguments.sample_submission,
            id_start=arguments.id_start,
            id_column=arguments.id_column,
            category_column=arguments.category_column,
            fill=arguments.fill,
        )
    for sample in images.unreadable[:MAX_SHOWN]:
        print(f"no prediction for row {sample.row}, {sample.name}: {sample.reason}", file=sys.stderr)
    if (hidden := len(images.unreadable) - MAX_SHOWN) > 0:
        print(f"no prediction for {hidden:,} more, all listed in {out / 'metrics.json'}", file=sys.stderr)

    logits, each, mean = predict(models, images, arguments.tta, arguments.batch_size)
    numbers, probabilities = top_classes(logits, min(arguments.top_k, len(classes)))
    write_arrays(out / "predictions.npz", images, classes, logits, numbers, probabilities)
    write_text(out / "predictions.csv", format_table(images, numbers, probabilities, classes))
    metrics = {"split": arguments.split, **build_metrics(models, images, arguments.tta, each, mean)}
    write_json(out / "metrics.json", metrics)
    if mean is not None:
        for model, result in zip(models, each, strict=True):
            print(f"{model.title}: {result.sentence(images.split)}")
        if len(models) > 1:
            print(f"average of {len(models)} checkpoints: {mean.sentence(images.split)}")
    unreadable = f"; {len(images.unreadable):,} more cannot be read" if images.unreadable else ""
    print(f"{out}: predictions of {len(images):,} images in predictions.npz and .csv{unreadable}")
    if form is not None and file is not None:
        print(submission.write_submission(file, form, images, numbers[:, 0], len(classes)))


def default_folder(checkpoint: Path, split: str, pictures: Path | None) -> Path:
    """Return the default output folder, which is in the folder of the checkpoint.

    Names for splits and for folders of pictures have different prefixes, so that they never coincide.
    """
    name = f"predictions-{split}" if pictures is None else f"pictures-{pictures.resolve().name}"
    return checkpoint.parent / name


def submission_file(arguments: argparse.Namespace, images: ImageSet, out: Path) -> Path | None:
    """Return the path of the submission file and create its folder, or return None if no submission is written.

    Raises:
        UserError: Submission options are given without a submission, the folder is not writable, or the path is a
            folder or the sample submission.
    """
    if arguments.submission == "none" or (arguments.submission is None and images.split != "test"):
        options = ("sample_submission", "id_start", "id_column", "category_column", "fill")
        given = [name for name in options if getattr(arguments, name) is not None]
        if given:
            raise UserError(
                f"{flag_name(given[0])} belongs to a submission, which is written by default only for split test; give "
                "--submission FILE"
            )
        return None
    file = Path(arguments.submission) if arguments.submission else out / "submission.csv"
    make_folder(file.parent)
    sample: Path | None = arguments.sample_submission
    if file.is_dir() or (sample is not None and file.resolve() == sample.resolve()):
        what = "a folder" if file.is_dir() else "the sample submission itself"
        raise UserError(f"--submission {file} is {what}; give another file to write")
    return file


if __name__ == "__main__":
    run_main(main)
