"""Is this the network that the engines know? They compute a U-Net as the package has it, and nothing else.

A network with a block of one's own, a method that was replaced on an object, or another loss is no wrong network: the
plain path trains it. What cannot be seen here, such as an op that was edited, :mod:`minunet.engines.selfcheck` finds.
"""

from minunet.network.blocks import DoubleConv, Down, Up
from minunet.network.layers import BatchNorm2d, Conv2d, ConvTranspose2d, Dropout, Layer
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet

KNOWN = (UNet, Down, Up, DoubleConv, Conv2d, ConvTranspose2d, BatchNorm2d, Dropout)


def own_code(net: UNet, loss: SegmentationLoss) -> str | None:
    """What in ``net`` or ``loss`` is not the package's own, in words; None if everything is.

    >>> class LeakyUNet(UNet):
    ...     pass
    >>> own_code(UNet(widths=(2, 3)), SegmentationLoss()), own_code(LeakyUNet(widths=(2, 3)), SegmentationLoss())
    (None, 'the network is a LeakyUNet')
    """
    if found := _own("the loss", loss, (SegmentationLoss,)):
        return found
    if found := _own("the network", net, KNOWN):
        return found
    return next((found for name, layer in _within(net).items() if (found := _own(name, layer, KNOWN))), None)


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
