"""A training with the engine that ``minunet.engines`` builds for it, as examples/train_lgg.py does."""

from minunet import engines
from minunet.data.normalize import Normalization
from minunet.training.loop import Hooks, TrainingData, fit


def train(net, slices, config, folder, device="cpu", choice="auto", precision="float32", should_stop=None, **options):
    train_slices, validation = slices
    size = train_slices.images.shape[1:3]
    data, hooks = TrainingData(train_slices, validation, Normalization()), Hooks(should_stop)
    with engines.build(net, config.loss, config.batch_size, size, device, choice, precision) as engine:
        return fit(engine, data, config, folder, hooks=hooks, progress_bar=False, **options)
