"""16-bit training: autocast, and for float16 a loss scale that keeps small gradients above zero."""

import torch

from dtpm_fast.errors import UserError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """`precision` of the config on a device; "auto" is bfloat16 on CUDA and float32 on the CPU.

    Raises `UserError` for float16 on the CPU.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "auto":
            native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            name = "bfloat16" if native else "float32"
        if name == "float16" and device.type != "cuda":
            raise UserError("precision = 'float16': trains on CUDA only; use bfloat16 or float32 on the CPU")
        self.name, self.device = name, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "float16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, _DTYPES.get(self.name, torch.bfloat16), enabled=self.name in _DTYPES)

    def overflow_is_normal(self) -> bool:
        """Whether gradients that are not finite only make the scaler skip a step and halve the scale."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1
