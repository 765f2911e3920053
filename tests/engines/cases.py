"""What the tests of both engines share."""

from minunet import engines
from minunet.data.normalize import Normalization
from minunet.training.loop import Hooks, TrainingData, fit

#: The image sizes of the presets, and two that the engines' bands, tiles and blocks do not divide: odd multiples of 4.
USED = [(128, 128), (224, 224), (256, 256), (132, 236), (148, 124)]


def train(net, slices, config, folder, device="cpu", choice="auto", precision="float32", should_stop=None, **options):
    """A training with the engine that ``minunet.engines`` builds for it, as examples/train_lgg.py does."""
    train_slices, validation = slices
    size = train_slices.images.shape[1:3]
    data, hooks = TrainingData(train_slices, validation, Normalization()), Hooks(should_stop)
    with engines.build(net, config.loss, config.batch_size, size, device, choice, precision) as engine:
        return fit(engine, data, config, folder, hooks=hooks, progress_bar=False, **options)
