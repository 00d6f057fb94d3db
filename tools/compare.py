"""Compare several runs: plot their curves together, and tabulate their settings and results.

    zhu compare output/cifar10_alexnet output/cifar10_lenet output/cifar10_resnet18
    zhu compare output/cifar10_lenet-sweep --out output/learning_rates

A folder that contains runs selects all of them. Unfinished runs are shown up to their latest epoch. The tool prints the
table and writes to --out: comparison.png (loss and accuracy, train and validation), comparison.csv (one row per run)
and curves.csv (one row per run and epoch). The time_ratio of a run is its training time divided by the first run's, if
both have finished.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from configs.arguments import new_parser, parse
from configs.utils.console import counted, terminal_width
from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument
from tools.common import tables


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=path_argument, metavar="RUN", help="run folders, or folders that contain them"
    )
    parser.add_argument(
        "--out", type=path_argument, default=Path("output/comparison"), help="output folder (default: %(default)s)"
    )
    parser.add_argument("--labels", nargs="+", metavar="TEXT", help="names of the runs, in the same order")
    return parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    from tools.runs.curve_plot import plot_curves
    from tools.runs.records import comparison_rows, curve_rows, find_runs, read_run, run_labels
    from train.reporting import figures

    records = [read_run(folder) for folder in find_runs(arguments.runs)]
    names = arguments.labels or run_labels(records)
    if len(names) != len(records) or len(set(names)) != len(names):
        listed = ", ".join(str(record.folder) for record in records)
        raise UserError(
            f"--labels gives {len(names)} names for {len(records)} runs; give a different one for each of {listed}"
        )
    out = tables.make_folder(arguments.out)
    rows = comparison_rows(records, names)
    tables.write_csv(out / "comparison.csv", rows)
    tables.write_csv(out / "curves.csv", curve_rows(records, names))
    figures.save(plot_curves(records, names, counted(len(records), "run")), out / "comparison.png")
    print(tables.runs_table(rows, terminal_width(), always=("best_val_top1",)))
    if "batch_per_rank" in rows[0]:
        print("The batch is per rank, since not every run has recorded its global batch.")
    print(f"{out}/comparison.png, comparison.csv, curves.csv")


if __name__ == "__main__":
    run_main(main)
