"""The program `zhu`: run a command of this project by name, with the arguments of its program in train or tools."""

from __future__ import annotations

import os
import re
import sys
from difflib import get_close_matches
from importlib import import_module

from configs.arguments import new_parser, parse
from configs.utils.errors import run_main

# Module and description of each command.
COMMANDS = {
    "convert": ("tools.convert", "convert a data set into shards, or verify a converted one"),
    "train": ("train.ddp", "train or evaluate a config"),
    "find-lr": ("tools.find_lr", "find a learning rate with a range test"),
    "sweep": ("tools.sweep", "train one run per combination of settings"),
    "compare": ("tools.compare", "compare runs: curves, settings and results"),
    "show": ("tools.show", "plot predictions, augmented samples or a data set"),
    "predict": ("tools.predict", "predict a split or your own pictures"),
    "export": ("tools.export", "export a model to safetensors, torch.export and ONNX"),
    "summary": ("tools.summary", "compare parameters, FLOPs and memory of models"),
    "benchmark": ("tools.benchmark", "measure images/s, the largest batch size and the time of a step"),
    "speedrun": ("tools.speedrun", "train with several seeds, and report accuracy and time"),
    "report": ("tools.report", "write the documents of benchmark runs"),
    "list": ("tools.runs.listing", "list models, optimizers, augmentations, configs or runs"),
}


def main() -> None:
    """Run the command that the first argument names, and exit with its exit status."""
    lines = [f"  {name:<9}  {description}" for name, (_, description) in COMMANDS.items()]
    parser = new_parser("\n".join(["Convert data, train image classifiers, and use them.", "", "commands:", *lines]))
    parser.prog = "zhu"
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="zhu COMMAND --help shows its arguments")
    typed = sys.argv[1] if len(sys.argv) > 1 else ""
    if typed not in COMMANDS and (near := get_close_matches(typed, COMMANDS, n=1)):
        parser.error(f"{typed!r} is not a command; did you mean {near[0]}?")
    name = completed_command() or parse(parser, sys.argv[1:2]).command
    sys.argv = [f"zhu {name}", *sys.argv[2:]]
    module = import_module(COMMANDS[name][0])
    if name == "train":
        module.launch()
    else:
        run_main(module.main)


def completed_command() -> str | None:
    """Return the command whose arguments the shell asks to complete, or None.

    The shell gives the line up to the cursor in the environment, see `argcomplete`.
    """
    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", 0))]
    found = re.match(r"\s*\S+\s+(\S+)\s", line)
    if "_ARGCOMPLETE" not in os.environ or found is None or found[1] not in COMMANDS:
        return None
    os.environ["_ARGCOMPLETE"] = "2"  # the parser's program is the second word
    return found[1]


if __name__ == "__main__":
    main()
