"""docs/images/tasks.jpg: what the shipped weights do, good or bad, on photos that ship with scikit-image.

    python scripts/task_sheet.py -o docs/images/tasks.jpg

A row for each task: degraded (synthetic, a seed that no training used), the initial predictor's picture, 4 steps, the
photo; with PSNR over RGB. The photos and seeds are fixed beforehand, not chosen by result.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchmetrics.functional.image import peak_signal_noise_ratio

from dtpm_fast import Restorer
from dtpm_fast.atomic import atomic_path
from dtpm_fast.data.degradations import degrade
from dtpm_fast.data.sheet import sample_photo
from dtpm_fast.runtime.shipped import shipped

PHOTOS = {  # task: photo, top left corner of the piece that is shown
    "derain": ("coffee", (60, 130)),
    "dehaze": ("rocket", (120, 180)),
    "desnow": ("chelsea", (20, 80)),
    "raindrop": ("astronaut", (20, 90)),
    "deblur": ("motorcycle_left", (150, 250)),
    "defocus": ("astronaut", (60, 280)),
    "rainhaze": ("motorcycle_left", (100, 60)),
}
SIDE, LABEL = 224, 18


def psnr(picture: np.ndarray, photo: np.ndarray) -> float:
    a, b = (torch.from_numpy(x.astype(np.float32)) for x in (picture, photo))
    return float(peak_signal_noise_ratio(a, b, data_range=255.0).clamp(max=100.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=2026)
    options = parser.parse_args()
    tasks = [task for task in PHOTOS if f"light-{task}" in shipped()]
    sheet = Image.new("RGB", (4 * SIDE, len(tasks) * (SIDE + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    restorer = Restorer.from_pretrained("light", task=tasks[0], steps=4, device="cpu", precision="float32")
    for row, task in enumerate(tasks):
        name, (top, left) = PHOTOS[task]
        photo = sample_photo(name)
        degraded = degrade(task, photo.astype(np.float32) / 255, np.random.default_rng([options.seed, row]))
        y_d = np.rint(degraded * 255).astype(np.uint8)
        restorer.set_task(task)
        y_eps, result = restorer.predict(y_d), restorer(y_d)
        shown = {f"{task}, synthetic": y_d, "initial predictor": y_eps, "4 steps": result, name: photo}
        for column, (label, picture) in enumerate(shown.items()):
            place = column * SIDE, row * (SIDE + LABEL)
            sheet.paste(Image.fromarray(picture[top : top + SIDE, left : left + SIDE]), place)
            text = label if picture is photo else f"{label}: {psnr(picture, photo):.1f} dB"
            draw.text((place[0] + 4, place[1] + SIDE + 3), text, fill="black")
    with atomic_path(options.output) as temporary:
        sheet.save(temporary, quality=85)


if __name__ == "__main__":
    main()
