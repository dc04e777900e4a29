"""`dtpm-restore`: photos and folders of photos in, restored photos out."""

import argparse
import itertools
import logging
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from dtpm_fast.commands.task import add_task, check_task_known
from dtpm_fast.commands.tile import add_tile
from dtpm_fast.data.pictures import find_photos
from dtpm_fast.errors import UserError
from dtpm_fast.exit_code import run
from dtpm_fast.given_path import given_path
from dtpm_fast.images import SUFFIXES, read_image, write_image
from dtpm_fast.tasks import TASKS

if TYPE_CHECKING:  # they import torch or much else: not for --help or a mistyped path
    from dtpm_fast.report import Case
    from dtpm_fast.runtime.restorer import Restorer

EXAMPLE = """examples:
  dtpm-restore rainy.jpg -o dry.png --task derain
  dtpm-restore holiday/ old.jpg -o restored/ --task derain --steps 10 --seed 7
  dtpm-restore photos/ -o sharp/ --weights runs/deblur/weights.safetensors
  dtpm-restore holiday/ -o restored/ --task derain --report restored.html
  dtpm-restore photos/ -o dry/ --weights derain-onnx/
An output keeps its input's stem and is a PNG, unless one photo goes to a file name of your own; where two of a folder
share a stem, each keeps its whole name (a.jpg.png). Folders are searched to the bottom and keep their shape; one given
beside other inputs becomes a folder inside OUT. A picture that cannot be restored is named at the end and the exit code
is 1; the others are done."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 on a failure or when a picture could not be restored, 2 on bad usage."""
    parser = argparse.ArgumentParser(
        prog="dtpm-restore",
        description="Restore photos with a diffusion texture prior (DTPM).",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", type=given_path, metavar="INPUT", help="a photo, or a folder of photos")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder, or file for one photo")
    parser.add_argument("--skip-existing", action="store_true", help="leave out what has a result: go on with a folder")
    add_task(parser, "what the photos suffer from")
    parser.add_argument("--steps", type=int, metavar="S", help="steps of the sampler (default: 4, or an export's own)")
    parser.add_argument(
        "--weights",
        default="light",
        help="weights file, name of shipped ones, or a folder that dtpm-export wrote (default: light)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--backend",
        default="auto",
        help="auto, reference, fused, compiled, or graph, which needs a GPU; a folder brings its own (default: auto)",
    )
    parser.add_argument(
        "--precision", default="auto", help="auto, float32 or bfloat16: the network's number format (default: auto)"
    )
    parser.add_argument("--sampler", default="ddim", help="ddim, the paper's, or dpm++2m (default: ddim)")
    add_tile(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument(
        "--report", type=given_path, metavar="FILE.html", help="a page with sliders to look at the results"
    )
    parser.add_argument("--report-images", type=int, default=12, metavar="N", help="photos in the page (default: 12)")
    options = parser.parse_args(arguments)
    check_task_known(parser, options)
    if options.report_images < 1:
        parser.error(f"--report-images {options.report_images}: must be at least 1")
    if options.report is not None and options.report.is_dir():
        parser.error(f"--report {options.report}: is a folder, give a file name")
    if options.report is not None and options.report.suffix.lower() not in (".html", ".htm"):
        parser.error(f"--report {options.report}: is an HTML page, give a name that ends in .html")
    if not options.output:
        parser.error("-o: is empty; an unset variable?")
    command = shlex.join(["dtpm-restore", *(sys.argv[1:] if arguments is None else arguments)])
    return run(lambda: _restore(options, command))


def _restore(options: argparse.Namespace, command: str) -> int:
    given = options.output
    jobs = plan_outputs(options.inputs, Path(given), folder=given.endswith(os.sep))
    if options.skip_existing:
        planned, jobs = len(jobs), [job for job in jobs if not job[1].exists()]
        print(f"{planned - len(jobs)} of {planned} have a result already", file=sys.stderr)
        if not jobs:
            return 0
    logging.basicConfig(format="%(message)s")  # to standard error
    logging.getLogger("dtpm_fast").setLevel(logging.INFO)
    from dtpm_fast.runtime.restorer import Restorer  # imports torch: not for --help or a mistyped path

    restorer = Restorer.from_pretrained(
        options.weights,
        options.task,
        options.steps,
        options.device,
        options.backend,
        options.seed,
        tile=options.tile,
        precision=options.precision,
        sampler=options.sampler,
    )
    failures: list[str] = []
    try:
        if options.report is None:
            for _ in _restored(jobs, restorer, set(), failures):
                pass
        else:
            _write_report(options, jobs, restorer, failures, command)
    finally:  # also after Ctrl-C
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _restored(
    jobs: Sequence[tuple[Path, Path]], restorer: "Restorer", shown: set[int], failures: list[str]
) -> Iterator["Case"]:
    """Restore every photo and write it; yields what a report shows of the chosen ones. A photo that cannot be restored
    adds a line to `failures`."""
    from dtpm_fast.report import Case, Picture

    root = os.path.commonpath([source.parent.absolute() for source, _ in jobs])
    for number, (source, target) in enumerate(tqdm(jobs, unit="photo", disable=None)):
        try:
            photo = read_image(source)
            with _tiles_bar(restorer):
                result = restorer(photo)
            write_image(target, result)
            if number in shown:
                predicted = restorer.predict(photo)
                labels = {"input": photo, "initial predictor": predicted, "result": result}
                yield Case(os.path.relpath(source, root), [Picture(label, image) for label, image in labels.items()])
        except (UserError, RuntimeError, MemoryError) as error:  # a photo that fails does not keep others from theirs
            cause = next(iter(str(error).splitlines()), "out of memory")  # CUDA's and the compiler's have many lines
            failures.append(cause if str(source) in cause else f"{source}: {cause}")


@contextmanager
def _tiles_bar(restorer: "Restorer") -> Iterator[None]:
    """A second bar, below that of the photos, while a large one goes in tiles for longer than a second."""
    with tqdm(unit="tile", position=1, leave=False, delay=1, disable=None) as bar:

        def show(done: int, of: int) -> None:
            if bar.total != of:  # the first, or smaller tiles than before
                bar.reset(of)
            bar.update(done - bar.n)

        restorer.progress = show
        try:
            yield
        finally:
            restorer.progress = None


def _write_report(
    options: argparse.Namespace,
    jobs: Sequence[tuple[Path, Path]],
    restorer: "Restorer",
    failures: list[str],
    command: str,
) -> None:
    from dtpm_fast.report import chosen, evenly, write_report

    shown = evenly(len(jobs), options.report_images)
    count = f"{len(jobs)} photo{'s' if len(jobs) > 1 else ''}"
    about = {
        "Photos": count if len(shown) == len(jobs) else f"{count}; {chosen(len(shown), len(jobs))}",
        "Restorer": restorer.about,
        "Date": datetime.now().astimezone().date().isoformat(),
        "Command": command,
    }
    cases = _restored(jobs, restorer, shown, failures)
    for first in cases:  # there is none, and no page, where every chosen photo is broken
        title = f"dtpm-restore: {TASKS[restorer.task]}"
        write_report(itertools.chain([first], cases), options.report, title=title, about=about)


def plan_outputs(inputs: Sequence[Path], output: Path, folder: bool = False) -> list[tuple[Path, Path]]:
    """Every input picture and where its result goes; `folder`: the output is one, whatever its name. Raises
    `UserError` for a missing input, a folder without pictures, an output that is no place for them, two results of one
    name, and a result that would replace its input."""
    jobs: list[tuple[Path, Path]] = []
    folder = folder or output.is_dir() or not output.suffix
    if len(inputs) == 1 and not inputs[0].is_dir() and not folder:
        if output.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"{output}: unknown picture format {output.suffix!r}; use one of {', '.join(sorted(SUFFIXES))}, "
                "or a folder"
            )
        jobs.append((inputs[0], output))
    else:
        for given in inputs:
            if given.is_dir():  # what is broken in a folder is named at the end
                top = output if len(inputs) == 1 else output / Path(os.path.realpath(given)).name
                jobs += _mirrored(given, top, output)
            else:
                jobs.append((given, output / f"{given.stem}.png"))
    for given in inputs:
        if not given.is_dir() and not given.is_file():
            raise UserError(f"{given}: no such file or folder")
    _check_jobs(jobs)
    return jobs


def _mirrored(given: Path, top: Path, output: Path) -> list[tuple[Path, Path]]:
    """The photos of a folder and their places below `top`. What lies in an output inside of the folder is a result."""
    results = Path(os.path.realpath(output))
    if results == Path(os.path.realpath(given)):  # a rerun would take its results for photos
        raise UserError(f"{output}: is the input itself; choose another folder, which may lie inside it")
    photos = [photo for photo in find_photos(given) if results not in Path(os.path.realpath(photo)).parents]
    if not photos:
        raise UserError(f"{given}: no pictures in it but results of an earlier run")
    places = [top / photo.relative_to(given) for photo in photos]
    shared = Counter(place.with_suffix("") for place in places)
    return [
        (photo, place.with_name(f"{place.name if shared[place.with_suffix('')] > 1 else place.stem}.png"))
        for photo, place in zip(photos, places, strict=True)
    ]


def _check_jobs(jobs: list[tuple[Path, Path]]) -> None:
    sources = {os.path.realpath(source): source for source, _ in jobs}  # Path.resolve raises for a link to itself
    taken: dict[str, Path] = {}
    for source, target in jobs:
        for part in target.parents:
            if part.exists() and not part.is_dir():
                raise UserError(f"{part}: is a file; -o needs a folder for these inputs")
        there = next(part for part in target.absolute().parents if part.exists())
        if not os.access(there, os.W_OK):
            raise UserError(f"{target}: cannot be written, {there} is not yours to write in; choose another output")
        place = os.path.realpath(target)
        if place in sources:
            result = "the result" if sources[place] == source else f"the result of {source}"
            raise UserError(f"{sources[place]}: {result} would replace it; choose another output")
        if place in taken:
            raise UserError(f"{taken[place]} and {source}: both would be written to {target}; restore them apart")
        taken[place] = source


if __name__ == "__main__":
    sys.exit(main())
