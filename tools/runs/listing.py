"""List names with a description: built-in and timm's models, optimizers, augmentations, configs and runs.

    zhu list models                     built-in models
    zhu list models 'timm/convnext*'    models of timm, by a shell pattern
    zhu list augmentations mix          settings whose name or description contains `mix`
    zhu list configs
    zhu list runs                       run folders, and those of sweeps, in --output; the latest is last

A terminal shows as much of a description as fits its width.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path

from configs.arguments import new_parser, parse
from configs.utils.console import terminal_width
from configs.utils.errors import UserError
from configs.utils.files import path_argument, read_small_text

Line = tuple[str, ...]  # the name first, the description last
BUILT_IN_OPTIMIZERS = {
    "adamw": "torch's Adam with decoupled weight decay",
    "sgd": "torch's stochastic gradient descent with (Nesterov) momentum",
    "adam": "torch's Adam, weight decay is added to the gradient",
    "rmsprop": "torch's RMSprop",
    "muon": "Muon for convolution filters, sgd with Nesterov momentum for all other parameters",
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    pattern = "shell pattern of the name, or text in the name or description"
    parser.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help=pattern)
    parser.add_argument(
        "--output", type=path_argument, default=Path("output"), help="folder of all runs (default: %(default)s)"
    )
    return parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    lines = [line for line in KINDS[arguments.kind](arguments) if matches(line, arguments.pattern)]
    if not lines:
        which = f" that match {arguments.pattern}" if arguments.pattern else ""
        if arguments.kind == "runs":
            which = f" in {arguments.output}{which}; name another folder with --output"
        raise UserError(f"there are no {arguments.kind}{which}")
    with suppress(BrokenPipeError):  # | head
        print(aligned(lines, terminal_width() if sys.stdout.isatty() else sys.maxsize))


def matches(line: Line, pattern: str) -> bool:
    """Return True if a shell pattern fits the name, or if the text is in the line. Case does not matter."""
    return fnmatch(line[0].lower(), pattern.lower()) or pattern.lower() in " ".join(line).lower()


def aligned(lines: list[Line], width: int) -> str:
    """Return the lines with their cells in columns. The last column is cut off at the width."""
    widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[:-1]]
    texts = ["  ".join([*map(str.ljust, line, widths), line[-1]]) for line in lines]  # map stops at the last column
    return "\n".join(text if len(text) <= width else f"{text[: width - 1]}…" for text in texts)


def first_sentence(text: str | None) -> str:
    """Return the first sentence of a text as one line."""
    return re.split(r"(?<=[^.\s]{2})\.(?:\s|$)", " ".join((text or "").split()), maxsplit=1)[0]


def models(arguments: argparse.Namespace) -> Iterator[Line]:
    from models.factory import MODELS

    for name, constructor in sorted(MODELS.items()):
        yield name, first_sentence(getattr(constructor, "func", constructor).__doc__)  # `func` of a partial
    if not arguments.pattern:
        yield "timm/NAME", "any model of timm; zhu list models 'timm/*' lists them"
        yield "FILE.py:NAME", "your own model, see docs/extend.md"
        return
    import timm

    for name in timm.list_models():
        yield f"timm/{name}", first_sentence(timm.model_entrypoint(name).__doc__)


def optimizers(arguments: argparse.Namespace) -> Iterator[Line]:
    import timm.optim

    yield from BUILT_IN_OPTIMIZERS.items()
    for name in map(str, timm.optim.list_optimizers()):
        prefix = "timm/" if name in BUILT_IN_OPTIMIZERS else ""
        yield f"{prefix}{name}", first_sentence(timm.optim.get_optimizer_info(name).description)


def augmentations(arguments: argparse.Namespace) -> Iterator[Line]:
    from configs.schema import all_settings, is_section

    for key, field in all_settings():
        if key.startswith("aug.") and not is_section(field):
            yield key, first_sentence(field.description)


def configs(arguments: argparse.Namespace) -> Iterator[Line]:
    import configs as package

    folder = Path("configs") if Path("configs").is_dir() else Path(package.__file__).parent
    for file in sorted(folder.glob("*.yaml")):
        comment = re.match(r"(?:#.*\n)*", read_small_text(file))
        yield str(file), first_sentence(re.sub(r"^# ?", "", comment[0] if comment else "", flags=re.MULTILINE))


def runs(arguments: argparse.Namespace) -> Iterator[Line]:
    from tools.runs.records import read_run, status, summarize_metrics

    found = []
    for file in [*arguments.output.glob("*/config.yaml"), *arguments.output.glob("*/*/config.yaml")]:
        metrics = file.with_name("metrics.jsonl")
        found.append(((metrics if metrics.exists() else file).stat().st_mtime, file.parent))
    for time_s, folder in sorted(found):
        date = f"{datetime.fromtimestamp(time_s):%Y-%m-%d %H:%M}"
        try:
            run = read_run(folder)
        except UserError as error:
            yield str(folder), "", "", date, str(error)
            continue
        best = summarize_metrics(run.metrics, run.config.eval.weights)["best_val_top1"]
        accuracy = "no accuracy" if best is None else f"best {100 * best:.2f} %"
        epochs = f"{run.epochs_trained} of {run.config.train.epochs} epochs"
        name = run.config.name or ""
        yield str(folder), epochs, accuracy, date, name if run.metrics else f"{name}, {status(run)}"


KINDS = {"models": models, "optimizers": optimizers, "augmentations": augmentations, "configs": configs, "runs": runs}
