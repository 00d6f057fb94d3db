"""Print settings as a Markdown table.

python -m configs.schema                  # all settings
python -m configs.schema train.optimizer  # a section or a setting
python -m configs.schema lr '*.epochs'    # settings whose key contains a text or matches a pattern
"""

import argparse

from configs.schema import Config
from configs.schema.documentation import markdown_table
from configs.utils.errors import run_main


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m configs.schema", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", nargs="*", metavar="SECTION|PATTERN", help="settings to print (default: all)")
    print(markdown_table(Config, parser.parse_args().which))
    return 0


if __name__ == "__main__":
    run_main(main)
