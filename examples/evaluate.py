"""Score a trained network on images with masks: ``minunet evaluate`` from a clone, without the command.

    python examples/evaluate.py runs/small/best.npz kaggle_3m --output scores

All that it does stands in minunet/commands/evaluate.py.
"""

import shlex
import sys

from minunet.base import cli
from minunet.commands.evaluate import main

if __name__ == "__main__":
    program = shlex.join(["python", sys.argv[0]])
    sys.exit(cli.run(lambda arguments: main(arguments, program)))
