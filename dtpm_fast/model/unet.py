"""The U-Net of the denoiser and of the initial predictor, with NAFNet's parameter names."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

# Called for every block with its position ("encoders.0.0", "middle_blks.0", "decoders.0.0"), the block and its input.
ApplyBlock = Callable[[str, nn.Module, Tensor], Tensor]


class UNet(nn.Module):
    """3x3 intro, levels with 2x2 stride-2 down, middle, levels with 1x1 + PixelShuffle up, additive skips, 3x3 ending.

    Args:
        in_channels: of the input; the output has 3 channels.
        width: channels of the first level; each level down doubles them.
        encoder, middle, decoder: blocks per level; `decoder` counts from the lowest level up.
        make_block: builds a block for a number of channels.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        encoder: Sequence[int],
        middle: int,
        decoder: Sequence[int],
        make_block: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.intro = nn.Conv2d(in_channels, width, 3, padding=1)
        self.ending = nn.Conv2d(width, 3, 3, padding=1)
        self.encoders, self.downs = nn.ModuleList(), nn.ModuleList()
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        channels = width
        for count in encoder:
            self.encoders.append(nn.ModuleList(make_block(channels) for _ in range(count)))
            self.downs.append(nn.Conv2d(channels, 2 * channels, 2, stride=2))
            channels *= 2
        self.middle_blks = nn.ModuleList(make_block(channels) for _ in range(middle))
        for count in decoder:
            self.ups.append(nn.Sequential(nn.Conv2d(channels, 2 * channels, 1, bias=False), nn.PixelShuffle(2)))
            channels //= 2
            self.decoders.append(nn.ModuleList(make_block(channels) for _ in range(count)))
        self.multiple = 2 ** len(encoder)

    def forward(self, x: Tensor, apply_block: ApplyBlock) -> Tensor:
        """(B, in_channels, H, W) to (B, 3, H, W). Raises `ValueError` when H or W is no multiple of 2^levels."""
        height, width = x.shape[-2:]
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"height and width must be multiples of {self.multiple}, got {height}x{width}; pad first")
        x = self.intro(x)
        skips = []
        for level, (blocks, down) in enumerate(zip(self.encoders, self.downs, strict=True)):
            x = _run(f"encoders.{level}", blocks, x, apply_block)
            skips.append(x)
            x = down(x)
        x = _run("middle_blks", self.middle_blks, x, apply_block)
        for level, (blocks, up) in enumerate(zip(self.decoders, self.ups, strict=True)):
            x = up(x) + skips.pop()
            x = _run(f"decoders.{level}", blocks, x, apply_block)
        return self.ending(x)

    def positions(self) -> dict[str, int]:
        """Every block's position and its number of channels, in the order of the forward pass."""
        found = {}
        for group in ("encoders", "middle_blks", "decoders"):
            for name, module in getattr(self, group).named_modules(prefix=group):
                if hasattr(module, "conv1"):
                    found[name] = module.conv1.in_channels
        return found


def zero_init(convolution: nn.Conv2d) -> None:
    nn.init.zeros_(convolution.weight)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)


def _run(prefix: str, blocks: nn.Module, x: Tensor, apply_block: ApplyBlock) -> Tensor:
    for name, block in blocks.named_children():
        x = apply_block(f"{prefix}.{name}", block, x)
    return x
