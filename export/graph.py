"""The runtime's plan as graphs of standard operators: what every export format is made from.

The weights are the plan's folded ones; the form is the one that graph compilers recognise: maps (B, C, H, W), every
1x1 a convolution, layer norm over the last axis of a permuted map, PixelShuffle as such. Layer norm and its modulation
are float32 in graphs of 16 bits as well: float16 overflows in LN's variance, a known fault of this family.

    conditions = PrepareGraph(image)                         "image" (B, 3, H, W) in [-1, 1]
    next_x, x0 = StepGraph(x, previous, index, *conditions)  once for index = 0 .. S - 1, with x = noise at the start
    restored   = clip(y_eps + x, -1, 1)
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtpm_fast.runtime.plan import Plan, Prepare, Step
from dtpm_fast.runtime.sampler import C_IN, Steps, update
from dtpm_fast.runtime.unet import FoldedBlock, FoldedUNet

Rows = tuple[Tensor, Tensor, Tensor, Tensor]  # shift1, 1 + scale1, shift2, 1 + scale2, each (B or 1, C) in float32


class PrepareGraph(nn.Module):
    """image to the conditions of all steps, in the order of `names`; "y_eps" (B, 3, H, W) float32 is the first."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        prepare = plan.prepare_module
        self.config, self.dtype = prepare.config, prepare.dtype
        self.semantic, self.code_mlp = prepare.semantic, prepare.code_mlp
        if self.code_mlp is not None:
            self.register_buffer("projection", prepare.projection)
        self.predictor: UNetGraph | None = None
        if prepare.predictor is not None:
            self.predictor = UNetGraph(prepare.predictor)
            self.register_buffer("affine_rows", prepare.affine_rows.float())
            self._keep(prepare, "predictor_intro")
        self._keep(prepare, "intro")
        self.adapters: list[tuple[str, int]] = []  # name of its weights, level
        self.names = ["y_eps", "intro"]
        if self.code_mlp is not None:
            self.names.append("code_rows")
        for position, level in prepare.levels.items():
            key = "adapter_" + position.replace(".", "_")
            self._keep(prepare, key)
            self.adapters.append((key, level))
            self.names.append(key)
        for level in sorted({level for _, level in self.adapters} - {0}):
            self.register_buffer(f"triangle{level}", _triangle(2**level))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        y_eps = image + 0.0  # an output that is the input itself is no output for some runtimes
        if self.predictor is not None:
            h = self._conv("predictor_intro", image)
            y_eps = image + self.predictor(h, cast(Tensor, self.affine_rows), {}).float()
        found = [y_eps, self._conv("intro", image if self.config.condition == "degraded" else y_eps)]
        if self.semantic is not None and self.code_mlp is not None:
            code = self._code(y_eps if self.config.code_source == "predicted" else image)
            found.append(F.linear(self.code_mlp(code), cast(Tensor, self.projection)))
        levels: dict[int, Tensor] = {0: y_eps}
        for key, level in self.adapters:
            if level not in levels:
                levels[level] = _shrink(y_eps, getattr(self, f"triangle{level}"), 2**level)
            found.append(self._conv(key, levels[level]))
        return tuple(found)

    def _code(self, image: Tensor) -> Tensor:
        """The semantic encoder, with its antialiased resize to 224x224 as two matrix products: TensorRT has no
        antialiased Resize."""
        semantic = self.semantic
        assert semantic is not None
        rows, columns = (_resize_matrix(image.size(dim), 224, image) for dim in (2, 3))
        image = torch.matmul(torch.matmul(rows, image), columns.transpose(0, 1))
        return semantic.trunk((image * 0.5 + 0.5 - semantic.mean) / semantic.std).mean(dim=(2, 3))

    def _keep(self, prepare: Prepare, name: str) -> None:
        for part in ("weight", "bias"):
            self.register_buffer(f"{name}_{part}", prepare.maps[name].get_buffer(part).contiguous())

    def _conv(self, name: str, image: Tensor) -> Tensor:
        return F.conv2d(image.to(self.dtype), getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"), padding=1)


class StepGraph(nn.Module):
    """One evaluation of the denoiser and the sampler's update. All that depends on the step is inside, behind `index`.

    x, previous: (B, 3, H, W) float32, this step's x and the step before's x0 (zeros at first); index: (1,) int64;
    conditions: what `PrepareGraph` gives, in its order. Returns the next x and this step's x0.
    """

    def __init__(self, plan: Plan, names: list[str]) -> None:
        super().__init__()
        self.table: Tensor
        self.time_rows: Tensor
        self.intro_weight: Tensor
        step: Step = plan.step_module
        self.names, self.dtype = names, step.dtype
        self.unet = UNetGraph(step.unet)
        self.register_buffer("intro_weight", step.intro.weight.contiguous())
        self.register_buffer("table", plan.table.float())
        self.register_buffer("time_rows", plan.time_rows.float())

    def forward(self, x: Tensor, previous: Tensor, index: Tensor, *conditions: Tensor) -> tuple[Tensor, Tensor]:
        row, rows = self.table.index_select(0, index)[0], self.time_rows.index_select(0, index)
        given = dict(zip(self.names, conditions, strict=True))
        h = F.conv2d((row[C_IN] * x).to(self.dtype), self.intro_weight, padding=1) + given["intro"]
        if "code_rows" in given:
            rows = rows + given["code_rows"]
        output = self.unet(h, rows, given).float()
        return update(row, x, output, previous, given["y_eps"])


class UnrolledGraph(nn.Module):
    """The whole restoration in one graph: image (B, 3, H, W) and noise (fields, 3, H, W) to restored (B, 3, H, W)."""

    def __init__(self, prepare: PrepareGraph, step: StepGraph, steps: Steps) -> None:
        super().__init__()
        self.prepare, self.step, self.sigmas = prepare, step, steps.sigmas
        self.indices: Tensor
        self.register_buffer("indices", torch.arange(len(steps)))

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        conditions = self.prepare(image)
        y_eps = conditions[0]
        x = noise[:1].expand_as(y_eps)
        previous = torch.zeros_like(y_eps)
        fresh = 1
        for i, sigma in enumerate(self.sigmas):
            x, previous = self.step(x, previous, self.indices[i : i + 1], *conditions)
            if sigma > 0:
                x = x + sigma * noise[fresh]
                fresh += 1
        return (y_eps + x).clamp(-1, 1)


class UNetGraph(nn.Module):
    """All of a U-Net behind its intro convolution: (B, C, H, W) to (B, 3, H, W)."""

    def __init__(self, unet: FoldedUNet) -> None:
        super().__init__()
        self.positions, self.encoder, self.middle, self.decoder = (
            unet.positions, unet.encoder, unet.middle, unet.decoder,
        )  # fmt: skip
        self.blocks = nn.ModuleList(BlockGraph(cast(FoldedBlock, block)) for block in unet.blocks)
        for name, value in unet.named_buffers(recurse=False):
            if name.startswith("up"):
                # The folded rows are ordered (dy, dx, c); PixelShuffle reads channels as (c, dy, dx).
                value = value.view(2, 2, -1, value.shape[1]).permute(2, 0, 1, 3).reshape(*value.shape, 1, 1)
            self.register_buffer(name, value.contiguous())

    def forward(self, h: Tensor, rows: Tensor, given: dict[str, Tensor]) -> Tensor:
        """rows: (B or 1, sum of 4C) float32, every block's four; given: the bias maps, as "adapter_<position>"."""
        split = iter(rows.split([c for channels in self.positions.values() for c in 4 * [channels]], dim=1))
        numbered = iter(zip(self.positions, self.blocks, strict=True))

        def run(count: int, h: Tensor) -> Tensor:
            for _ in range(count):
                position, block = next(numbered)
                four: Rows = (next(split), next(split), next(split), next(split))
                h = block(h, four, given.get("adapter_" + position.replace(".", "_")))
            return h

        skips = []
        for i, count in enumerate(self.encoder):
            h = run(count, h)
            skips.append(h)
            h = F.conv2d(h, getattr(self, f"down{i}_weight"), getattr(self, f"down{i}_bias"), stride=2)
        h = run(self.middle, h)
        for i, count in enumerate(self.decoder):
            h = run(count, F.pixel_shuffle(F.conv2d(h, getattr(self, f"up{i}")), 2) + skips.pop())
        return F.conv2d(h, cast(Tensor, self.ending_weight), cast(Tensor, self.ending_bias), padding=1)


class BlockGraph(nn.Module):
    """Figure 4's block, and the linear half of the adapter behind it, with the folded weights."""

    def __init__(self, block: FoldedBlock) -> None:
        super().__init__()
        self.channels = block.channels
        for name, value in block.named_buffers(recurse=False):
            if name in ("w1", "w3", "w4", "w5", "w_sca", "matrix"):
                value = value.reshape(*value.shape[:2], 1, 1)
            self.register_buffer(name, value.contiguous())
        self.adapted = block.matrix is not None

    def forward(self, x: Tensor, rows: Rows, bias_map: Tensor | None) -> Tensor:
        b = dict(self.named_buffers(recurse=False))
        shift1, scale1, shift2, scale2 = rows
        h = F.conv2d(_adaln(x, shift1, scale1), b["w1"], b["b1"])
        h = _gate(F.conv2d(h, b["w2"], b["b2"], padding=1, groups=2 * self.channels), self.channels)
        mean = h.float().mean(dim=(2, 3), keepdim=True).to(h.dtype)  # 1,000,000 pixels do not sum in 16 bits
        h = h * F.conv2d(mean, b["w_sca"], b["b_sca"])
        y = x + F.conv2d(h, b["w3"], b["b3"])
        h = _gate(F.conv2d(_adaln(y, shift2, scale2), b["w4"], b["b4"]), self.channels)
        if bias_map is None or not self.adapted:
            return y + F.conv2d(h, b["w5"], b["b5"])
        return F.conv2d(y, b["matrix"]) + bias_map + F.conv2d(h, b["w5"])


def _adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) * scale + shift in float32; "1 +" is in scale."""
    normal = F.layer_norm(x.permute(0, 2, 3, 1).float(), (x.size(1),), eps=1e-6)
    return (normal * scale[:, None, None] + shift[:, None, None]).to(x.dtype).permute(0, 3, 1, 2)


def _gate(x: Tensor, channels: int) -> Tensor:
    return x[:, :channels] * x[:, channels:]


def _triangle(factor: int) -> Tensor:
    """The kernel (4, 1, 2f, 2f) of an antialiased bilinear reduction by a whole factor, for 3 colours and a mask."""
    distance = (torch.arange(2 * factor, dtype=torch.float64) + 0.5 - factor).abs()
    line = (1 - distance / factor) / factor
    return torch.outer(line, line).float().expand(4, 1, -1, -1).contiguous()


def _shrink(image: Tensor, kernel: Tensor, factor: int) -> Tensor:
    """`resize_to_level` as a convolution. Outside the image there is nothing, so the sum is divided by the weight that
    fell inside: a fourth channel of ones carries it."""
    ones = torch.ones_like(image[:, :1])
    summed = F.conv2d(torch.cat([image, ones], dim=1), kernel, stride=factor, padding=factor // 2, groups=4)
    return summed[:, :3] / summed[:, 3:]


def _resize_matrix(size: int, out: int, like: Tensor) -> Tensor:
    """(out, size): bilinear antialiased resampling of one axis, torch's `interpolate(antialias=True)` as a matrix."""
    scale = torch.arange(1, out + 1, dtype=like.dtype, device=like.device)[:1] * size / out
    centres = (torch.arange(out, dtype=like.dtype, device=like.device) + 0.5) * scale
    pixels = torch.arange(size, dtype=like.dtype, device=like.device) + 0.5
    weights = (1 - (pixels[None] - centres[:, None]).abs() / scale.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)
