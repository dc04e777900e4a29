"""Restores a photo with an exported folder; needs numpy and onnxruntime, nothing else.

python restore_numpy.py FOLDER photo.npy restored.npy          photos: HxWx3 uint8 RGB arrays, any size
"""

import json
import pathlib
import sys

import numpy as np
import onnxruntime as ort


def restore(
    folder: pathlib.Path, photo: np.ndarray, seed: int = 0, provider: str = "CPUExecutionProvider"
) -> np.ndarray:
    manifest = json.loads((folder / "manifest.json").read_text())
    prepare, step = (
        ort.InferenceSession(folder / f"{name}.onnx", providers=[provider]) for name in ("prepare", "step")
    )
    assert step.get_providers()[0] == provider, f"{provider} did not start"
    height, width, _ = photo.shape
    pad = [(0, -side % manifest["multiple"]) for side in (height, width)]
    padded = np.pad(photo, [*pad, (0, 0)], mode="reflect")
    image = np.ascontiguousarray(padded.transpose(2, 0, 1)[None], dtype=np.float32) / 127.5 - 1
    noise = np.random.default_rng(seed).standard_normal((manifest["noise_fields"], *image.shape[1:]), np.float32)
    names = [spec["name"] for spec in manifest["graphs"]["prepare"]["outputs"]]
    conditions = dict(zip(names, prepare.run(names, {"image": image}), strict=True))
    wanted = {spec["name"] for spec in manifest["graphs"]["step"]["inputs"]}
    given = {name: value for name, value in conditions.items() if name in wanted}
    x, x0, fields = noise[:1], np.zeros_like(image), iter(noise[1:])
    for i, sigma in enumerate(manifest["sampler"]["sigmas"]):
        x, x0 = step.run(["next_x", "x0"], {"x": x, "previous": x0, "index": np.array([i]), **given})
        if sigma > 0:
            x = x + np.float32(sigma) * next(fields)
    restored = np.clip(conditions["y_eps"] + x, -1, 1)[0, :, :height, :width].transpose(1, 2, 0)
    return np.rint(restored * 127.5 + 127.5).astype(np.uint8)


if __name__ == "__main__":
    np.save(sys.argv[3], restore(pathlib.Path(sys.argv[1]), np.load(sys.argv[2])))
