"""Train the compact semantic encoder by distillation: `python -m dtpm_fast.training.distill --help`.

The student (torchvision's MobileNetV3-Small trunk, 0.93M parameters) learns to predict, through a linear head that is
thrown away afterwards, the pooled feature of a network pretrained on ImageNet: torchvision's ResNet-18, or a
MobileNetV2 given as a file. Loss: 1 - cosine between the centred features. Agreement is reported on
unseen photos.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dtpm_fast.atomic import atomic_path
from dtpm_fast.data.crops import PhotoCrops
from dtpm_fast.device import choose_device
from dtpm_fast.errors import UserError
from dtpm_fast.exit_code import run
from dtpm_fast.given_path import given_path
from dtpm_fast.model.semantic import (
    SemanticEncoder,
    compact_encoder,
    load_resnet18,
    resnet18_encoder,
)


class MobileNetV2(nn.Module):
    """An ImageNet MobileNetV2 with its batch norms folded in, from an .npz of `NN.weight` (OIHW), `NN.bias` and `_ops`.

    `_ops` is JSON: [kind, index of the convolution, stride, activation] in order. Padding is TensorFlow's SAME.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        try:
            with np.load(file, allow_pickle=False) as arrays:
                ops = json.loads(str(arrays["_ops"]))
                self.ops = [tuple(op) for op in ops]
                convolutions = [index for kind, index, *_ in self.ops if "CONV" in kind]
                for index in convolutions:
                    for part in ("weight", "bias"):
                        self.register_buffer(f"{part}{index}", torch.from_numpy(arrays[f"{index:02d}.{part}"]).float())
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{file}: not a MobileNetV2 in the expected .npz form ({error})") from error
        self.feature_channels = int(self.get_buffer(f"weight{convolutions[-1]}").shape[1])

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to the pooled feature before the classifier, (B, 1280)."""
        x = F.interpolate(image, size=(224, 224), mode="bilinear", antialias=True, align_corners=False)
        block_input = before = x
        for kind, index, stride, activation in self.ops:
            if "POOL" in kind or "MEAN" in kind:
                break
            if kind == "ADD":
                x = before + x
                block_input = x
                continue
            weight = self.get_buffer(f"weight{index}")
            groups = weight.shape[0] if kind.startswith("DEPTHWISE") else 1
            before = block_input
            x = F.conv2d(
                _pad_same(x, weight.shape[-1], stride), weight, self.get_buffer(f"bias{index}"), stride, groups=groups
            )
            if activation == "relu6":
                x = x.clamp(0, 6)
            else:  # a linear bottleneck ends a block, and is what the next block's ADD adds to
                block_input = x
        return x.mean(dim=(2, 3))


def distill(teacher: nn.Module, teacher_channels: int, output: Path, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device, why = choose_device(args.device)
    print(f"device: {why}")
    student = compact_encoder().requires_grad_(True).to(device).to(memory_format=torch.channels_last)
    head = nn.Linear(student.code_channels, teacher_channels).to(device)
    teacher = teacher.to(device).to(memory_format=torch.channels_last).eval()
    student.trunk.train()

    def taught(image: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return teacher(image).float()

    crops = PhotoCrops(args.data, args.crop, args.seed)
    loader = DataLoader(crops, args.batch_size, sampler=range(args.steps * args.batch_size), num_workers=args.workers)
    validation = PhotoCrops(args.held_out, args.crop, args.seed + 1)
    unseen = torch.stack([validation[i] for i in range(args.validation)]).to(device)
    with torch.no_grad():
        centre = taught(torch.stack([crops[i] for i in range(10**9, 10**9 + 128)]).to(device)).mean(0)

    parameters = [*student.trunk.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    progress = tqdm(loader, desc="distill", total=args.steps, disable=None)
    for step, image in enumerate(progress, start=1):
        image = image.to(device, memory_format=torch.channels_last)
        target = taught(image) - centre
        loss = (1 - F.cosine_similarity(head(student.features(image)), target)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % 20 == 0:
            tqdm.write(f"{step}: loss {loss.item():.3f}")

    _recompute_batch_statistics(student, crops, args)
    with torch.no_grad():
        guess, target = head(student(unseen)), taught(unseen) - centre
    cosine = F.cosine_similarity(guess, target).mean().item()
    neighbours = (_nearest(student(unseen)) == _nearest(target)).float().mean().item()
    state = {k: v.half() if v.is_floating_point() else v for k, v in student.cpu().state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, output, {"format": "dtpm-fast-compact-1"})
    print(
        f"agreement on {args.validation} crops of unseen photos: cosine {cosine:.3f}, "
        f"same nearest neighbour {neighbours:.1%}"
    )


@torch.no_grad()
def _recompute_batch_statistics(student: SemanticEncoder, crops: PhotoCrops, args: argparse.Namespace) -> None:
    """Batch norm's running means lag behind weights that still move: average them anew over the finished network."""
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain average over all batches
    student.trunk.train()
    first = args.steps * args.batch_size
    for image in DataLoader(crops, args.batch_size, sampler=range(first, first + 20 * args.batch_size)):
        student.features(image.to(next(student.parameters()).device, memory_format=torch.channels_last))
    student.trunk.eval()


def _nearest(features: Tensor) -> Tensor:
    """For each row the index of the other row most like it, by cosine of the centred features."""
    normal = F.normalize(features - features.mean(0), dim=1)
    return (normal @ normal.T).fill_diagonal_(-2).argmax(dim=1)


def _pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    pads = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dtpm_fast.training.distill",
        description="Distil the compact semantic encoder (0.93M parameters) from a pretrained network.",
        epilog="example: python -m dtpm_fast.training.distill --teacher resnet18 --data photos --held-out more "
        "--output compact.safetensors",
    )
    parser.add_argument("--teacher", required=True, help="resnet18 (torchvision's weights), or a MobileNetV2 as .npz")
    parser.add_argument("--data", type=given_path, required=True, help="folder of photos to learn from")
    parser.add_argument(
        "--held-out", type=given_path, required=True, help="folder of other photos, for the reported agreement"
    )
    parser.add_argument("--output", type=given_path, required=True, help="a .safetensors file for the encoder")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--crop", type=int, default=320)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--validation", type=int, default=200)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)

    def work() -> int:
        with atomic_path(args.output) as temporary:  # first: what cannot be written is an error before long work
            if args.teacher == "resnet18":
                teacher: nn.Module = resnet18_encoder()
                teacher.load_state_dict(load_resnet18(), strict=True)
                distill(teacher, 512, temporary, args)
            else:
                mobilenet = MobileNetV2(Path(args.teacher))
                distill(mobilenet, mobilenet.feature_channels, temporary, args)
        print(f"written: {args.output}")
        return 0

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
