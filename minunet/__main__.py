"""``minunet COMMAND ...``, or ``python -m minunet COMMAND ...``: every command of the package.

Each command is a module with ``main(arguments, program)``, imported when it is asked for: the others cost nothing.
"""

import sys
from functools import partial
from importlib import import_module
from pathlib import Path

from minunet.base import cli
from minunet.base.errors import UserError
from minunet.base.version import __version__

#: The module of each command, and what it does.
COMMANDS = {
    "train": ("minunet.commands.train", "train a U-Net, on synthetic patients or on a folder of images and masks"),
    "predict": ("minunet.commands.predict", "find in images what a network was trained to find"),
    "evaluate": ("minunet.commands.evaluate", "score a network on images with masks"),
    "verify": ("minunet.data.verify", "look through a folder of images and masks before training"),
    "summary": ("minunet.summary", "what a U-Net is made of, layer by layer, and what it costs"),
    "gradcheck": ("minunet.gradcheck", "check every gradient against two other ways of differentiating"),
    "exercises": ("minunet.exercises.__main__", "write backward passes, find planted bugs"),
}


def main(arguments: list[str]) -> None:
    """Run the command that the first argument names."""
    program = "python -m minunet" if Path(sys.argv[0]).name == "__main__.py" else "minunet"
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items())
    if arguments[:1] == ["--version"]:
        print(f"minunet {__version__}")
    elif not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {program} COMMAND ...\n\n{listing}\n\nWhat each takes: {program} COMMAND --help")
    elif arguments[0] in COMMANDS:
        name, *rest = arguments
        import_module(COMMANDS[name][0]).main(rest, f"{program} {name}")
    else:
        raise UserError(f"COMMAND: there is no {arguments[0]!r}, choose one of {', '.join(COMMANDS)}")


run = partial(cli.run, main)  # what the installed command calls

if __name__ == "__main__":
    sys.exit(run())
