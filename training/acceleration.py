"""Fused kernels and torch.compile: what `auto` takes on this device, and why. On CUDA each is first held against the
plain form, because neither may cost a run its numbers; what fails there is left out, with a line that says so."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dtpm_fast.device import without_tf32
from dtpm_fast.model.block import Block, DenoisingBlock, use_kernels
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.training.precision import Precision

TIMES_EAGER = 3.0  # largest error of a fused block, in errors of the plain block in the same precision
ROUNDING = 1e-5  # relative; where the plain block's own error is (next to) nothing
LOSS = 0.02  # largest relative difference of a compiled loss: what 16-bit rounding in another order may do


def choose_kernels(name: str, model: DTPM, precision: Precision) -> tuple[bool, str]:
    """Whether the denoising blocks run through the fused kernels, and why, for the setting `kernels`."""
    if name != "auto":
        return name == "fused", f"{name}: as asked"
    if precision.device.type != "cuda":
        return False, "reference: the fused kernels are for CUDA"
    return checked_kernels(model, precision)


def checked_kernels(model: DTPM, precision: Precision) -> tuple[bool, str]:
    """The fused kernels, if they agree with the plain block on a random block of each kind and width that the model
    has, trained or frozen as it is there."""
    worst = 0.0
    blocks = {
        (block.conv1.in_channels, not block.conv1.weight.requires_grad, type(block).__name__): block
        for block in model.modules()
        if isinstance(block, Block)
    }
    for (channels, frozen, _), block in sorted(blocks.items(), key=lambda item: item[0]):
        at = f"at {channels} channels{', frozen' if frozen else ''}"
        try:
            fused, plain = block_errors(block, precision)
        except Exception as error:  # whatever a compiler or a driver raises: the run goes on without
            return False, f"reference: the fused kernels failed here {at} ({_first_line(error)})"
        if not fused <= TIMES_EAGER * plain + ROUNDING:  # NaN is not
            return False, f"reference: {at} the fused kernels' error is {fused:.2g}, the plain block's {plain:.2g}"
        worst = max(worst, fused / max(plain, ROUNDING))
    return True, f"fused: they agree with the plain blocks here (error {worst:.1f} times theirs)"


def block_errors(like: Block, precision: Precision, side: int = 24) -> tuple[float, float]:
    """Largest relative error of a random block's output and gradients (of a frozen one's input alone, for which there
    are other kernels) in the run's precision, and of its output as validation computes it, in float32 and without
    gradients, against the plain block in float32: (fused, plain)."""
    generator = torch.Generator().manual_seed(0)
    block, frozen, channels = copy.deepcopy(like), not like.conv1.weight.requires_grad, like.conv1.in_channels
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
    block.to(precision.device).to(memory_format=torch.channels_last).requires_grad_(not frozen)
    x = torch.randn(2, channels, side, side + 3, generator=generator).to(precision.device)
    condition = []
    if isinstance(block, DenoisingBlock):
        condition = [torch.randn(2, block.modulation.in_features, generator=generator).to(precision.device)]
    weight = torch.randn(x.shape, generator=generator).to(precision.device)

    def run(fused: bool, exact: bool = False) -> list[Tensor]:
        use_kernels(block, fused)
        given = x.to(memory_format=torch.channels_last).requires_grad_()
        with precision.autocast() if not exact else torch.autocast(precision.device.type, enabled=False):
            output = block(given, *condition)
        inputs = [given, *(parameter for parameter in block.parameters() if not frozen)]
        gradients = torch.autograd.grad((output.float() * weight).sum(), inputs)
        with torch.no_grad():
            return [output.detach(), block(given, *condition), *gradients]

    with without_tf32():  # TF32 would be the plain block's error as well
        wanted = run(False, exact=True)
    fused, plain = (
        max(float((a.float() - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(found, wanted, strict=True))
        for found in (run(True), run(False))
    )
    return fused, plain


def choose_compile(
    value: bool | str, objective: nn.Module, batch: Callable[[], Sequence[Tensor]], precision: Precision
) -> tuple[nn.Module, str]:
    """The loss to train with, compiled or not, and why, for the setting `compile`; `batch` makes one of the run's."""
    if value is False:
        return objective, "off: as asked"
    if value is True:
        return torch.compile(objective), "on: as asked"  # type: ignore[return-value]
    if precision.device.type != "cuda":
        return objective, "off: it is no faster on a CPU"
    return checked_compile(objective, batch(), precision)


def checked_compile(objective: nn.Module, batch: Sequence[Tensor], precision: Precision) -> tuple[nn.Module, str]:
    """The compiled loss, if it gives the plain one's value on this batch, and gradients that are numbers."""
    compiled: nn.Module = torch.compile(objective)  # type: ignore[assignment]
    try:
        with torch.no_grad(), precision.autocast():
            wanted = objective(*batch)
        with precision.autocast():
            found = compiled(*batch)
        precision.scaler.scale(found).backward()
        trained = [p for p in objective.parameters() if p.grad is not None]
        finite = precision.scaler.is_enabled() or all(bool(torch.isfinite(p.grad).all()) for p in trained)  # type: ignore[arg-type]
    except Exception as error:  # as above
        return objective, f"off: torch.compile failed here ({_first_line(error)})"
    finally:
        objective.zero_grad(set_to_none=True)
    if not finite or not torch.isclose(found, wanted, rtol=LOSS):
        return objective, f"off: the compiled loss is {found.item():.5g}, the plain one {wanted.item():.5g}"
    return compiled, f"on: the compiled loss agrees with the plain one ({found.item():.5g}, {wanted.item():.5g})"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
