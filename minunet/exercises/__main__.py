"""``python -m minunet.exercises``: list the exercises, begin one, get a hint, have a solution checked.

    python -m minunet.exercises                         the list
    python -m minunet.exercises start relu              writes relu.py, to be edited
    python -m minunet.exercises relu [FILE]             checks FILE (relu.py, if left out)
    python -m minunet.exercises relu --hint 1           a hint; 2 says more, 3 nearly all

Exit code 0: right. 1: not yet; what was expected, what came, and the likely cause are printed. 2: no such exercise or
file, or the file does not run: one line.
"""

import importlib
import sys
from pathlib import Path

from minunet.base import cli
from minunet.base.errors import UserError
from minunet.exercises.exercise import Exercise, NotYet
from minunet.exercises.learner import Learner

BACKWARD = ("relu", "max_pool2d", "conv2d_dweight", "conv2d_dx", "batch_norm2d", "skip", "dice_loss", "adamw")
LABS = ("shifted", "astray", "deaf", "smeared", "negative", "company", "timid", "stubborn")
STARTERS = Path(__file__).with_name("starters")


def main(arguments: list[str], program: str = "python -m minunet.exercises") -> None:
    """Do what the command line says; ``program`` is how it begins."""
    if arguments[:1] == ["start"]:
        parser = cli.Parser(prog=f"{program} start", description="Write the file to begin with.")
        parser.add_argument("name", metavar="NAME", help="the exercise")
        parser.add_argument("--to", type=Path, metavar="FILE", help="where to (default: NAME.py)")
        options = parser.parse_args(arguments[1:])
        start(find(options.name), options.to)
        return

    description = (__doc__ or "").replace("python -m minunet.exercises", program)
    parser = cli.Parser(prog=program, description=description)
    parser.add_argument("name", metavar="NAME", nargs="?", help="the exercise; left out: the list of all")
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, help="the solution (default: NAME.py)")
    parser.add_argument("--hint", type=cli.integer(1, 3), metavar="1..3", help="print a hint")
    options = parser.parse_args(arguments)
    if options.name is None:
        if options.hint:
            raise UserError("--hint: of which exercise? give its NAME first")
        print(listing())
    elif options.hint:
        print(f"{options.name}, hint {options.hint} of 3: {find(options.name).hints[options.hint - 1]}")
    else:
        exercise = find(options.name)
        check(exercise, options.file or Path(f"{exercise.name}.py"))


def find(name: str) -> Exercise:
    """The exercise of this name. Raises UserError if there is none."""
    if name not in (*BACKWARD, *LABS):
        raise UserError(f"NAME: there is no exercise {name!r}, choose one of {', '.join((*BACKWARD, *LABS))}")
    exercise: Exercise = importlib.import_module(f"minunet.exercises.{name}").EXERCISE
    return exercise


def listing() -> str:
    """All exercises, one a line."""
    lines = ["Write a backward pass, and have it checked:", ""]
    lines += [f"  {name:<15} {find(name).title}" for name in BACKWARD]
    lines += [
        "",
        "Break it: working-looking code, and something is wrong. Run it, see the symptom, mend the cause:",
        "",
    ]
    lines += [f"  {name:<15} {find(name).title}" for name in LABS]
    return "\n".join([*lines, "", "Begin with: python -m minunet.exercises start relu"])


def start(exercise: Exercise, target: Path | None) -> None:
    """Write the starter. Raises UserError if the file is there already: it may hold somebody's work."""
    path = target or Path(f"{exercise.name}.py")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write((STARTERS / f"{exercise.name}.py").read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"{path}: is there already, choose another file with --to") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}), choose another file with --to") from None
    print(f"{path}: edit it, then run: python -m minunet.exercises {exercise.name} {path}")
    if exercise.name in LABS:
        print(f"to see the symptom: python {path}")


def check(exercise: Exercise, path: Path) -> None:
    """Say what is right, or leave with exit code 1 and what is not."""
    learner = Learner(path, exercise.functions)
    try:
        found = exercise.check(learner)
    except NotYet as error:
        print(f"{exercise.name}: not yet\n\n{error}\n\nstuck? python -m minunet.exercises {exercise.name} --hint 1")
        raise SystemExit(1) from None
    print("\n".join([f"{exercise.name}: right", "", *(f"  {line}" for line in found)]))


if __name__ == "__main__":
    sys.exit(cli.run(main))
