"""The trunk of MobileNetV3-Small (Howard et al. 2019, table 2), with the state dict of torchvision's `features`.

torchvision's own is the same network, and a test holds the two together; importing it loads PyTorch's compiler, half
of the time from a process's start to its first picture.
"""

from torch import Tensor, nn

# Kernel, expanded channels, output channels, squeeze-and-excite, h-swish (else ReLU), stride.
BLOCKS = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)
CHANNELS = 576  # of the last map


def mobilenet_v3_small_trunk() -> nn.Sequential:
    """Images (B, 3, H, W), normalised as ImageNet's, to (B, 576, H / 32, W / 32), rounded up; fresh weights."""
    layers: list[nn.Module] = [_conv(3, 16, 3, stride=2, activation=nn.Hardswish)]
    channels = 16
    for kernel, expanded, out, squeeze, hswish, stride in BLOCKS:
        activation = nn.Hardswish if hswish else nn.ReLU
        layers.append(InvertedResidual(channels, expanded, out, kernel, stride, squeeze, activation))
        channels = out
    trunk = nn.Sequential(*layers, _conv(channels, CHANNELS, 1, activation=nn.Hardswish))
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return trunk


class InvertedResidual(nn.Module):
    """1x1 to more channels, depth-wise, squeeze-and-excite, 1x1 to fewer; with a shortcut where the shape stays."""

    def __init__(
        self, channels: int, expanded: int, out: int, kernel: int, stride: int, squeeze: bool,
        activation: type[nn.Module],
    ) -> None:  # fmt: skip
        super().__init__()
        self.shortcut = stride == 1 and channels == out
        layers: list[nn.Module] = []
        if expanded != channels:
            layers.append(_conv(channels, expanded, 1, activation=activation))
        layers.append(_conv(expanded, expanded, kernel, stride=stride, groups=expanded, activation=activation))
        if squeeze:
            layers.append(SqueezeExcite(expanded))
        self.block = nn.Sequential(*layers, _conv(expanded, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y + x if self.shortcut else y


class SqueezeExcite(nn.Module):
    """Channels scaled by a function of their means, of a quarter as many channels (to the nearest 8) inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = max(8, (channels // 4 + 4) // 8 * 8)
        self.fc1, self.fc2 = nn.Conv2d(channels, inside, 1), nn.Conv2d(inside, channels, 1)
        self.pool, self.relu, self.gate = nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.gate(self.fc2(self.relu(self.fc1(self.pool(x)))))
        return scale * x


def _conv(
    channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, activation: type[nn.Module] | None = None
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out, eps=1e-3, momentum=0.01),
    ]
    return nn.Sequential(*layers, *([activation()] if activation is not None else []))
