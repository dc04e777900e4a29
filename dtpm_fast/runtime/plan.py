"""What a step really has to compute, and everything else done once: the fixed-step plan.

    conditions = plan.prepare(y_d)                                        once for a picture
    x, x0 = plan.step(x, x0, table[i], time_rows[i], conditions)          S times, nothing but tensors in and out

Both are plain modules without Python side effects, so that torch.compile, torch.export and CUDA graphs can take them.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtpm_fast.diffusion import prior_gamma
from dtpm_fast.errors import UserError
from dtpm_fast.model.adapter import CGAdapter, resize_to_level
from dtpm_fast.model.block import DenoisingBlock, NAFBlock
from dtpm_fast.model.denoiser import sinusoid
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.model.unet import UNet
from dtpm_fast.runtime.cpu_unet import CpuBlock, CpuPictureMap, CpuUNet, instruction_set, native_update, scratch
from dtpm_fast.runtime.sampler import C_IN, Conditions, Steps, sample, update
from dtpm_fast.runtime.unet import (
    FoldedBlock,
    FoldedUNet,
    KernelBlock,
    KernelUNet,
    Mean,
    MergedAdapter,
    PictureMap,
    StackedPictureMaps,
    own_mean,
)

# What the U-Nets run through: PyTorch's operators, the fused Triton kernels, or the C++ blocks for CPUs.
Form = Literal["folded", "kernels", "native"]


@dataclass(frozen=True)
class Hoisted:
    """One thing that leaves the step: what, how often it is computed now, and the bytes that it holds."""

    what: str
    once_per: str  # "model", "model and S" or "picture"
    bytes: int


class Prepare(nn.Module):
    """y_d to the conditions of all steps: the initial predictor, the semantic code, and what follows from them."""

    def __init__(
        self, model: DTPM, step: "Step", adapters: dict[str, MergedAdapter], dtype: torch.dtype,
        form: Form,
    ) -> None:  # fmt: skip
        super().__init__()
        self.projection: Tensor
        self.affine_rows: Tensor
        self.config, self.dtype = model.config, dtype
        self.maps = nn.ModuleDict()  # convolutions of pictures
        self.semantic = None if model.semantic is None else model.semantic.folded()
        self.code_mlp = model.denoiser.code_mlp
        self.predictor: FoldedUNet | None = None
        if model.predictor is not None:
            self.predictor = _unet(form, model.predictor, {}, dtype)
            blocks = [cast(NAFBlock, model.predictor.get_submodule(position)) for position in self.predictor.positions]
            affine = [p.detach() for b in blocks for norm in (b.norm1, b.norm2) for p in (norm.bias, norm.weight)]
            self.register_buffer("affine_rows", self.predictor.rows_of(torch.cat(affine)[None]))
            self.maps["predictor_intro"] = _map(form, model.predictor.intro.weight, model.predictor.intro.bias, dtype)
        intro = model.denoiser.intro
        self.maps["intro"] = _map(form, intro.weight[:, 3:], intro.bias, dtype)
        projections = [_modulation(model, position).weight.detach() for position in step.unet.positions]
        self.register_buffer("projection", torch.cat(projections))
        self.levels: dict[str, int] = {}
        at_level: dict[int, list[tuple[Tensor, Tensor]]] = {}
        width = model.denoiser.intro.out_channels
        for (position, channels), block in zip(step.unet.positions.items(), step.unet.blocks, strict=True):
            if position in adapters:
                level = self.levels[position] = (channels // width).bit_length() - 1
                own, adapter = cast(FoldedBlock | KernelBlock | CpuBlock, block), adapters[position]
                if isinstance(own, KernelBlock):  # on a GPU all conditions of a level are one product
                    at_level.setdefault(level, []).append(adapter.condition(own.residual_bias, own.rank))
                elif isinstance(own, CpuBlock):
                    weight, bias = adapter.condition(own.residual_bias, own.rank)
                    self.maps[_key(position)] = CpuPictureMap(weight, bias, own.isa, of_inputs=True)
                else:
                    self.maps[_key(position)] = _map(form, *adapter.bias_map(own.residual_bias), dtype)
        stacks = {str(level): StackedPictureMaps(maps, dtype) for level, maps in at_level.items()}
        self.stacks = nn.ModuleDict(stacks)

    def forward(self, y_d: Tensor) -> Conditions:
        """y_d: (B, 3, H, W) in [-1, 1]."""
        y_eps = self.predict(y_d)
        return self.conditions(y_d, y_eps, self.semantic_code(y_d, y_eps))

    def predict(self, y_d: Tensor) -> Tensor:
        """y_eps, the initial predictor's picture."""
        return y_d if self.predictor is None else y_d + self.residual(y_d)

    def residual(self, y_d: Tensor, mean: Mean = own_mean) -> Tensor:
        """What the initial predictor adds to y_d."""
        assert self.predictor is not None
        h = self.maps["predictor_intro"](y_d)
        return self.predictor(h, self.affine_rows, {}, mean).to(y_d.dtype)

    def semantic_code(self, y_d: Tensor, y_eps: Tensor) -> Tensor | None:
        """(B, C), None without a semantic encoder."""
        if self.semantic is None:
            return None
        return self.semantic(y_eps if self.config.code_source == "predicted" else y_d)

    def conditions(self, y_d: Tensor, y_eps: Tensor, code: Tensor | None) -> Conditions:
        """ "y_eps" (B, 3, H, W); "intro", the condition's half of the intro convolution, and "adapter.<position>", the
        adapters' bias maps, (B, h, w, C) each, of C++ blocks and kernels their conditions (B, h, w, rank);
        "code_rows" (B, sum of 4C), the code's share of the modulation."""
        found = {"y_eps": y_eps, "intro": self.maps["intro"](y_d if self.config.condition == "degraded" else y_eps)}
        if code is not None and self.code_mlp is not None:
            found["code_rows"] = F.linear(self.code_mlp(code), self.projection)
        resized = {level: resize_to_level(y_eps, level) for level in dict.fromkeys(self.levels.values())}
        stacked = {level: iter(stack(resized[int(level)])) for level, stack in self.stacks.items()}
        for position, level in self.levels.items():
            own = next(stacked[str(level)]) if stacked else self.maps[_key(position)](resized[level])
            found[f"adapter.{position}"] = own
        return found


class Step(nn.Module):
    """One evaluation of the denoiser and the sampler's update behind it."""

    def __init__(
        self, model: DTPM, adapters: dict[str, MergedAdapter], dtype: torch.dtype,
        form: Form,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dtype = torch.float32 if form == "native" else dtype  # of maps
        self.unet = _unet(form, model.denoiser, adapters, dtype)
        intro = model.denoiser.intro
        assert intro.bias is not None
        no_bias = torch.zeros_like(intro.bias)  # it is in the condition's half
        self.intro = _map(form, intro.weight[:, :3], no_bias, dtype)
        self.update = update
        if form == "native" and intro.weight.dtype == torch.float32:
            self.update = native_update
        elif form == "kernels":  # imported here, as in KernelBlock
            from dtpm_fast.kernels import sampler_update

            self.update = sampler_update

    def forward(
        self, x: Tensor, previous: Tensor, row: Tensor, time_row: Tensor, conditions: Conditions
    ) -> tuple[Tensor, Tensor]:
        """x, previous: (B, 3, H, W), this step's x and the step before's x0; row: (7,) of the sampler's table;
        time_row: (1, sum of 4C). Returns the next x (without fresh noise) and this step's x0."""
        output = self.network(x, row, time_row, conditions)
        return self.update(row, x, output, previous, conditions["y_eps"])

    def network(
        self, x: Tensor, row: Tensor, time_row: Tensor, conditions: Conditions, mean: Mean = own_mean
    ) -> Tensor:
        """The denoiser's output F (B, 3, H, W)."""
        h = self.intro(row[C_IN] * x, conditions["intro"])
        rows = time_row if "code_rows" not in conditions else time_row + conditions["code_rows"]
        maps = {key[len("adapter.") :]: value for key, value in conditions.items() if key.startswith("adapter.")}
        return self.unet(h, self.unet.rows_of(rows), maps, mean).to(x.dtype)


class Plan:
    """`prepare`, `step`, and their constants, for one model and one sampler. It is a `Stepper`.

    Args:
        model: of stage II, in evaluation mode, on its device.
        steps: of the sampler.
        dtype: of maps and weights; x, y_eps and the sampler's update stay in the model's own.
        form: "folded", PyTorch's operators; "kernels", the fused kernels (channel attention takes its own mean then);
            "native", the C++ blocks for a CPU (`native_form` says where they run), whose maps are float32 always.

    Raises `UserError` for a model of stage I and for gated adapters.
    """

    def __init__(self, model: DTPM, steps: Steps, dtype: torch.dtype = torch.float32, form: Form = "folded") -> None:
        if model.stage != 2:
            raise UserError(
                f"the plan restores pictures and needs a model of stage 2, this one is of stage {model.stage}"
            )
        self.steps, self.dtype, self.form = steps, dtype, form
        positions = list(model.denoiser.positions())
        present = [position for position in positions if _module(position) in model.adapters]
        adapters = {p: MergedAdapter(cast(CGAdapter, model.adapters[_module(p)])) for p in present}
        self.step_module = Step(model, adapters, dtype, form).eval()
        self.prepare_module = Prepare(model, self.step_module, adapters, dtype, form).eval()
        own = next(model.denoiser.parameters())
        self.table = steps.table.to(own)
        self.time_rows = _time_rows(model, steps).to(own)

    def prepare(self, y_d: Tensor) -> Conditions:
        return self.prepare_module(y_d)

    def step(self, x: Tensor, previous: Tensor, i: int, conditions: Conditions) -> tuple[Tensor, Tensor]:
        return self.step_module(x, previous, self.table[i], self.time_rows[i : i + 1], conditions)

    def restore(self, y_d: Tensor, noise: Tensor) -> Tensor:
        with scratch.kept():
            return sample(self, self.prepare(y_d), noise)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that depends on the model's weights, by name. Copying another plan's tensors over them changes the
        weights in place (`TaskSwap`): compiled code and captured graphs go on with the new ones."""
        found = {"time_rows": self.time_rows, "table": self.table}
        for name, module in (("step", self.step_module), ("prepare", self.prepare_module)):
            found.update({f"{name}.{key}": value for key, value in module.state_dict().items()})
        return found

    def of(self, model: DTPM, steps: Steps) -> "Plan":
        """A plan of the same kind for another model, not compiled."""
        return Plan(model, steps, self.dtype, self.form)

    def hoisted(self, conditions: Conditions | None = None) -> list[Hoisted]:
        """What left the step, with bytes; those of a picture for the given conditions (else 0)."""
        given = conditions or {}
        step, prepare = self.step_module, self.prepare_module
        names = (".matrix", ".adapter", ".adapter_matrix")
        matrices = [b for name, b in step.unet.named_buffers() if name.endswith(names)]
        maps = [value for key, value in given.items() if key.startswith("adapter.")]
        return [
            Hoisted(
                "time embedding to the modulation rows of all blocks and steps", "model and S", _bytes(self.time_rows)
            ),
            Hoisted("scalings, DDIM update and clipping, as one row a step", "model and S", _bytes(self.table)),
            Hoisted("adapters merged, M = I + W_out W_in", "model", _bytes(*matrices)),
            Hoisted("beta, gamma, PixelShuffle's order, LN's affine and batch norms, in the weights", "model", 0),
            Hoisted("semantic code to its share of the modulation rows", "picture", _bytes(given.get("code_rows"))),
            Hoisted("the condition's half of the intro convolution", "picture", _bytes(given.get("intro"))),
            Hoisted(f"what the picture adds to {len(prepare.levels)} adapters", "picture", _bytes(*maps)),
        ]


def native_form(model: DTPM, dtype: torch.dtype) -> str | None:
    """The instruction set that the C++ blocks take for this model and dtype; None where they cannot run it."""
    predictor = [model.config.predictor_width] if model.predictor is not None else []
    return instruction_set(dtype, model.config.width, *predictor)


def _map(form: Form, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PictureMap:
    assert bias is not None  # every convolution of a picture has one
    isa = instruction_set(dtype, len(weight)) if form == "native" else None
    return PictureMap(weight, bias, dtype) if isa is None else CpuPictureMap(weight, bias, isa)


def _unet(form: Form, unet: UNet, adapters: dict[str, MergedAdapter], dtype: torch.dtype) -> FoldedUNet:
    if form == "native":
        isa = instruction_set(dtype, unet.intro.out_channels)
        if isa is None:
            raise ValueError(f"the C++ blocks cannot run {unet.intro.out_channels} channels in {dtype} here")
        return CpuUNet(unet, adapters, isa)
    return (KernelUNet if form == "kernels" else FoldedUNet)(unet, adapters, dtype)


def _time_rows(model: DTPM, steps: Steps) -> Tensor:
    """(S, sum of 4C) float64: every block's shift1, 1 + scale1, shift2, 1 + scale2 as far as gamma gives them."""
    denoiser, own = model.denoiser, next(model.denoiser.parameters())
    gammas = prior_gamma(steps.gammas, model.config).to(own)
    e = denoiser.time_mlp(sinusoid(1000 * gammas.sqrt(), denoiser.embedding)).detach().double()
    rows = []
    for position, channels in denoiser.positions().items():
        projection = _modulation(model, position)
        row = F.linear(e, projection.weight.detach().double(), projection.bias.detach().double())
        one = torch.ones(channels, dtype=row.dtype, device=row.device)
        rows.append(row + torch.cat([0 * one, one, 0 * one, one]))
    return torch.cat(rows, dim=1)


def _modulation(model: DTPM, position: str) -> nn.Linear:
    return cast(DenoisingBlock, model.denoiser.get_submodule(position)).modulation


def _module(position: str) -> str:
    return position.replace(".", "_")


def _key(position: str) -> str:
    return "adapter_" + _module(position)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
