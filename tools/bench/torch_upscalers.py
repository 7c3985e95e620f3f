"""GAN upscalers in PyTorch, written from the papers, with the names of Real-ESRGAN's files."""

import torch
from torch import nn
from torch.nn import functional


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


def _leaky(x):
    return functional.leaky_relu(x, 0.2)


class DenseBlock(nn.Module):
    """Wang et al., 2018, arXiv:1809.00219, figure 4."""

    def __init__(self, features: int, growth: int):
        super().__init__()
        for number in range(4):
            self.add_module(f"conv{number + 1}", _conv(features + number * growth, growth))
        self.conv5 = _conv(features + 4 * growth, features)

    def forward(self, x):
        """Maps [batch, features, h, w] to the same shape."""
        maps = [x]
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            maps.append(_leaky(layer(torch.cat(maps, 1))))
        return x + 0.2 * self.conv5(torch.cat(maps, 1))


class Block(nn.Module):
    """Three dense blocks, whose result is added to what they get."""

    def __init__(self, features: int, growth: int):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(features, growth) for _ in range(3))

    def forward(self, x):
        """Maps [batch, features, h, w] to the same shape."""
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """ESRGAN's generator; Real-ESRGAN folds the pixels of the images that it enlarges by 2 or 1."""

    def __init__(self, features: int = 64, growth: int = 32, blocks: int = 23, scale: int = 4):
        super().__init__()
        self.folded = 4 // scale
        self.conv_first = _conv(3 * self.folded**2, features)
        self.body = nn.Sequential(*(Block(features, growth) for _ in range(blocks)))
        self.conv_body, self.conv_up1, self.conv_up2, self.conv_hr = (
            _conv(features, features) for _ in range(4)
        )
        self.conv_last = _conv(features, 3)

    def forward(self, images):
        """Maps images in 0..1, [batch, 3, h, w], to [batch, 3, scale h, scale w]."""
        first = self.conv_first(functional.pixel_unshuffle(images, self.folded))
        x = first + self.conv_body(self.body(first))
        for layer in (self.conv_up1, self.conv_up2):
            x = _leaky(layer(functional.interpolate(x, scale_factor=2, mode="nearest")))
        return self.conv_last(_leaky(self.conv_hr(x)))


class SRVGGNetCompact(nn.Module):
    """Real-ESRGAN's small network: convolutions, then a pixel shuffle (arXiv:1609.05158)."""

    def __init__(self, features: int = 64, convs: int = 16, scale: int = 4):
        super().__init__()
        layers = [_conv(3, features), nn.PReLU(features)]
        for _ in range(convs):
            layers += [_conv(features, features), nn.PReLU(features)]
        self.body = nn.ModuleList([*layers, _conv(features, 3 * scale**2)])
        self.scale = scale

    def forward(self, images):
        """Maps images in 0..1, [batch, 3, h, w], to [batch, 3, scale h, scale w]."""
        x = images
        for layer in self.body:
            x = layer(x)
        nearest = functional.interpolate(images, scale_factor=self.scale, mode="nearest")
        return functional.pixel_shuffle(x, self.scale) + nearest
