"""Write the documents of benchmark runs: DEVICE.md and .png, and the tables in docs/benchmarks/README.md.

zhu report              update the documents and README.md in docs/benchmarks from its JSON files
zhu report --check      exit with code 1 if the tables in README.md differ from the JSON files
"""

from __future__ import annotations

import argparse
from pathlib import Path

from configs.arguments import new_parser, parse
from configs.utils.errors import run_main
from configs.utils.files import path_argument

ROOT = Path(__file__).parents[1]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--folder", type=path_argument, default=ROOT / "docs" / "benchmarks", help="folder of the JSON files"
    )
    parser.add_argument("--readme", type=path_argument, default=ROOT / "docs" / "benchmarks" / "README.md")
    parser.add_argument(
        "--check", action="store_true", help="only compare the tables of docs/benchmarks/README.md with the JSON files"
    )
    return parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    from tools.benchmarks.documents import run

    return run(arguments)


if __name__ == "__main__":
    run_main(main)
