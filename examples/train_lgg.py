"""Train a U-Net to find brain tumours on MR slices: ``minunet train`` from a clone, without the command.

    python examples/train_lgg.py                                  on synthetic patients, minutes on a laptop
    python examples/train_lgg.py --data kaggle_3m --preset small  on LGG-MRI, on a laptop

All that it does stands in minunet/commands/train.py.
"""

import shlex
import sys

from minunet.base import cli
from minunet.commands.train import main

if __name__ == "__main__":
    program = shlex.join(["python", sys.argv[0]])
    sys.exit(cli.run(lambda arguments: main(arguments, program)))
