"""Lab company: batch statistics at inference."""

import numpy as np

from minunet.exercises.exercise import Exercise, NotYet, require_equal
from minunet.exercises.learner import Learner
from minunet.exercises.starters import company as starter

_EPS = 1e-3


def check(learner: Learner) -> list[str]:
    """Raise NotYet unless prediction uses the running statistics, changes nothing, and training is as it was."""
    rng = np.random.default_rng(0)
    batches = 2 * rng.standard_normal((20, 4, 3, 3, 2)) + 1

    net, reference = learner.call("Net", 2), starter.Net(2)
    for x in batches:
        running = _probabilities(reference, x, reference.running_mean, reference.running_var)
        expected = starter.train_step(reference, x)
        require_equal(
            "the probabilities of train_step (it was right)",
            learner.call("train_step", net, x),
            expected,
            {"training uses the running statistics now: it was right with those of the batch": running},
        )
    for name in ("running_mean", "running_var"):
        require_equal(
            f"net.{name} after 20 training steps (it was right)", learner.attribute(net, name), getattr(reference, name)
        )

    x = 3 * rng.standard_normal((4, 3, 3, 2)) - 1
    mean, var = reference.running_mean, reference.running_var
    own_mean, own_var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    each = np.concatenate([_batch_probabilities(reference, image[None]) for image in x])
    found = learner.call("predict", net, x)
    require_equal(
        "predict",
        found,
        _probabilities(reference, x, mean, var),
        {
            "still the statistics of the batch: a slice is judged by its neighbours": _batch_probabilities(
                reference, x
            ),
            "each slice by its own statistics: the neighbours are gone, but the network has learned with other "
            "numbers": each,
            "the running mean with the variance of the batch": _probabilities(reference, x, mean, own_var),
            "the mean of the batch with the running variance": _probabilities(reference, x, own_mean, var),
            "no normalisation at all: the weights were learned behind one": _probabilities(
                reference, x, np.zeros(2), np.ones(2)
            ),
            "divided by the variance: the root is missing": _probabilities(reference, x, mean, var**2),
        },
    )
    for name in ("running_mean", "running_var"):
        if not np.array_equal(learner.attribute(net, name), getattr(reference, name)):
            raise NotYet(
                f"net.{name} after predict",
                expected="as it was before",
                found="other numbers",
                cause="predict updates the running statistics: then the order of the predictions counts",
            )
    alone = np.concatenate([learner.call("predict", net, image[None]) for image in x])
    require_equal("predict of the same images, one by one", alone, found, tolerance=1e-12)
    return [
        "that was the cause: forward's default is training, and predict did not say otherwise",
        "a slice gets the same probabilities alone and in company, and training is as it was",
    ]


def _probabilities(net: starter.Net, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    logits = (net.gamma * (x - mean) / np.sqrt(var + _EPS) + net.beta) @ net.weight
    result: np.ndarray = 1 / (1 + np.exp(-logits))
    return result


def _batch_probabilities(net: starter.Net, x: np.ndarray) -> np.ndarray:
    return _probabilities(net, x, x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2)))


EXERCISE = Exercise(
    name="company",
    title="a slice is judged by its neighbours",
    functions=("Net", "forward", "train_step", "predict"),
    hints=(
        "Through which line can one slice of a batch have any influence on another?",
        "Batch norm has two ways to get a mean and a variance. Which one does predict take, and who decides that?",
        "forward's argument training is True if nothing is said. predict has to say training=False. (minunet's own "
        "forward "
        "has no default there, so that nobody can forget it.)",
    ),
    check=check,
)
