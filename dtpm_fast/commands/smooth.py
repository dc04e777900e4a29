"""`dtpm-smooth`: the base images of stage I, photos or crops of them smoothed by relative total variation."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dtpm_fast.atomic import atomic_path, short_name
from dtpm_fast.cores import usable_cores
from dtpm_fast.data.pictures import find_photos
from dtpm_fast.errors import UserError
from dtpm_fast.exit_code import run
from dtpm_fast.given_path import given_path
from dtpm_fast.images import image_size, read_image
from dtpm_fast.smoothing import LARGEST_SIGMA, MODES, rtv_smooth

EXAMPLE = """examples:
  dtpm-smooth photos/ -o smooth/
  dtpm-smooth photos/ -o crops/ --crop 256 --stride 128
  dtpm-smooth photos/ -o /shared/crops/ --crop 256 --cluster auto
A photo becomes DIR/NAME.png; folders are searched to the bottom and keep their shape. With --crop, every crop is
smoothed by itself: DIR/clean/NAME_yY_xX.png and DIR/smooth/NAME_yY_xX.png, the first to train on, the second its
smoothed pictures. A rerun does only what is missing. A photo that cannot be smoothed is named at the end and the exit
code is 1; the others are done. One run at a time in a DIR; a DIR inside INPUT is no part of the input."""

SETTINGS_FILE = "dtpm-smooth.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 on a failure or when a photo could not be smoothed, 2 on bad usage."""
    parser = argparse.ArgumentParser(
        prog="dtpm-smooth",
        description="Smooth photos by relative total variation (Xu et al. 2012).",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", type=given_path, metavar="INPUT", help="a photo, or a folder of photos")
    parser.add_argument("-o", "--output", required=True, type=given_path, metavar="DIR", help="folder for the results")
    parser.add_argument("--lam", type=_positive(float, zero=True), default=0.01, help="strength (default: 0.01)")
    parser.add_argument(
        "--sigma",
        type=_positive(float, largest=LARGEST_SIGMA),
        default=3.0,
        help=f"texture scale in pixels, at most {LARGEST_SIGMA:g} (default: 3)",
    )
    parser.add_argument("--sharpness", type=_positive(float), default=0.02, help="least gradient (default: 0.02)")
    parser.add_argument("--iterations", type=_positive(int), default=4, help="solves (default: 4)")
    parser.add_argument("--mode", choices=MODES, default="exact", help="default: exact")
    parser.add_argument("--crop", type=_positive(int), metavar="SIZE", help="smooth square crops, not whole photos")
    parser.add_argument("--stride", type=_positive(int), metavar="N", help="between crops (default: SIZE)")
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto, which takes CUDA for --crop only)"
    )
    parser.add_argument("--workers", type=_positive(int), help="photos at a time (default: one per CPU)")
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="share the job among the machines of a Ray cluster that all see INPUT and DIR: its address, 'auto' for "
        "the one that this machine belongs to, 'local' to start one here",
    )
    options = parser.parse_args(arguments)
    if options.stride and not options.crop:
        parser.error("--stride needs --crop")
    return run(lambda: _smooth(options))


@dataclass(frozen=True)
class Job:
    """One photo: what to smooth with, where its results go, and which parts of it are still missing."""

    source: Path
    settings: dict[str, Any]
    device: str
    threads: int
    whole: Path | None = None
    crops: list[tuple[int, int, Path, Path]] = field(default_factory=list)  # y, x, clean, smooth
    size: int = 0  # of the crops

    @property
    def results(self) -> int:
        return len(self.crops) or 1


def _smooth(options: argparse.Namespace) -> int:
    names = ("lam", "sigma", "sharpness", "iterations", "mode")
    settings = {name: getattr(options, name) for name in names}
    device = _device(options, settings)
    if options.cluster:  # its workers have another current folder
        options.inputs, options.output = [path.absolute() for path in options.inputs], options.output.absolute()
    workers = options.workers or usable_cores()
    failures: list[str] = []
    jobs, done = _plan(_sources(options.inputs, options.output), options, settings, device, failures)
    if jobs or done:
        _claim(options.output, settings | {"crop": options.crop, "stride": options.stride or options.crop}, done)
    threads = max(1, workers // max(1, len(jobs))) if options.cluster is None else 1
    jobs = [Job(j.source, j.settings, j.device, threads, j.whole, j.crops, j.size) for j in jobs]
    print(f"smoothing on {device}, {workers} at a time" if not options.cluster else "smoothing on a Ray cluster",
          file=sys.stderr)  # fmt: skip
    outcomes = _on_cluster(jobs, options.cluster) if options.cluster else _here(jobs, workers)
    total = done + sum(job.results for job in jobs)
    unit = "crop" if options.crop else "photo"
    with tqdm(total=total, initial=done, unit=unit, smoothing=0.05, disable=None) as bar:
        for results, failure in outcomes:
            bar.update(results)
            failures += [failure] if failure else []
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def smooth_photo(job: Job) -> tuple[int, str | None]:
    """Smooth one photo and write its results; how many those are, and what went wrong, if anything."""
    try:
        photo = read_image(job.source)
        if job.whole is not None:
            _write(job.whole, rtv_smooth(photo, **job.settings, device=job.device, threads=job.threads))
        else:
            size = job.size
            clean = np.stack([photo[y : y + size, x : x + size] for y, x, _, _ in job.crops])
            smooth = rtv_smooth(clean, **job.settings, device=job.device, threads=job.threads)
            for i, (_, _, clean_path, smooth_path) in enumerate(job.crops):
                _write(clean_path, clean[i])
                _write(smooth_path, smooth[i])  # last: its presence says that the crop is done
    except UserError as error:
        return job.results, str(error) if str(job.source) in str(error) else f"{job.source}: {error}"
    except (MemoryError, RuntimeError, ValueError) as error:
        return job.results, f"{job.source}: {str(error) or 'out of memory'}"
    return job.results, None


def _here(jobs: list[Job], workers: int) -> Iterator[tuple[int, str | None]]:
    """Decoding, smoothing and writing all release the GIL, so a thread a photo keeps every core busy. Photos wait as
    names only: no more of them are in memory than are worked on."""
    with ThreadPoolExecutor(workers) as pool:
        running: set[Future[tuple[int, str | None]]] = set()
        try:
            for job in jobs:
                running.add(pool.submit(smooth_photo, job))
                if len(running) >= 2 * workers:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (one.result() for one in finished)
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (one.result() for one in finished)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _on_cluster(jobs: list[Job], address: str) -> Iterator[tuple[int, str | None]]:
    """The same as Ray tasks, one a photo and a core: Ray spreads them, and starts those of a lost machine again."""
    try:
        import ray

        if getattr(ray, "__file__", None) is None:  # any folder of that name on the path imports as an empty package
            raise ImportError("the folder ray is no package")
    except ImportError as error:
        raise UserError("--cluster needs Ray: pip install 'dtpm-fast[cluster]'") from error
    if not jobs:
        return
    try:
        if address == "local":
            cpus = usable_cores()
            ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--cluster {address}: no Ray cluster there ({error})") from error
    try:
        task = ray.remote(num_cpus=1)(smooth_photo)
        at_once = 4 * max(1, int(ray.cluster_resources().get("CPU", 1)))  # enough that no core waits for this process
        running: dict[Any, Job] = {}
        for job in [*jobs, None]:
            if job is not None:
                running[task.remote(job)] = job
            while running and (job is None or len(running) >= at_once):
                for finished in ray.wait(list(running), num_returns=1)[0]:
                    done = running.pop(finished)
                    try:
                        yield ray.get(finished)
                    except ray.exceptions.RayError as error:
                        yield done.results, f"{done.source}: lost by the cluster ({type(error).__name__})"
    finally:
        ray.shutdown()


def _sources(inputs: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """Every photo, and its place below the output, without suffix. What lies in an output inside an input is a result
    of an earlier run."""
    results = Path(os.path.realpath(output))  # Path.resolve raises for a link to itself
    found: list[tuple[Path, Path]] = []
    for given in inputs:
        if given.is_dir():
            below = Path() if len(inputs) == 1 else Path(Path(os.path.realpath(given)).name)
            if results == Path(os.path.realpath(given)):  # a rerun would take its results for photos
                raise UserError(f"{output}: is the input itself; choose another folder, which may lie inside it")
            photos = [p for p in find_photos(given) if results not in Path(os.path.realpath(p)).parents]
            if not photos:
                raise UserError(f"{given}: no pictures in it but results of an earlier run")
            found += [(photo, (below / photo.relative_to(given)).with_suffix("")) for photo in photos]
        elif given.is_file():
            found.append((given, Path(given.stem)))
        else:
            raise UserError(f"{given}: no such file or folder")
    taken: dict[Path, Path] = {}
    for source, place in found:
        if place in taken:
            raise UserError(
                f"{taken[place]} and {source}: their results would have one name; rename one, or move it elsewhere"
            )
        taken[place] = source
    return found


def _plan(
    sources: list[tuple[Path, Path]],
    options: argparse.Namespace,
    settings: dict[str, Any],
    device: str,
    failures: list[str],
) -> tuple[list[Job], int]:
    """What is missing, and how many results are there already. Photos without a readable size go to `failures`."""
    jobs, done, leftovers = [], 0, Leftovers()
    output: Path = options.output
    for source, place in sources:
        if not options.crop:
            target = output / f"{place}.png"
            if os.path.realpath(target) == os.path.realpath(source):
                raise UserError(f"{source}: the result would replace it; choose another folder")
            if target.exists():
                done += 1
            else:
                leftovers.remove(target)
                jobs.append(Job(source, settings, device, 1, whole=target))
            continue
        try:
            height, width = image_size(source)
        except UserError as error:
            failures.append(str(error))
            continue
        size, stride = options.crop, options.stride or options.crop
        if height < size or width < size:
            failures.append(f"{source}: {width}x{height} is smaller than a crop of {size}; leave it out")
            continue
        missing = []
        for y in range(0, height - size + 1, stride):
            for x in range(0, width - size + 1, stride):
                name = f"{place}_y{y:05d}_x{x:05d}.png"
                clean, smooth = output / "clean" / name, output / "smooth" / name
                if smooth.exists() and clean.exists():
                    done += 1
                else:
                    missing.append((y, x, clean, smooth))
        for _, _, clean, smooth in missing:
            leftovers.remove(clean)
            leftovers.remove(smooth)
        if missing:
            jobs.append(Job(source, settings, device, 1, crops=missing, size=size))
    return jobs, done


def _claim(output: Path, settings: dict[str, Any], done: int) -> None:
    """Results of other settings must not mix: the first run leaves its own in the folder, later ones compare. `done`
    results are there already."""
    path = output / SETTINGS_FILE
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable ({error}); remove the folder or choose another one") from error
        if before == settings:
            return
        if any(found.is_file() and found != path for found in output.rglob("*")):
            raise UserError(f"{output}: holds results of other settings ({path.name}); choose another folder")
    elif done:
        raise UserError(
            f"{output}: holds {done} pictures under the names of results, and no {path.name} that says they are "
            f"ours; choose another folder"
        )
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")


class Leftovers:
    """Temporary files of killed runs (dtpm_fast.atomic names them after their targets). Lists each folder once."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, list[Path]]] = {}

    def remove(self, target: Path) -> None:
        if target.parent not in self._folders:
            names = self._folders[target.parent] = {}
            for path in target.parent.glob(".*.png") if target.parent.is_dir() else ():
                names.setdefault(path.name[1:].rsplit(".", 2)[0], []).append(path)
        for leftover in self._folders[target.parent].get(short_name(target.name), ()):
            leftover.unlink(missing_ok=True)


def _write(path: Path, rgb: np.ndarray) -> None:
    """Lossless; a low compression level, or the packing takes longer than the smoothing."""
    with atomic_path(path) as temporary:
        Image.fromarray(rgb).save(temporary, compress_level=1)


def _device(options: argparse.Namespace, settings: dict[str, Any]) -> str:
    """auto: CUDA for crops alone, whose kernels run side by side; a single photo keeps one of a GPU's processors busy,
    and is faster on a CPU's core. Tasks on a cluster ask for CPUs only."""
    name: str = options.device
    if name == "cpu" or (name == "auto" and not options.crop):
        return "cpu"
    from dtpm_fast.device import choose_device  # imports torch, which takes seconds
    from dtpm_fast.smoothing import CUDA_LARGEST_SIGMA, cuda_unavailable

    if name != "auto" and name.partition(":")[0] != "cuda":
        raise UserError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    reason = cuda_unavailable()
    if options.cluster:
        reason = reason or "--cluster runs on CPUs"
    if settings["mode"] != "exact":
        reason = reason or f"--mode {settings['mode']} is for the CPU"
    if settings["sigma"] > CUDA_LARGEST_SIGMA:
        reason = reason or f"--sigma above {CUDA_LARGEST_SIGMA:g} is for the CPU"
    if name == "auto":
        return "cpu" if reason else "cuda"
    if reason is None:
        choose_device(name)
        reason = cuda_unavailable(name)
    if reason:
        raise UserError(f"--device {name}: {reason}; use --device cpu")
    return name


def _positive(kind: type, zero: bool = False, largest: float = float("inf")) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not (value > 0 or (zero and value == 0)) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: must be {'zero or ' if zero else ''}positive")
        if value > largest:
            raise argparse.ArgumentTypeError(f"{text}: must be at most {largest:g}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its message
    return parse


if __name__ == "__main__":
    sys.exit(main())
