"""Every choice of the method in one place: what the paper fixes, and what it leaves open with its alternatives.

A `Config` has three groups whose field names are distinct, so that a TOML file may use the sections `[model]`,
`[diffusion]`, `[train]` or none, and `--set key=value` names a field without its group.
"""

import dataclasses
import json
import math
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dtpm_fast.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class ModelConfig:
    """The networks. `preset` fills every field that is not given itself."""

    preset: Literal["tiny", "light", "base"] = "light"
    width: int = 32
    encoder_blocks: tuple[int, ...] = (1, 1, 2, 4)
    middle_blocks: int = 2
    decoder_blocks: tuple[int, ...] = (1, 1, 1, 1)
    embedding: int = 128  # length of the conditioning vector e
    # Initial predictor g; "none" is table 6's row "w/o Initial Predictor": y_eps = y_d.
    predictor: Literal["unet", "none"] = "unet"
    predictor_width: int = 16
    predictor_encoder_blocks: tuple[int, ...] = (1, 1, 1, 2)
    predictor_middle_blocks: int = 1
    predictor_decoder_blocks: tuple[int, ...] = (1, 1, 1, 1)
    # Semantic code: the paper's ResNet-18 (needs torchvision's weights), the small encoder that ships with this
    # package, or "none": table 6's row "w/o Semantic Code".
    semantic_code: Literal["resnet18", "compact", "none"] = "compact"
    # Stage II takes the code from y_eps (detached) or from y_d; its condition channels are y_d (eq. 6) or y_eps.
    code_source: Literal["predicted", "degraded"] = "predicted"
    condition: Literal["degraded", "predicted"] = "degraded"
    # CG-Adapters (eq. 5). "none" belongs to table 6's rows "Fine-tune ... w/o Adapters".
    adapter_positions: Literal["all", "encoder", "decoder", "none"] = "all"
    adapter_ratio: float = 0.25  # the paper's r
    adapter_kind: Literal["linear", "gated"] = "linear"  # a gated adapter cannot be merged for inference
    # The denoiser's output: EDM's preconditioning in variance-preserving form, or the paper's raw epsilon.
    parameterization: Literal["preconditioned", "eps"] = "preconditioned"
    sigma_data: float = 0.1  # standard deviation of a residual on [-1, 1]
    prior_sigma_data: float = 0.0  # stage I's, where stage II has its own (`diffusion.prior_gamma`); 0: no other


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule (eq. 1, 2), the objective (eq. 4, 6) and the sampler."""

    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    # p(gamma) of eq. 4: uniform in sqrt(gamma) between two neighbours of the schedule, or on the schedule itself.
    gamma_sampling: Literal["continuous", "discrete"] = "continuous"
    loss: Literal["l1", "l2"] = "l1"
    # Weight of a sample in the loss: none as in the paper; min-SNR (Hang et al. 2023) on the epsilon loss; or EDM's
    # (Karras et al. 2022), equal for an error of the preconditioned network at every noise level.
    loss_weighting: Literal["none", "min_snr", "edm"] = "none"
    spacing: Literal["trailing", "leading", "linspace"] = "trailing"
    eta: float = 0.0
    clip: bool = True  # keep y + x0 inside [-1, 1] at every step


@dataclass(frozen=True)
class TrainConfig:
    """One run of training. The defaults are the paper's, but for `rotate45`, which it has on; it says nothing of
    `clip_grad` and `ema`. `steps` is its stage I (stage II: 600,000)."""

    steps: int = 800_000
    batch_size: int = 32  # of one process; an iteration sees batch_size * accumulate * processes samples
    accumulate: int = 1  # batches of a process whose gradients are averaged into one iteration
    crop: int = 256
    # The paper's, or Muon for the weights that mix channels and Adam for the rest.
    optimizer: Literal["adam", "muon"] = "adam"
    lr: float = 1.5e-4
    lr_min: float = 1e-7
    warmup: int = 0  # iterations of linear warm-up before the cosine
    clip_grad: float = 1.0  # largest gradient norm; 0 turns clipping off
    ema: float = 0.9999  # reached gradually: min(ema, (1 + step) / (10 + step))
    # What stage II trains of the prior: nothing ("adapters", the paper), or table 6's fine-tuning rows; "all" is for
    # "w/o Stage I Training". "predictor" trains the initial predictor alone, on its own loss: a cheap start;
    # "adapters_only" the adapters behind a predictor that stays as --init gave it.
    tune: Literal["adapters", "adapters_only", "predictor", "encoder", "decoder", "encoder_decoder", "all"] = "adapters"
    predictor_loss: float = 0.0  # weight of a loss on the predictor itself; 0 as in the paper
    # That loss's norm. L1 lets a predictor rest at y_eps = y_d where a degradation leaves most pixels as they are; L2
    # sees the worst samples above all; "psnr" is NAFNet's: every sample's dB count the same, whatever it still lacks.
    predictor_norm: Literal["l1", "l2", "psnr"] = "l1"
    synthetic_share: float = 0.5  # share of synthetic samples when --synthetic stands beside real pairs
    strength: float = 1.0  # of the synthetic degradations
    clean_share: float = 0.0  # share of stage II's samples whose degraded picture is the clean one; 0 as in the paper
    noise_share: float = (
        0.0  # share of them, clean or not, whose degraded picture has a sensor's noise; 0 as in the paper
    )
    jpeg_share: float = 0.0  # share of them, noisy or not, whose degraded picture was a JPEG file; 0 as in the paper
    rotate45: bool = False
    seed: int = 0
    # auto: bfloat16 on CUDA, float32 on the CPU; float16 on CUDA only, with a loss scale.
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # The denoising blocks as written in model/block.py, or through the fused kernels; torch.compile of the whole loss.
    # auto: both on CUDA, each once it has been held against the plain form there, and neither on the CPU.
    kernels: Literal["auto", "reference", "fused"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    activation_checkpointing: bool = False  # blocks are computed again in the backward pass: less memory, more time
    deterministic: bool = False  # the same bits on every run on CUDA, or an error; the CPU needs no switch
    workers: int = 2  # processes that load data for one training process
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    validate_every: int = 1000
    validation_images: int = 8
    validation_steps: int = 4  # S of the sampler during validation
    log_every: int = 20


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "width": 16,
        "encoder_blocks": (1, 1, 1),
        "middle_blocks": 1,
        "decoder_blocks": (1, 1, 1),
        "embedding": 64,
        "predictor_width": 8,
        "predictor_encoder_blocks": (1, 1, 1),
        "predictor_middle_blocks": 1,
        "predictor_decoder_blocks": (1, 1, 1),
        "batch_size": 8,  # a run that a laptop finishes in a minute
        "crop": 96,
    },
    "light": {},
    "base": {
        "width": 64,
        "encoder_blocks": (1, 1, 1, 28),
        "middle_blocks": 1,
        "decoder_blocks": (1, 1, 1, 1),
        "embedding": 128,
        "predictor_width": 32,
        "predictor_encoder_blocks": (1, 1, 2, 4),
        "predictor_middle_blocks": 2,
        "predictor_decoder_blocks": (1, 1, 1, 1),
        "semantic_code": "resnet18",
    },
}


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @staticmethod
    def of(**values: Any) -> "Config":
        """A config from field names of any group, the preset's values first. Raises `UserError` for an unknown name or
        a value of the wrong kind."""
        preset = values.get("preset", "light")
        if preset not in PRESETS:
            raise UserError(f"preset = {preset!r}: choose one of {', '.join(PRESETS)}")
        merged = {**PRESETS[preset], **values}
        groups: dict[str, dict[str, Any]] = {}
        for key, value in merged.items():
            group, annotation = _field(key)
            groups.setdefault(group, {})[key] = _converted(key, value, annotation)
        config = Config(**{f.name: f.type(**groups.get(f.name, {})) for f in dataclasses.fields(Config)})  # type: ignore[operator]
        _check(config)
        return config

    @staticmethod
    def load(
        file: Path | str | None, settings: Iterable[str] = (), defaults: Mapping[str, Any] | None = None
    ) -> "Config":
        """A config from defaults, then a TOML file, then `key=value` strings, each overriding the ones before."""
        values = dict(defaults or {})
        if file is not None:
            values.update(_read_toml(Path(file)))
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals:
                raise UserError(f"--set {setting}: write key=value")
            values[key.strip()] = _parsed(text.strip())
        return Config.of(**values)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Config":
        """The config that `to_json` wrote; settings of training that no longer exist are left out, because weights
        outlive them. Raises `UserError` when the text is something else."""
        try:
            groups = json.loads(text)
            train = {key: value for key, value in groups["train"].items() if key in typing.get_type_hints(TrainConfig)}
            return Config.of(**groups["model"], **groups["diffusion"], **train)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"not a dtpm-fast config ({error})") from error


_GROUPS = {"model": ModelConfig, "diffusion": DiffusionConfig, "train": TrainConfig}


def _field(key: str) -> tuple[str, Any]:
    for group, kind in _GROUPS.items():
        hints = typing.get_type_hints(kind)
        if key in hints:
            return group, hints[key]
    names = sorted(name for kind in _GROUPS.values() for name in typing.get_type_hints(kind))
    raise UserError(f"unknown setting {key!r}; the settings are {', '.join(names)}")


def _converted(key: str, value: Any, annotation: Any) -> Any:
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        if value in choices:
            return value
        raise UserError(f"{key} = {value!r}: choose one of {', '.join(choices)}")
    if typing.get_origin(annotation) is typing.Union:  # bool or auto
        if type(value) is bool or value == "auto":
            return value
        raise UserError(f"{key} = {value!r}: choose one of true, false, auto")
    if typing.get_origin(annotation) is tuple:
        if isinstance(value, (list, tuple)) and value and all(type(v) is int and v > 0 for v in value):
            return tuple(value)
        raise UserError(f"{key} = {value!r}: expected a list of positive whole numbers, as in [1, 1, 2, 4]")
    if annotation is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise UserError(f"{key} = {value}: must be finite")
        return float(value)
    if type(value) is annotation:
        return value
    raise UserError(f"{key} = {value!r}: expected {annotation.__name__}")


def _check(config: Config) -> None:
    model, diffusion, train = config.model, config.diffusion, config.train
    at_least_one = {
        "width": model.width, "middle_blocks": model.middle_blocks, "embedding": model.embedding,
        "predictor_width": model.predictor_width, "predictor_middle_blocks": model.predictor_middle_blocks,
        "timesteps": diffusion.timesteps, "steps": train.steps, "batch_size": train.batch_size,
        "accumulate": train.accumulate, "crop": train.crop,
        "checkpoint_every": train.checkpoint_every, "keep_checkpoints": train.keep_checkpoints,
        "validate_every": train.validate_every, "validation_steps": train.validation_steps,
        "log_every": train.log_every,
    }  # fmt: skip
    not_negative = {
        "workers": train.workers, "clip_grad": train.clip_grad, "predictor_loss": train.predictor_loss,
        "lr_min": train.lr_min, "warmup": train.warmup, "validation_images": train.validation_images,
        "seed": train.seed, "strength": train.strength, "prior_sigma_data": model.prior_sigma_data,
    }  # fmt: skip
    for name, value in at_least_one.items():
        if value < 1:
            raise UserError(f"{name} = {value}: must be at least 1")
    for name, number in not_negative.items():
        if number < 0:
            raise UserError(f"{name} = {number}: must not be negative")
    for name, number in {"lr": train.lr, "sigma_data": model.sigma_data, "adapter_ratio": model.adapter_ratio}.items():
        if not number > 0:
            raise UserError(f"{name} = {number}: must be greater than 0")
    if diffusion.loss_weighting == "edm" and model.parameterization != "preconditioned":
        raise UserError("loss_weighting = edm: weighs the preconditioned network; set parameterization=preconditioned")
    if not 0 < diffusion.beta_start <= diffusion.beta_end < 1:
        raise UserError("beta_start and beta_end: need 0 < beta_start <= beta_end < 1")
    shares = {
        "eta": diffusion.eta, "ema": train.ema, "synthetic_share": train.synthetic_share,
        "clean_share": train.clean_share, "noise_share": train.noise_share, "jpeg_share": train.jpeg_share,
    }  # fmt: skip
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"{name} = {share}: must lie between 0 and 1")
    for who, encoder, decoder in (
        ("", model.encoder_blocks, model.decoder_blocks),
        ("predictor_", model.predictor_encoder_blocks, model.predictor_decoder_blocks),
    ):
        if len(encoder) != len(decoder):
            raise UserError(f"{who}encoder_blocks and {who}decoder_blocks: need equally many levels")
    multiple = 2 ** max(len(model.encoder_blocks), len(model.predictor_encoder_blocks))
    if train.crop % multiple:
        raise UserError(f"crop = {train.crop}: must be a multiple of {multiple} for this network")
    if model.embedding % 2:
        raise UserError(f"embedding = {model.embedding}: must be even, for sines and cosines")
    if round(model.adapter_ratio * model.width) < 1:
        raise UserError(f"adapter_ratio = {model.adapter_ratio}: leaves no channel at width {model.width}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not a readable TOML file ({error})") from error
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat


def _parsed(text: str) -> Any:
    """A `--set` value as TOML reads it; bare words are strings."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
