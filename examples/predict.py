"""Find in new images what a network was trained to find: ``minunet predict`` from a clone, without the command.

    python examples/predict.py runs/quick/best.npz slice.png --output out

All that it does stands in minunet/commands/predict.py.
"""

import shlex
import sys

from minunet.base import cli
from minunet.commands.predict import main

if __name__ == "__main__":
    program = shlex.join(["python", sys.argv[0]])
    sys.exit(cli.run(lambda arguments: main(arguments, program)))
