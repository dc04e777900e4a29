"""Engines from ONNX graphs: strongly typed, a profile for each bucket, with a timing cache, refittable."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtpm_fast.atomic import atomic_path
from dtpm_fast.errors import UserError
from dtpm_fast.export.manifest import GraphSpec
from dtpm_fast.export.tensorrt_api import listener, tensorrt
from dtpm_fast.export.tensorrt_buckets import Bucket

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildSettings:
    """buckets: one profile each. refit: weights can be exchanged in the built engine, which costs some fusions.
    timing_cache: a file of TensorRT's own measurements, read and then written again; None for none."""

    buckets: Sequence[Bucket]
    refit: bool = True
    timing_cache: Path | None = None


def default_timing_cache(place: dict[str, str]) -> Path:
    """~/.cache/dtpm-fast/tensorrt/, a file for each version and compute capability."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "dtpm-fast" / "tensorrt" / f"{place['tensorrt']}-{place['compute_capability']}.timing"


def build_engine(onnx: bytes, name: str, graph: GraphSpec, multiple: int, settings: BuildSettings) -> bytes:
    """The serialised engine of a graph, for the current CUDA device.

    The types are the graph's: nothing is allowed to run in fewer bits, TF32 included. Raises `UserError` when TensorRT
    cannot read the graph or cannot build it.
    """
    trt = tensorrt()
    log = listener(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx):
        raise UserError(f"{name}: TensorRT {trt.__version__} cannot read the graph ({parser_cause(parser, log)})")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if settings.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
        if trt.__version__.startswith("11.3."):
            logger.warning(
                "%s: TensorRT 11.3 is known to drop biases in engines whose weights can be exchanged; look at what "
                "--verify says, or use --fixed-weights",
                name,
            )
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # a profile of the engine names the graph's nodes
    for bucket in settings.buckets:
        profile = builder.create_optimization_profile()
        for spec in graph.inputs:
            if any(isinstance(side, str) for side in spec.shape):
                profile.set_shape(spec.name, *bucket.profile(spec, multiple))
        if config.add_optimization_profile(profile) < 0:
            raise UserError(f"{name}: TensorRT refused the profile of bucket {bucket} ({log.cause})")
    if settings.timing_cache is not None:
        _read_timing_cache(config, settings.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"{name}: TensorRT {trt.__version__} could not build the engine ({log.cause})")
    if settings.timing_cache is not None:
        try:
            with atomic_path(settings.timing_cache) as file:
                file.write_bytes(bytes(config.get_timing_cache().serialize()))
        except UserError as error:  # the engine is worth more
            logger.warning("%s; the next build measures again", error)
    return bytes(plan)


def refit_engine(engine: Any, onnx: bytes, name: str) -> None:
    """Replace all weights of a deserialised engine by those of a graph of the same structure. Raises `UserError`."""
    trt = tensorrt()
    log = listener(trt)
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_bytes(onnx):
        raise UserError(f"{name}: the weights do not fit the engine ({parser_cause(parser, log)})")
    missing = refitter.get_missing_weights()
    if missing or not refitter.refit_cuda_engine():
        why = f"no values for {', '.join(list(missing)[:3])}" if missing else log.cause
        raise UserError(f"{name}: TensorRT could not exchange the weights ({why})")


def parser_cause(parser: Any, log: Any) -> str:
    """The first error of a parser, with the node that it is about."""
    if not parser.num_errors:
        return str(log.cause)
    error = parser.get_error(0)
    node = f"{error.node_operator()} {error.node_name()}".strip()
    return f"{node + ': ' if node else ''}{error.desc().splitlines()[0]}"


def _read_timing_cache(config: Any, file: Path) -> None:
    """Use the file's measurements where they are of this version and GPU; start afresh where they are not."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise UserError(f"{file}: the timing cache cannot be read ({error.strerror or error})") from error
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)
