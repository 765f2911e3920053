"""What the CPU engine can take, and the engine."""

from minunet.engines.cpu.engine import CpuEngine
from minunet.engines.memory import StepBytes, training_bytes
from minunet.network.loss import Loss
from minunet.network.unet import UNet


def unsupported(net: UNet, loss: Loss, max_batch: int, image_size: tuple[int, int], precision: str) -> str | None:
    """Why the engine cannot take this network, or None."""
    config = net.config
    if config["up_kernel"] not in (2, 3):
        return f"the CPU engine has transposed convolutions of 2 x 2 and 3 x 3, not of {config['up_kernel']}"
    multiple = 2**net.depth
    if image_size[0] % multiple or image_size[1] % multiple:
        return f"images of {image_size[0]} x {image_size[1]} are not a multiple of {multiple}"
    return None


def build(net: UNet, loss: Loss, max_batch: int, image_size: tuple[int, int], precision: str) -> CpuEngine:
    """The engine, with a process for each core."""
    return CpuEngine(net, loss, max_batch, image_size)


def step_bytes_here(precision: str) -> StepBytes:
    """How much memory a step needs: no more than on the plain path."""
    return training_bytes
