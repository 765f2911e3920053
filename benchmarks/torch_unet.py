"""minunet's U-Net as one would write it in PyTorch. Its submodules are named as minunet.network.bridge expects."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minunet.base.rng import DROPOUT, Key, random_uint16


class DoubleConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(x)), inplace=True)


class Up(DoubleConv):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(2 * out_channels, out_channels)
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1)


class TorchUNet(nn.Module):
    """Three channels in, one out; 3x3 transposed convolutions; dropout after each pool and each concat."""

    def __init__(self, widths: list[int], dropout: float) -> None:
        super().__init__()
        self.depth, self.rate = len(widths) - 1, dropout
        inputs = [3, *widths]
        for level in range(self.depth):
            setattr(self, f"down{level + 1}", DoubleConv(inputs[level], widths[level]))
            setattr(self, f"up{level + 1}", Up(widths[level + 1], widths[level]))
        self.bottleneck = DoubleConv(inputs[self.depth], widths[self.depth])
        self.head = nn.Conv2d(widths[0], 1, 3, padding=1)

    def forward(self, x: Tensor, key: Key | None = None) -> Tensor:
        """Logits. Dropout takes PyTorch's own masks; with a ``key``, minunet's, to compare gradients."""
        skips = []
        for level in range(self.depth):
            x = getattr(self, f"down{level + 1}")(x)
            skips.append(x)
            x = self.drop(F.max_pool2d(x, 2), level, key)
        x = self.bottleneck(x)
        for level in reversed(range(self.depth)):
            up = getattr(self, f"up{level + 1}")
            x = torch.cat([up.up(x), skips[level]], dim=1)
            x = up(self.drop(x, self.depth + level, key))
        return self.head(x)

    def drop(self, x: Tensor, index: int, key: Key | None) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        if key is None:
            return F.dropout(x, self.rate)
        count, channels, height, width = x.shape
        draws = np.stack(
            [random_uint16(key._replace(stream=DROPOUT + index, image=n), x[0].numel()) for n in range(count)]
        )
        kept = (draws >= round(self.rate * 2**16)).reshape(count, height, width, channels)[:, ::-1, ::-1]
        return x * torch.from_numpy(kept.transpose(0, 3, 1, 2).astype(np.float32)) / (1 - self.rate)
