"""`dtpm-export`: weights in, a folder out that runs without this package."""

import argparse
import sys
from collections.abc import Sequence

from tqdm import tqdm

from dtpm_fast.commands.task import add_task, check_task_known
from dtpm_fast.exit_code import run
from dtpm_fast.given_path import given_path

EXAMPLE = """examples:
  dtpm-export --task derain --steps 4 -o derain-onnx
  dtpm-export --task derain --format aoti -o derain-aoti
  dtpm-export --task derain --format tensorrt --precision fp16 --bucket 1088x1920 -o derain-trt
  dtpm-export --weights runs/deblur/weights.safetensors --precision fp16 --verify -o deblur-fp16
The folder appears only when it is complete and its result has been compared with the model's on random input.
manifest.json says how to use it; docs/export.md explains."""
BUCKETS = ("512x512", "1088x1920")
FORMATS = ("onnx", "tensorrt", "aoti", "triton")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 on a failure, 2 on bad usage."""
    parser = argparse.ArgumentParser(
        prog="dtpm-export",
        description="Export a restorer for use without this package.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_task(parser, "which task's weights")
    parser.add_argument("--steps", type=int, default=4, metavar="S", help="steps of the sampler (default: 4)")
    parser.add_argument("--weights", default="light", help="weights file, or the name of shipped ones (default: light)")
    parser.add_argument("--format", default="onnx", choices=FORMATS, help="default: onnx")
    parser.add_argument(
        "--device", help="what aoti is compiled for: cpu or cuda (default: cpu); engines are built for cuda[:N]"
    )
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "bf16"), help="default: fp32")
    parser.add_argument("--unrolled", action="store_true", help="also restore.onnx, all steps in one graph (S <= 4)")
    parser.add_argument("--verify", action="store_true", help="compare at six sizes and print the differences")
    engines = parser.add_argument_group("engines (--format tensorrt, or triton with --network tensorrt)")
    engines.add_argument("--network", default="onnx", choices=("onnx", "tensorrt"), help="of triton (default: onnx)")
    engines.add_argument(
        "--bucket", action="append", metavar="[BATCHx]HxW", help="largest size of a profile; again for more profiles "
        f"(default: {' and '.join(BUCKETS)})",
    )  # fmt: skip
    engines.add_argument(
        "--timing-cache", type=given_path, metavar="FILE", help="default: the user's, by version and GPU"
    )
    engines.add_argument("--fixed-weights", action="store_true", help="weights cannot be exchanged; may run faster")
    engines.add_argument("--layers", action="store_true", help="compare every layer and keep the report (layers.json)")
    engines.add_argument(
        "--refit", type=given_path, metavar="DIR", help="take the engines of this export and exchange their weights"
    )
    parser.add_argument(
        "-o", "--output", required=True, type=given_path, metavar="DIR", help="a folder that is not there yet"
    )
    options = parser.parse_args(arguments)
    check_task_known(parser, options)
    _check_usage(parser, options)
    return run(lambda: _export(options))


def _with_engines(options: argparse.Namespace) -> bool:
    return options.format == "tensorrt" or (options.format == "triton" and options.network == "tensorrt")


def _check_usage(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Options that do not go together end as bad usage, before anything is read."""
    if options.network != "onnx" and options.format != "triton":
        parser.error("--network says what --format triton serves; leave it out")
    asked = [name for name in ("bucket", "timing_cache", "fixed_weights", "layers", "refit") if getattr(options, name)]
    if asked and not _with_engines(options):
        parser.error(f"--{asked[0].replace('_', '-')}: is about TensorRT engines; add --format tensorrt")
    if options.refit and (options.bucket or options.fixed_weights):
        parser.error("--refit takes the engines as they are; leave --bucket and --fixed-weights out")
    if options.device not in (None, "cpu") and options.format != "aoti" and not _with_engines(options):
        parser.error("--device: an ONNX file is for no device in particular; leave it out")
    if options.verify and options.format == "triton":
        parser.error("--verify compares other folders than triton's; a model repository is compared as it is written")


def _export(options: argparse.Namespace) -> int:
    from dtpm_fast.device import choose_device
    from dtpm_fast.export.exporter import export_folder, verify  # imports torch: not for --help
    from dtpm_fast.export.restorer import open_stepper
    from dtpm_fast.export.tensorrt_api import tensorrt
    from dtpm_fast.export.tensorrt_export import EngineOptions
    from dtpm_fast.export.tensorrt_layers import read_layers
    from dtpm_fast.runtime.shipped import find_weights

    with_engines = _with_engines(options)
    if with_engines:
        tensorrt()  # a missing TensorRT is said before a missing GPU
    device, _ = choose_device(options.device or ("cuda" if with_engines else "cpu"))
    engines = None
    if with_engines:
        engines = EngineOptions(
            options.bucket or BUCKETS, not options.fixed_weights, options.timing_cache, options.layers, options.refit
        )
    weights = find_weights(options.weights, options.task)
    total = 4 + options.unrolled + (3 + options.layers if engines else 0)
    with tqdm(total=total, disable=None, bar_format="{desc}: {n_fmt}/{total_fmt} {elapsed}") as bar:

        def report(stage: str) -> None:
            bar.set_description(stage)
            bar.update()

        manifest = export_folder(
            weights, options.output, kind=options.format, steps=options.steps, precision=options.precision,
            unrolled=options.unrolled, device=device, engines=engines, report=report,
        )  # fmt: skip
    one = manifest.compared[0]
    print(
        f"{options.output}: {manifest.kind}, {manifest.task}, {options.steps} steps, {manifest.precision}; "
        f"against the model in float32: max difference {one['max_abs']:.2e}, PSNR {one['psnr_db']:.1f} dB"
    )
    if options.layers:
        print(f"the ten worst of the layers in {options.output / 'layers.json'}:")
        for layer in sorted(read_layers(options.output), key=lambda layer: layer.rank)[:10]:
            print(layer)
    if options.verify:
        stepper, _, why = open_stepper(options.output, manifest, str(device))
        print(f"{why} against PyTorch in float32, {options.steps} steps:")
        for found in verify(options.output, manifest, weights, stepper):
            print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
