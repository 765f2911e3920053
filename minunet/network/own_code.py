"""Is this the network that the package has? Engines, checkpoints and the bridge to PyTorch have to know.

A network with a block of one's own, a method that was replaced on an object, or another loss is no wrong network: the
plain path trains it. But an engine computes the package's U-Net and nothing else, and a file that says "UNet" must not
be loaded as one if other code wrote it. What cannot be seen here, such as an op that was edited,
:mod:`minunet.engines.selfcheck` finds.
"""

from typing import Any

from minunet.network.blocks import DoubleConv, Down, Up
from minunet.network.layers import BatchNorm2d, Conv2d, ConvTranspose2d, Dropout, Layer
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet

KNOWN = (UNet, Down, Up, DoubleConv, Conv2d, ConvTranspose2d, BatchNorm2d, Dropout)


def own_code(net: UNet) -> str | None:
    """What in ``net`` is not the package's own code, in words; None if everything is.

    >>> class LeakyUNet(UNet):
    ...     pass
    >>> own_code(UNet(widths=(2, 3))), own_code(LeakyUNet(widths=(2, 3)))
    (None, 'the network is a LeakyUNet')
    """
    if found := _own("the network", net, KNOWN):
        return found
    return next((found for name, layer in _within(net).items() if (found := _own(name, layer, KNOWN))), None)


def own_loss(loss: object) -> str | None:
    """As :func:`own_code`, of a loss that is to be a ``SegmentationLoss``."""
    return _own("the loss", loss, (SegmentationLoss,))


def own_settings(net: UNet) -> str | None:
    """Which layer of a ``UNet`` has another setting than ``net.config`` gives it; None if none has.

    >>> net = UNet(widths=(2, 3))
    >>> net.bottleneck.norm1.eps = 0.1
    >>> own_settings(net)
    'bottleneck.norm1 has eps 0.1, not 0.001'
    """
    config = net.config
    expected: dict[type, dict[str, Any]] = {
        Conv2d: {"stride": 1, "padding": "same"},
        ConvTranspose2d: {"stride": 2, "padding": "same"},
        BatchNorm2d: {"eps": config["batch_norm_eps"]},
        Dropout: {"rate": config["dropout"]},
    }
    for name, layer in _within(net).items():
        for setting, value in expected.get(type(layer), {}).items():
            if getattr(layer, setting) != value:
                return f"{name} has {setting} {getattr(layer, setting)}, not {value}"
    return None


def class_name(which: type) -> str:
    """The name by which a file remembers a class.

    >>> class_name(SegmentationLoss)
    'minunet.network.loss.SegmentationLoss'
    """
    return f"{which.__module__}.{which.__qualname__}"


def _own(name: str, thing: object, known: tuple[type, ...]) -> str | None:
    """What of ``thing`` is not of a known class: the class itself, or a method that the object has of its own."""
    if type(thing) not in known:
        return f"{name} is a {type(thing).__name__}"
    replaced = [attribute for attribute in vars(thing) if callable(getattr(type(thing), attribute, None))]
    return f"{name} has a {replaced[0]} of its own" if replaced else None


def _within(net: UNet) -> dict[str, Layer]:
    """Every layer in the network that a step goes through, by name: the parts, their blocks, and what those are of."""
    found: dict[str, Layer] = {}
    for part, layer in net.parts():
        found[part.name] = layer
        if isinstance(layer, Down | Up):
            found |= {f"{part.name}.convs": layer.convs, f"{part.name}.dropout": layer.dropout}
    return found | net.leaves()
