"""``python -m docs.figures [NAME ...] [--out DIR] [--tiny]``: draw the pictures of the course."""

import importlib
import sys
import time
from pathlib import Path

import matplotlib

from docs.figures import style
from minunet.base import cli
from minunet.base.durable import write_text
from minunet.base.errors import UserError

#: The files that draw, in the order of the course.
NAMES = (
    "conv2d",
    "conv_transpose2d",
    "unet_shapes",
    "receptive_field",
    "backward_graph",
    "gradient_flow_skip",
    "gradient_norms",
    "step_size",
    "loss_surface",
    "predictions_over_epochs",
    "feature_maps",
    "per_patient",
    "mask_not_augmented",
    "slice_leak",
    "winograd_error",
)
PICTURES = Path(__file__).parents[1] / "pictures"


def build(name: str, out: Path, tiny: bool = False) -> list[str]:
    """Draw what ``name``.py draws into ``out``, and write the numbers in it to ``name``.txt. Returns its lines."""
    module = importlib.import_module(f"docs.figures.{name}")
    with matplotlib.rc_context(style.RC):
        lines: list[str] = module.build(out, tiny)
    write_text(out / f"{name}.txt", "\n".join([f"python -m docs.figures {name}", "", *lines, ""]))
    return lines


def main(arguments: list[str]) -> None:
    """Build the pictures that are named, or all."""
    parser = cli.Parser(prog="python -m docs.figures", description="Draw the pictures of the course.")
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"left out: all of {', '.join(NAMES)}")
    parser.add_argument("--out", metavar="DIR", type=Path, default=PICTURES, help="left out: docs/pictures")
    parser.add_argument(
        "--tiny", action="store_true", help="too small to mean anything, in seconds: does it still run?"
    )
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in NAMES]:
        raise UserError(f"{unknown[0]}: no such picture, choose from {', '.join(NAMES)}")
    for name in options.names or NAMES:
        start = time.process_time()
        lines = build(name, options.out, options.tiny)
        print(f"== {name} ({time.process_time() - start:.0f} s)", *lines, sep="\n   ", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
