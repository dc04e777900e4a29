"""The folded U-Net on a CPU, through the C++ module `dtpm_fast._nafnet` (csrc/nafnet). Maps and sums are float32;
where the CPU multiplies it (Intel AMX, AVX512_BF16), products can be in bfloat16.

A block is two passes over its map, split where channel attention needs the mean of the whole picture. What the parts
compute, how weights are packed and what is fused is said in csrc/nafnet/unet.h; the folding is FoldedUNet's own.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtpm_fast.model.block import Block
from dtpm_fast.model.unet import UNet
from dtpm_fast.runtime.unet import FoldedBlock, FoldedUNet, Mean, MergedAdapter, PictureMap, own_mean

if TYPE_CHECKING:
    import dtpm_fast._nafnet as _nafnet
else:
    try:  # built where the compiler has OpenMP; without it the blocks run through PyTorch
        import dtpm_fast._nafnet as _nafnet
    except ImportError:
        _nafnet = None


PAIRED = ("amx", "avx512bf16")  # multiply pairs of inputs in bfloat16


def instruction_set(dtype: torch.dtype, *widths: int) -> str | None:
    """The best instruction set that multiplies this dtype and whose vectors these channels fill: "amx" or "avx512bf16"
    for bfloat16; "avx512", "avx2" or "portable" for float32. None where there is none, or no C++ module."""
    if _nafnet is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    sets = _nafnet.instruction_sets(bfloat16=dtype == torch.bfloat16)
    return next((name for name, lanes in sets if all(width % lanes == 0 for width in widths)), None)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Not initialised, on a cache line. NumPy asks Linux for huge pages where a map is large, PyTorch does not."""
    size, line = math.prod(shape) * dtype.itemsize, 64
    memory = torch.from_numpy(np.empty(size + line - 1, np.uint8))
    start = -memory.data_ptr() % line
    return memory[start : start + size].view(dtype).view(shape)


class Scratch(threading.local):
    """The maps of a U-Net's call, kept for the next one, because the system hands out large memory page by page. Kept
    while `kept()` is entered and no longer, for each thread."""

    def __init__(self) -> None:
        self.entered, self.maps = 0, dict[str, Tensor]()

    @contextmanager
    def kept(self) -> Iterator[None]:
        self.entered += 1
        try:
            yield
        finally:
            self.entered -= 1
            if self.entered == 0:
                self.maps.clear()

    def map(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Not initialised, overwritten when the name is asked for again."""
        size = math.prod(shape) * dtype.itemsize
        found = self.maps.get(name)
        if found is None or found.numel() < size:
            found = empty(size, dtype=torch.uint8)
            if self.entered:
                self.maps[name] = found
        return found[:size].view(dtype).view(shape)


scratch = Scratch()


def input_dtype(isa: str) -> torch.dtype:
    """Of what products multiply, and so of maps that are nothing else: the gated one, and adapters' conditions."""
    return torch.bfloat16 if isa in PAIRED else torch.float32


def _array(of_inputs: Tensor) -> np.ndarray:
    """NumPy has no bfloat16: its bits."""
    return (of_inputs.view(torch.int16) if of_inputs.dtype == torch.bfloat16 else of_inputs).numpy()


class CpuBlock(nn.Module):
    """Figure 4's block and the adapter behind it, whose share of the picture has `rank` channels: rC, filled up."""

    def __init__(self, block: Block, adapter: MergedAdapter | None, isa: str) -> None:
        super().__init__()
        self.isa, lanes = isa, _lanes(isa)
        folded = FoldedBlock(block, adapter, torch.float32)
        self.residual_bias = folded.residual_bias
        conv5, conv5_bias, adapter_in, self.rank = folded.w5, folded.b5, None, 0
        if adapter is not None:
            # y joins the last product through W_in, or through M where that is no cheaper; M without its identity, so
            # that y itself is added as exactly as in the plain block.
            rank, channels = adapter.m_in.shape
            panels = rank + -rank % (2 * lanes)
            self.rank = panels if 2 * panels < channels else rank + -rank % lanes
            joined = [F.pad(adapter.m_out, (0, self.rank - rank)), conv5]
            if 2 * panels < channels:
                adapter_in = _pack(adapter.m_in.float(), isa)
            else:
                joined.append(adapter.m_out @ adapter.m_in)
            conv5 = torch.cat([part.float() for part in joined], dim=1)
            conv5_bias = (folded.residual_bias + adapter.bias).float()
        self.register_buffer("adapter", adapter_in)
        values = {
            "conv1": _pairs(_panels_gated(folded.w1.flatten(1), lanes), isa),
            "conv1_bias": _panels_gated(folded.b1[:, None], lanes),
            "depthwise": _panels_gated(folded.w2.flatten(1), lanes),
            "depthwise_bias": _panels_gated(folded.b2[:, None], lanes),
            "conv3": _pack(folded.w3, isa), "conv3_bias": folded.b3,
            "conv4": _pairs(_panels_gated(folded.w4.flatten(1), lanes), isa),
            "conv4_bias": _panels_gated(folded.b4[:, None], lanes),
            "conv5": _pack(conv5, isa), "conv5_bias": conv5_bias,
            "attention": folded.w_sca, "attention_bias": folded.b_sca,
        }  # fmt: skip
        for name, value in values.items():
            self.register_buffer(name, value)
        self.arrays = self._arrays()

    def _arrays(self) -> dict[str, np.ndarray]:
        """The buffers' own memory, as the C++ module takes it: weights are swapped in place."""
        return {name: buffer.numpy() for name, buffer in self.named_buffers()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.arrays = self._arrays()  # of a copy: its own

    def forward(
        self, x: Tensor, rows: tuple[Tensor, Tensor, Tensor, Tensor], condition: Tensor | None, number: int, mean: Mean
    ) -> Tensor:
        """x: (B, h, w, C); rows: shift1, 1 + scale1, shift2, 1 + scale2, each (B or 1, C); condition: (B, h, w, rank)
        in `input_dtype`, None without an adapter. Returns x, which is written over."""
        shift1, scale1, shift2, scale2 = (row.contiguous().numpy() for row in rows)
        own, maps = self.arrays, x.numpy()
        gated = scratch.map("gated", *x.shape, dtype=input_dtype(self.isa))
        average = x.new_empty(len(x), 1, x.shape[-1])
        how: dict[str, Any] = {"threads": torch.get_num_threads(), "isa": self.isa}
        _nafnet.first_pass(
            maps, scale1, shift1, own["conv1"], own["conv1_bias"], own["depthwise"], own["depthwise_bias"],
            _array(gated), average.numpy(), **how,
        )  # fmt: skip
        if mean is not own_mean:
            average = mean(number, gated.float())
        _nafnet.second_pass(
            maps, _array(gated), average.numpy(), own["attention"], own["attention_bias"],
            own["conv3"], own["conv3_bias"], scale2, shift2, own["conv4"], own["conv4_bias"],
            own["conv5"], own["conv5_bias"], None if condition is None else _array(condition), own.get("adapter"),
            **how,
        )  # fmt: skip
        return x


class CpuPictureMap(PictureMap):
    """`PictureMap` in C++."""

    def __init__(self, weight: Tensor, bias: Tensor, isa: str, of_inputs: bool = False) -> None:
        """`of_inputs`: the map is one of products' inputs, in `input_dtype`."""
        super().__init__(weight, bias, torch.float32)
        self.isa, self.channels = isa, len(weight)
        self.out_dtype = input_dtype(isa) if of_inputs else torch.float32
        self.register_buffer("weight", _panels(self.weight.permute(0, 2, 3, 1).flatten(1), _lanes(isa)))

    def forward(self, picture: Tensor, instead: Tensor | None = None) -> Tensor:
        """With `instead` the map is a step's, and lasts until the next step; without, a picture's."""
        b, _, height, width = picture.shape
        shape = (b, height, width, self.channels)
        out = (empty(*shape, dtype=self.out_dtype) if instead is None
               else scratch.map("intro", *shape, dtype=self.out_dtype))  # fmt: skip
        addend = self.bias if instead is None else instead
        _nafnet.intro(
            picture.float().contiguous().numpy(), self.weight.numpy(), addend.numpy(), _array(out),
            threads=torch.get_num_threads(), isa=self.isa,
        )  # fmt: skip
        return out


class CpuUNet(FoldedUNet):
    """`FoldedUNet` of C++ blocks. Its channels have to fill vectors (`instruction_set`)."""

    def __init__(self, unet: UNet, adapters: dict[str, MergedAdapter], isa: str) -> None:
        super().__init__(unet, adapters, torch.float32, lambda block, adapter, _: CpuBlock(block, adapter, isa))
        self.isa = isa
        for name, weight in list(self.named_buffers(recurse=False)):
            if name.startswith("down") and name.endswith("_weight"):  # outputs by (row, column, channel)
                self.register_buffer(name, _pack(weight.permute(0, 2, 3, 1).flatten(1), isa))
            elif name.startswith("up"):
                self.register_buffer(name, _pack(weight, isa))
        self.register_buffer("ending_weight", self.ending_weight.permute(0, 2, 3, 1).contiguous())

    def forward(self, h: Tensor, rows: Tensor, bias_maps: dict[str, Tensor], mean: Mean = own_mean) -> Tensor:
        """As FoldedUNet's, but for bias_maps, which are the blocks' conditions."""
        with scratch.kept():
            return super().forward(h, rows, bias_maps, mean)

    def _down(self, h: Tensor, i: int) -> Tensor:
        b, height, width, c = h.shape
        out = scratch.map(f"down{i}", b, height // 2, width // 2, 2 * c)
        weight, bias = getattr(self, f"down{i}_weight"), getattr(self, f"down{i}_bias")
        _nafnet.down(
            h.numpy(), weight.numpy(), bias.numpy(), out.numpy(), threads=torch.get_num_threads(), isa=self.isa
        )
        return out

    def _up(self, h: Tensor, i: int, skip: Tensor) -> Tensor:
        """The skip, written over."""
        weight = getattr(self, f"up{i}")
        _nafnet.up(h.numpy(), weight.numpy(), skip.numpy(), threads=torch.get_num_threads(), isa=self.isa)
        return skip

    def _ending(self, h: Tensor) -> Tensor:
        b, height, width, _ = h.shape
        out = h.new_empty(b, 3, height, width)
        weight, bias = self.ending_weight.numpy(), self.ending_bias.numpy()
        _nafnet.ending(h.numpy(), weight, bias, out.numpy(), threads=torch.get_num_threads(), isa=self.isa)
        return out


def native_update(row: Tensor, x: Tensor, output: Tensor, previous: Tensor, y_eps: Tensor) -> tuple[Tensor, Tensor]:
    """`sampler.update` in one pass over its pictures, all float32."""
    following, x0 = (torch.empty(y_eps.shape, dtype=torch.float32) for _ in range(2))
    _nafnet.update(
        row.numpy(), x.contiguous().numpy(), output.contiguous().numpy(), previous.contiguous().numpy(),
        y_eps.contiguous().numpy(), following.numpy(), x0.numpy(), threads=torch.get_num_threads(),
    )  # fmt: skip
    return following, x0


def _lanes(isa: str) -> int:
    return dict(_nafnet.instruction_sets(bfloat16=isa in PAIRED))[isa]


def _pack(weight: Tensor, isa: str) -> Tensor:
    """A product's weights (outputs, inputs) for an instruction set."""
    return _pairs(_panels(weight, _lanes(isa)), isa)


def _panels(weight: Tensor, lanes: int) -> Tensor:
    """(outputs, inputs) to (panels, inputs, 2 lanes), outputs padded with zeros."""
    outputs, inputs = weight.shape
    padded = F.pad(weight, (0, 0, 0, -outputs % (2 * lanes)))
    return padded.view(-1, 2 * lanes, inputs).transpose(1, 2).contiguous()


def _panels_gated(weight: Tensor, lanes: int) -> Tensor:
    """(2C, inputs) to (panels, inputs, 2 lanes), a panel's outputs being `lanes` of the first half and their partners
    of the second."""
    outputs, inputs = weight.shape
    return weight.view(2, outputs // 2 // lanes, lanes, inputs).permute(1, 3, 0, 2).flatten(2).contiguous()


def _pairs(panels: Tensor, isa: str) -> Tensor:
    """Panels as they are, or for products in bfloat16 (panels, inputs / 2, 2 lanes): two inputs in bfloat16 in the bits
    of a float32, inputs padded with zeros to 32."""
    if isa not in PAIRED:
        return panels
    count, inputs, outputs = panels.shape
    padded = F.pad(panels, (0, 0, 0, -inputs % 32)).to(torch.bfloat16)
    pairs = padded.view(count, -1, 2, outputs).transpose(2, 3).contiguous()
    return pairs.view(torch.float32).squeeze(3)
