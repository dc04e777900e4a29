"""The semantic code: the pooled feature of an image encoder, frozen, that tells the denoiser what it is looking at."""

import copy
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dtpm_fast.errors import UserError
from dtpm_fast.model.mobilenet import CHANNELS, mobilenet_v3_small_trunk
from dtpm_fast.pretrained import Backbone

COMPACT_FILE = Path(__file__).parent.parent / "weights" / "compact.safetensors"
RESNET18 = Backbone(  # torchvision's IMAGENET1K_V1 weights
    "ResNet-18 for the semantic code",
    "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "f37072fd",
    "DTPM_RESNET18",
    without="has no weights",
)


class SemanticEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to codes (B, `code_channels`): global average of the trunk's last map.

    The picture is resized to 224x224 (bilinear, antialiased), whatever its size, so that the cost is constant and a
    crop and a photo are seen alike. The encoder is frozen and always in evaluation mode.
    """

    def __init__(self, trunk: nn.Module, code_channels: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.mean: Tensor
        self.std: Tensor
        self.code_channels = code_channels
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        return self.features(image)

    def features(self, image: Tensor) -> Tensor:
        """What `forward` gives, with gradients: for the distillation that trains the compact encoder."""
        image = F.interpolate(image, size=(224, 224), mode="bilinear", antialias=True, align_corners=False)
        return self.trunk((image * 0.5 + 0.5 - self.mean) / self.std).mean(dim=(2, 3))

    def folded(self) -> "SemanticEncoder":
        """The same encoder with every batch norm in the convolution before it: the same codes in two thirds of the
        operators. All other tensors are shared."""
        encoder = copy.deepcopy(self, {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())})
        for parent in encoder.trunk.modules():
            for (_, conv), (name, norm) in itertools.pairwise(list(parent.named_children())):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    mean, variance = norm.running_mean, norm.running_var
                    assert mean is not None and variance is not None  # of a frozen encoder
                    conv.weight, conv.bias = fuse_conv_bn_weights(
                        conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
                    )
                    setattr(parent, name, nn.Identity())
        return encoder

    def train(self, mode: bool = True) -> "SemanticEncoder":
        """Stays in evaluation mode: its batch statistics are part of the frozen weights."""
        return super().train(False)


def compact_encoder() -> SemanticEncoder:
    """The trunk of MobileNetV3-Small (0.93M parameters), 576-d code, with fresh weights."""
    return SemanticEncoder(mobilenet_v3_small_trunk(), CHANNELS)


def resnet18_encoder() -> SemanticEncoder:
    """The trunk of ResNet-18 (the paper's encoder), 512-d code, with fresh weights."""
    from torchvision.models import resnet18  # here: the import takes seconds, and no other encoder needs it

    resnet = resnet18(weights=None)
    return SemanticEncoder(nn.Sequential(*list(resnet.children())[:-2]), 512)


def load_compact() -> dict[str, Tensor]:
    """The compact encoder's shipped weights, distilled by `python -m dtpm_fast.training.distill`."""
    try:
        return {
            key: value.float() if value.is_floating_point() else value for key, value in load_file(COMPACT_FILE).items()
        }
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{COMPACT_FILE}: the compact encoder's weights cannot be read ({error}); reinstall dtpm-fast"
        ) from error


def load_resnet18(file: Path | str | None = None) -> dict[str, Tensor]:
    """torchvision's ResNet-18 weights as the trunk's state dict, checked by hash.

    From `file`, else from the file that DTPM_RESNET18 names, else downloaded once into torch's hub cache. Raises
    `UserError` when there is neither network nor file, or the file is another one.
    """
    try:
        path = RESNET18.find(file)
    except UserError as error:
        raise UserError(f"{error}, or train with --set semantic_code=compact") from error
    return resnet18_trunk_state(torch.load(path, map_location="cpu", weights_only=True))


def resnet18_trunk_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's names (conv1, bn1, layer1 ...) as the indices of our trunk."""
    from torchvision.models import resnet18

    index = {name: str(i) for i, (name, _) in enumerate(list(resnet18(weights=None).named_children())[:-2])}
    trunk = {}
    for key, value in state.items():
        child, _, rest = key.partition(".")
        if child in index:
            trunk[f"trunk.{index[child]}.{rest}"] = value
    return trunk
