"""A stock NAFNet, written from its published definition (Chen et al., ECCV 2022, figures 2 and 3), and ours in it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from dtpm_fast.kernels import accelerate_nafnet
from dtpm_fast.kernels.nafnet import NAFNet


class LayerNorm2d(nn.Module):
    """Over the channels of each pixel, affine."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        normal = (x - mean) / (variance + self.eps).sqrt()
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return first * second


class StockBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, 2 * c, 1)
        self.conv2 = nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.conv3 = nn.Conv2d(c, c, 1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))
        self.sg = Gate()
        self.conv4 = nn.Conv2d(c, 2 * c, 1)
        self.conv5 = nn.Conv2d(c, c, 1)
        self.norm1 = LayerNorm2d(c)
        self.norm2 = LayerNorm2d(c)
        self.dropout1: nn.Module = nn.Dropout(0.0)
        self.beta = nn.Parameter(torch.randn(1, c, 1, 1))
        self.gamma = nn.Parameter(torch.randn(1, c, 1, 1))

    def forward(self, inp: Tensor) -> Tensor:
        x = self.sg(self.conv2(self.conv1(self.norm1(inp))))
        y = inp + self.dropout1(self.conv3(x * self.sca(x))) * self.beta
        return y + self.conv5(self.sg(self.conv4(self.norm2(y)))) * self.gamma


class StockNAFNet(nn.Module):
    """Two levels of unequal blocks; pictures are padded with zeros to whole multiples of 4, as published."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.intro = nn.Conv2d(3, w, 3, padding=1)
        self.encoders = nn.ModuleList(
            [nn.Sequential(StockBlock(w)), nn.Sequential(StockBlock(2 * w), StockBlock(2 * w))]
        )
        self.downs = nn.ModuleList([nn.Conv2d(w, 2 * w, 2, 2), nn.Conv2d(2 * w, 4 * w, 2, 2)])
        self.middle_blks = nn.Sequential(StockBlock(4 * w))
        lifts = (nn.Sequential(nn.Conv2d(c, 2 * c, 1, bias=False), nn.PixelShuffle(2)) for c in (4 * w, 2 * w))
        self.ups = nn.ModuleList(lifts)
        self.decoders = nn.ModuleList(
            [nn.Sequential(StockBlock(2 * w)), nn.Sequential(*(StockBlock(w) for _ in range(3)))]
        )
        self.ending = nn.Conv2d(w, 3, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        height, width = picture.shape[2:]
        inp = F.pad(picture, (0, -width % 4, 0, -height % 4))
        upper = self.encoders[0](self.intro(inp))
        lower = self.encoders[1](self.downs[0](upper))
        x = self.middle_blks(self.downs[1](lower))
        x = self.decoders[0](self.ups[0](x) + lower)
        x = self.decoders[1](self.ups[1](x) + upper)
        return (self.ending(x) + inp)[:, :, :height, :width]


def random_nafnet(width: int = 16) -> StockNAFNet:
    """With norms and residual weights that a fresh one does not have."""
    model = StockNAFNet(width)
    for name, parameter in model.named_parameters():
        if ".norm" in name:
            nn.init.normal_(parameter, mean=1.0)
    return model


def test_same_results_and_state_dict() -> None:
    stock = random_nafnet().double()
    before = copy.deepcopy(stock.state_dict())
    fast = accelerate_nafnet(stock)
    assert fast.state_dict().keys() == before.keys()
    assert type(stock.middle_blks[0]) is StockBlock
    picture = torch.rand(2, 3, 9, 12).double()
    torch.testing.assert_close(fast(picture), stock(picture))
    fast(picture).square().mean().backward()
    stock(picture).square().mean().backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def test_compiles_without_a_graph_break() -> None:
    fast = accelerate_nafnet(StockBlock(6))
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), fast(x))


def test_takes_a_checkpoint() -> None:
    trained, fresh = random_nafnet(), random_nafnet()
    picture = torch.rand(1, 3, 6, 5)
    expected = trained(picture)
    torch.testing.assert_close(accelerate_nafnet(fresh, trained.state_dict())(picture), expected)
    for key in ("params", "params_ema", "state_dict"):
        torch.testing.assert_close(accelerate_nafnet(fresh, {key: trained.state_dict()})(picture), expected)
    assert not torch.equal(fresh(picture), expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_builds_the_network_of_a_checkpoint_file(tmp_path: Path, suffix: str) -> None:
    trained, file = random_nafnet().double(), tmp_path / f"published{suffix}"
    if suffix == ".pth":
        torch.save({"params": trained.state_dict()}, file)
    else:
        save_file(trained.state_dict(), file)
    picture = torch.rand(1, 3, 7, 6).double()
    fast = accelerate_nafnet(file)
    torch.testing.assert_close(fast(picture), trained(picture))
    torch.testing.assert_close(accelerate_nafnet(trained.state_dict())(picture), trained(picture))
    torch.testing.assert_close(accelerate_nafnet(random_nafnet().double(), file)(picture), trained(picture))
    assert fast.state_dict().keys() == trained.state_dict().keys()


def test_a_deep_network_takes_pictures_of_any_size() -> None:
    """Padded to whole multiples of 2 to the number of levels."""
    network = accelerate_nafnet(NAFNet(3, 4, [1, 1, 1], 1, [1, 1, 1]).state_dict())
    assert network(torch.rand(1, 3, 9, 12)).shape == (1, 3, 9, 12)


class Runs:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return pytest.fail, ("a pickle was executed",)


def test_unusable_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint .*absent\.pth does not exist"):
        accelerate_nafnet(tmp_path / "absent.pth")
    torch.save({"params": Runs()}, tmp_path / "harmful.pth")
    for name, content in (("harmful.pth", None), ("text.pth", b"text"), ("text.safetensors", b"text")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"checkpoint .*{name} cannot be read as a file of tensors"):
            accelerate_nafnet(tmp_path / name)
    with pytest.raises(ValueError, match="checkpoint holds no state dict"):
        accelerate_nafnet({"params": 1})
    with pytest.raises(ValueError, match=r"checkpoint is no NAFNet's: it lacks intro\.weight"):
        accelerate_nafnet(nn.Linear(2, 2).state_dict())
    lacking = {name: value for name, value in random_nafnet().state_dict().items() if name != "encoders.0.0.beta"}
    with pytest.raises(ValueError, match=r"checkpoint does not fit the model: .*encoders\.0\.0\.beta"):
        accelerate_nafnet(lacking)
    with pytest.raises(ValueError, match="checkpoint: the first argument is a checkpoint already"):
        accelerate_nafnet(random_nafnet().state_dict(), lacking)


def test_triton_by_the_rule(device: str, dtype: torch.dtype, assert_as_exact_as_eager: Callable[..., None]) -> None:
    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        stock = random_nafnet().encoders[1].to(device, dtype)  # two blocks of 32 channels
        if dtype != torch.float32:  # a small norm that counts: in 16 bits, 1e-3 - 1 + 1 is another number
            with torch.no_grad():
                for parameter in stock.get_submodule("0.norm1").parameters():
                    parameter.mul_(1e-3)
                stock.get_parameter("0.conv1.weight").mul_(1e3)
        x = torch.rand(1, 32, 7, 10, device=device).to(dtype)
        with torch.no_grad():
            ours, eager = accelerate_nafnet(stock)(x), stock(x)
            return [ours], [eager], [stock.double()(x.double())]

    assert_as_exact_as_eager(draw, ["out"])


def test_one_block_alone() -> None:
    stock = StockBlock(6).eval()
    stock.norm1.eps = stock.norm2.eps = 0.1
    x = torch.randn(2, 6, 5, 4)
    fast = accelerate_nafnet(stock)
    torch.testing.assert_close(fast(x), stock(x))
    assert not fast.training


def test_refuses_what_it_would_change() -> None:
    with pytest.raises(ValueError, match="model Linear has no NAFNet block"):
        accelerate_nafnet(nn.Linear(2, 2))
    dropping = StockBlock(4)
    for kind in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout):
        dropping.dropout1 = kind(0.5)
        with pytest.raises(ValueError, match="dropout1 of StockBlock drops out"):
            accelerate_nafnet(dropping)
    with pytest.raises(ValueError, match="checkpoint does not fit the model"):
        accelerate_nafnet(random_nafnet(16), random_nafnet(8).state_dict())
    local, wide = StockBlock(4), StockBlock(4)
    local.sca[0] = nn.AvgPool2d(3, 1)  # as NAFNet's own conversion for large pictures leaves it
    with pytest.raises(ValueError, match=r"sca\.0 of StockBlock is AvgPool2d"):
        accelerate_nafnet(local)
    wide.conv4, wide.conv5 = nn.Conv2d(4, 16, 1), nn.Conv2d(8, 4, 1)
    with pytest.raises(ValueError, match=r"conv4_weight must have shape \(8, 4, 1, 1\)"):
        accelerate_nafnet(wide)
    uneven = StockBlock(4)
    uneven.norm1.eps = 1e-5
    with pytest.raises(ValueError, match="different eps"):
        accelerate_nafnet(uneven)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padding_mode": "reflect", "padding": 1}, "padding_mode = 'reflect', and the kernels compute 'zeros'"),
        ({"padding": 0}, r"padding = \(0, 0\), and the kernels compute \(1, 1\)"),
        ({"padding": 2, "dilation": 2}, r"padding = \(2, 2\)"),
        ({"padding": "same", "dilation": 2}, r"dilation = \(2, 2\)"),
        ({"padding": 1, "stride": 2}, r"stride = \(2, 2\)"),
    ],
)
def test_refuses_another_conv2_of_the_same_shape(settings: dict[str, Any], message: str) -> None:
    block = StockBlock(4)
    block.conv2 = nn.Conv2d(8, 8, 3, groups=8, **settings)
    with pytest.raises(ValueError, match=f"conv2 of StockBlock has {message}"):
        accelerate_nafnet(block)


def test_takes_a_conv2_that_pads_to_the_same_size() -> None:
    block = StockBlock(4)
    block.conv2 = nn.Conv2d(8, 8, 3, padding="same", groups=8)
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(accelerate_nafnet(block)(x), block(x))
