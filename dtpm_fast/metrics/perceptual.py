"""Perceptual quality: LPIPS of a picture, Fréchet inception distance of a set's patches. Lower is better for both."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS
from torchmetrics.image.fid import FrechetInceptionDistance

from dtpm_fast.errors import UserError
from dtpm_fast.pretrained import Backbone, BackboneMissing

ALEXNET = Backbone(
    "LPIPS", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79", "DTPM_ALEXNET"
)  # fmt: skip
INCEPTION = Backbone(
    "patch FID",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d",
    "DTPM_INCEPTION",
)
PATCH = 256


class Lpips:
    """LPIPS 0.1 (Zhang et al. 2018) through AlexNet, the net that restoration papers report.

    torchmetrics computes it and ships the linear layers; the trunk is torchvision's AlexNet. Raises as
    `Backbone.find` does.
    """

    def __init__(self, device: torch.device, file: Path | str | None = None, backbone: Backbone = ALEXNET) -> None:
        path = backbone.find(file)
        trunk = _load(path)
        self._net = _LPIPS(net="alex", pnet_rand=True)  # its own way to the trunk's weights is a download
        own = self._net.net.state_dict()
        try:
            # slice2.3.weight is torchvision's features.3.weight
            self._net.net.load_state_dict({key: trunk[f"features.{key.split('.', 1)[1]}"] for key in own})
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{path}: does not hold torchvision's AlexNet ({error})") from error
        self._net.to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, image: Tensor, target: Tensor) -> float:
        """Distance of two pictures (1, 3, H, W) in [0, 1]; 0 for equal ones. Raises as `check_size` does."""
        self.check_size(*image.shape[-2:])
        image, target = (x.to(self._device, torch.float32) for x in (image, target))
        return self._net(image, target, normalize=True).item()

    @staticmethod
    def check_size(height: int, width: int) -> None:
        """Raise `UserError` below 63 pixels a side, where AlexNet's pooling runs out of pixels."""
        if min(height, width) < 63:
            raise UserError(f"LPIPS needs pictures of at least 63x63 pixels, got {width}x{height}")


class PatchFid:
    """Fréchet inception distance (Heusel et al. 2017) between the patches of several methods and those of the targets.

    Patches are 256x256, without overlap, from the upper left corner (the protocol of DvSR, Whang et al. 2022, which
    the paper follows); a remainder at the right and lower border is left out. torch-fidelity's InceptionV3, the
    2048-d pool features, torchmetrics' statistics. Raises as `Backbone.find` does, and `BackboneMissing` without
    torch-fidelity.
    """

    def __init__(
        self,
        methods: Sequence[str],
        device: torch.device,
        file: Path | str | None = None,
        backbone: Backbone = INCEPTION,
        extractor: nn.Module | None = None,
    ) -> None:
        """`extractor`: another network from (N, 3, 256, 256) uint8 to (N, `num_features`), instead of the backbone."""
        self._extractor = (extractor or _inception(backbone, file)).to(device).eval()
        self._device = device
        features = _Features(int(getattr(self._extractor, "num_features", 2048)))
        self._distances = {name: FrechetInceptionDistance(feature=features) for name in methods}
        self.patches = 0

    @torch.no_grad()
    def update(self, images: dict[str, Tensor], target: Tensor) -> None:
        """Add one picture by every method, and its target, (1, 3, H, W) in [0, 1]."""
        truth = self._features(target)
        if not len(truth):
            return
        self.patches += len(truth)
        for name, distance in self._distances.items():
            distance.update(truth, real=True)
            distance.update(self._features(images[name]), real=False)

    def compute(self) -> dict[str, float]:
        """The distance of each method; nothing for fewer than two patches. It is biased for small sets: with fewer
        patches than features (2048) it says little. Where several processes share a set (torch.distributed over CPU
        tensors), it is that of all their patches, and all of them must call this."""
        if dist.is_available() and dist.is_initialized():
            patches = torch.tensor(self.patches)
            dist.all_reduce(patches)  # torchmetrics adds up its own sums
            self.patches = int(patches)
        if self.patches < 2:
            return {}
        return {name: float(distance.compute()) for name, distance in self._distances.items()}

    def _features(self, image: Tensor) -> Tensor:
        patches = cut_patches((image.float().clamp(0, 1) * 255).round().to(torch.uint8))
        found = [self._extractor(part.to(self._device)).double().cpu() for part in patches.split(16) if len(part)]
        return torch.cat(found) if found else torch.empty(0)


def cut_patches(image: Tensor) -> Tensor:
    """(1, C, H, W) to (N, C, 256, 256), row by row."""
    _, channels, height, width = image.shape
    rows, columns = height // PATCH, width // PATCH
    inside = image[0, :, : rows * PATCH, : columns * PATCH]
    grid = inside.reshape(channels, rows, PATCH, columns, PATCH)
    return grid.permute(1, 3, 0, 2, 4).reshape(rows * columns, channels, PATCH, PATCH)


class _Features(nn.Module):
    """torchmetrics wants a network; the features are already computed, once for all methods."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _inception(backbone: Backbone, file: Path | str | None) -> nn.Module:
    path = backbone.find(file)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise BackboneMissing("patch FID is left out: it needs torch-fidelity (pip install torch-fidelity)") from error
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path}: does not hold torch-fidelity's InceptionV3 ({error})") from error
    return _FirstOf(network)


class _FirstOf(nn.Module):
    """torch-fidelity returns a tuple with one entry per asked feature."""

    num_features = 2048

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, patches: Tensor) -> Tensor:
        return self.network(patches)[0]


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path}: not a readable weights file ({error})") from error
