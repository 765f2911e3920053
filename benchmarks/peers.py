"""The processes that benchmarks/train_step.py times: minunet, and PyTorch in each of its layouts.

    python benchmarks/peers.py minunet|channels-last|nchw CASE     (CASE: the JSON of a case and its options)

A peer builds the network of the case, with weights that a seed says, and then answers requests, each a line of JSON:
``{"steps": 3}`` with the seconds of each step; ``{"gradients": FILE}`` by writing the loss and all gradients of a
step there; ``{"compare": [FILE, FILE]}`` with how far they are apart, parameter by parameter.

A step is the forward pass, the loss (binary cross entropy + Dice), the backward pass, AdamW, and the running
statistics of batch norm; in inference, the forward pass and a sigmoid.

PyTorch's transposed convolution is the usual one, ``padding=1, output_padding=1``: it drops the first row and column,
where minunet, as Keras, drops the last. Turned upside down and left to right, images, masks and kernels, the network is
minunet's: so it is turned here, and the gradients turned back, and what is timed is exactly what is compared.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minunet.base.rng import Key
from minunet.network.bridge import from_torch_names, to_torch_names
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.training.optim import AdamW


class Case(NamedTuple):
    """What is computed, and on how many cores: those that the process was started on."""

    name: str
    width: int  # of the first level; four more double it
    size: int  # pixels a side
    batch: int
    training: bool = True
    dropout: float = 0.0
    cores: int = 2
    engine: str = "auto"


class Peer:
    """One implementation at work on a case."""

    version: str

    def __init__(self, case: Case) -> None:
        self.case = case
        self.net = UNet(widths=tuple(case.width << level for level in range(5)), dropout=case.dropout, seed=0)
        generator = np.random.default_rng(1)
        shape = (case.batch, case.size, case.size)
        self.x = generator.standard_normal((*shape, 3), dtype=np.float32)
        self.target = (generator.random((*shape, 1)) > 0.9).astype(np.float32)

    def step(self) -> None:
        """One step of training, or of inference."""
        raise NotImplementedError

    def gradients(self) -> dict[str, np.ndarray]:
        """The loss and the gradients of a training step at the first weights, without dropout's own chance."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave nothing behind."""


class Minunet(Peer):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        from minunet import engines

        size = (case.size, case.size)
        self.engine = engines.build(self.net, SegmentationLoss(), case.batch, size, choice=case.engine)
        why = f" ({self.engine.reason})" if self.engine.reason else ""
        self.version = f"minunet, engine {self.engine.name}{why}, NumPy {np.__version__}"
        self.optimizer = self.engine.optimizer(self.net.parameters(), AdamW({}).lr) if case.training else None
        if not case.training:
            self.engine.freeze()  # as minunet.results.prediction.Predictor does
        self.steps = 0

    def step(self) -> None:
        if self.optimizer is None:
            self.engine.predict(self.x)
            return
        _, grads, statistics = self.engine.loss_and_grads(self.x, self.target, Key(seed=0, step=self.steps))
        self.optimizer.step(grads)
        self.engine.update_running_stats(statistics, 0.99)
        self.steps += 1

    def gradients(self) -> dict[str, np.ndarray]:
        if not self.case.training:
            return {"probabilities": self.engine.predict(self.x)}
        loss, grads, _ = self.engine.loss_and_grads(self.x, self.target, Key(seed=0))
        return {"loss": np.array(loss, np.float32), **grads}

    def close(self) -> None:
        self.engine.close()


class Torch(Peer):
    def __init__(self, case: Case, channels_last: bool) -> None:
        super().__init__(case)
        import torch  # type: ignore[import-not-found, unused-ignore]
        from torch_unet import TorchUNet

        torch.set_num_threads(case.cores)
        self.torch = torch
        self.version = f"PyTorch {torch.__version__}"
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.module = TorchUNet(self.net.config["widths"], case.dropout).train(case.training)
        state = to_torch_names(self.net.parameters() | self.net.buffers())
        self.module.load_state_dict({name: torch.from_numpy(turned(array)) for name, array in state.items()})
        self.module.to(memory_format=self.layout)
        self.inputs, self.targets = (
            torch.from_numpy(np.ascontiguousarray(images[:, ::-1, ::-1].transpose(0, 3, 1, 2))).contiguous(
                memory_format=self.layout
            )
            for images in (self.x, self.target)
        )
        defaults = AdamW({})
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), defaults.lr, defaults.betas, defaults.eps, defaults.weight_decay
        )
        del self.net  # its memory is not PyTorch's

    def step(self) -> None:
        if not self.case.training:
            self.probabilities()
            return
        self.optimizer.zero_grad()
        self.loss(None).backward()
        self.optimizer.step()

    def probabilities(self) -> Any:
        with self.torch.inference_mode():
            return self.torch.sigmoid(self.module(self.inputs))

    def loss(self, key: Key | None) -> Any:
        logits = self.module(self.inputs, key)
        probabilities = self.torch.sigmoid(logits)
        overlap = (probabilities * self.targets).sum()
        dice = (2 * overlap + 1) / (probabilities.sum() + self.targets.sum() + 1)
        bce = self.torch.nn.functional.binary_cross_entropy_with_logits(logits, self.targets)
        return bce + 1 - dice

    def gradients(self) -> dict[str, np.ndarray]:
        if not self.case.training:
            return {"probabilities": self.probabilities().permute(0, 2, 3, 1).numpy()[:, ::-1, ::-1]}
        loss = self.loss(Key(seed=0))
        loss.backward()
        found = {name: turned(p.grad.numpy()) for name, p in self.module.named_parameters()}
        return {"loss": loss.detach().numpy(), **from_torch_names(found)}


def turned(array: np.ndarray) -> np.ndarray:
    """A kernel (.., .., KH, KW) turned by half a turn; anything else as it is."""
    return np.ascontiguousarray(array[:, :, ::-1, ::-1]) if array.ndim == 4 else array


PEERS: dict[str, Callable[[Case], Peer]] = {
    "minunet": Minunet,
    "channels-last": lambda case: Torch(case, channels_last=True),
    "nchw": lambda case: Torch(case, channels_last=False),
}


def write(arrays: dict[str, np.ndarray], path: str) -> dict[str, list[int]]:
    """All values as float32, one array after the other by name. Returns the shapes, in that order."""
    ordered = {name: np.ascontiguousarray(arrays[name], np.float32) for name in sorted(arrays)}
    with Path(path).open("wb") as file:
        for array in ordered.values():
            file.write(array.tobytes())
    return {name: list(array.shape) for name, array in ordered.items()}


def compare(paths: list[str], shapes: dict[str, list[int]]) -> dict[str, float]:
    """For each array the distance of two files' values: |a - b| / |b|, of vectors.

    A bias before a batch norm has gradient 0, and what is there is rounding: no array counts as shorter than a
    ten-thousandth of all together.
    """
    ours, theirs = (np.fromfile(path, np.float32).astype(np.float64) for path in paths)
    least = 1e-4 * np.linalg.norm(theirs)
    distances, start = {}, 0
    for name, shape in shapes.items():
        part = slice(start, start + int(np.prod(shape)))
        start = part.stop
        distances[name] = float(np.linalg.norm(ours[part] - theirs[part]) / max(np.linalg.norm(theirs[part]), least))
    return distances


def answer(peer: Peer, request: dict[str, Any]) -> Any:
    if "gradients" in request:
        return write(peer.gradients(), request["gradients"])
    if "compare" in request:
        return compare(request["compare"], request["shapes"])
    seconds = []
    for _ in range(request["steps"]):
        started = time.perf_counter()
        peer.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def main(kind: str, case: Case) -> None:
    peer = PEERS[kind](case)
    print(json.dumps(peer.version), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(peer, json.loads(line))), flush=True)
    peer.close()


if __name__ == "__main__":
    main(sys.argv[1], Case(**json.loads(sys.argv[2])))
