"""What stage II trains. The paper freezes the whole prior; table 6's other rows fine-tune a part of it. "predictor"
trains the initial predictor alone, on its own loss: a cheap start for small budgets. "adapters_only" holds a predictor
that is done, so that what is left for the prior to draw stays what it learns to draw."""

from dtpm_fast.model.dtpm import DTPM

_DENOISER = {
    "adapters": (),
    "adapters_only": (),
    "predictor": (),
    "encoder": ("intro.", "encoders.", "downs.", "middle_blks."),
    "decoder": ("ups.", "decoders.", "ending."),
    "encoder_decoder": ("intro.", "encoders.", "downs.", "middle_blks.", "ups.", "decoders.", "ending."),
    "all": ("",),
}


_BESIDE = {"predictor": ("predictor.",), "adapters_only": ("adapters.",)}


def freeze(model: DTPM, tune: str) -> None:
    """Leave gradients on for what trains: in stage I the denoiser, in stage II adapters, predictor, and the part of the
    denoiser that `tune` names. The semantic encoder never trains."""
    prefixes = _DENOISER["all" if model.stage == 1 else tune]
    for name, parameter in model.named_parameters():
        if name.startswith("denoiser."):
            parameter.requires_grad_(name.removeprefix("denoiser.").startswith(prefixes))
        else:
            parameter.requires_grad_(name.startswith(_BESIDE.get(tune, ("adapters.", "predictor."))))
