"""Random fields that the degradations are made of: smooth depth, grainy noise, scattered drops, and blur by FFT.

NumPy's FFT only: it runs on one thread, so that equal generators give equal bytes in every process.
"""

import numpy as np

Frequencies = tuple[np.ndarray, np.ndarray]


def smooth_field(height: int, width: int, rng: np.random.Generator, cells: int = 3) -> np.ndarray:
    """HxW float32 in [0, 1]: values at the (cells + 1)² corners of a grid over the picture, uniform, smoothly
    interpolated (value noise)."""
    corners = rng.random((cells + 1, cells + 1), dtype=np.float32)
    return _interpolation(height, cells) @ corners @ _interpolation(width, cells).T


def _interpolation(size: int, cells: int) -> np.ndarray:
    """size x (cells + 1) float32: the weights of the corners, by smoothstep."""
    place = np.linspace(0, cells, size, dtype=np.float32) if size > 1 else np.full(1, cells / 2, dtype=np.float32)
    cell = np.minimum(place.astype(np.int64), cells - 1)
    part = place - cell
    part = part * part * (3 - 2 * part)
    weights = np.zeros((size, cells + 1), dtype=np.float32)
    rows = np.arange(size)
    weights[rows, cell] = 1 - part
    weights[rows, cell + 1] = part
    return weights


def grainy_noise(
    frequencies: Frequencies,
    rng: np.random.Generator,
    shape: tuple[int, int],
    along: float,
    across: float,
    angle: float = 0.0,
) -> np.ndarray:
    """HxW Gaussian noise of standard deviation about 1, smoothed over `along` x `across` pixels (standard deviations),
    `angle` from the vertical. Periodic."""
    parallel, perpendicular = _turned(frequencies, angle)
    smoothing = np.exp(-2 * np.pi**2 * ((parallel * float(along)) ** 2 + (perpendicular * float(across)) ** 2))
    white = rng.standard_normal(shape, dtype=np.float32)
    smooth = np.fft.irfft2(np.fft.rfft2(white) * smoothing, s=shape)
    return smooth * float(np.sqrt(4 * np.pi * along * across))  # what the smoothing takes from the standard deviation


def scattered_drops(height: int, width: int, rng: np.random.Generator, per_pixel: float, spread: float) -> np.ndarray:
    """HxW float32 of impulses at random places, `per_pixel` on average, gamma-distributed with mean 1 and the shape
    `spread`.

    From equal generators, a larger `per_pixel` gives the same drops and more."""
    places = np.random.default_rng(rng.integers(2**63))  # apart from the sizes: more drops keep the first ones
    count = int(per_pixel * height * width + rng.random())
    drops = np.zeros((height, width), dtype=np.float32)
    np.add.at(drops.reshape(-1), places.integers(height * width, size=count), rng.gamma(spread, 1 / spread, count))
    return drops


def spectrum_frequencies(height: int, width: int) -> Frequencies:
    """Cycles per pixel, down (H, 1) and right (1, W // 2 + 1), of `numpy.fft.rfft2`'s output."""
    return np.fft.fftfreq(height)[:, None].astype(np.float32), np.fft.rfftfreq(width)[None].astype(np.float32)


def line_spectrum(frequencies: Frequencies, length: float, thickness: float, angle: float) -> np.ndarray:
    """Fourier transform of a line of sum 1: `length` pixels long with soft ends, Gaussian of standard deviation
    `thickness` across, `angle` (radians) from the vertical, averaged over the pixels' area."""
    down, right = frequencies
    along, across = _turned(frequencies, angle)
    fading = 0.07 * length
    profile = np.exp(-2 * np.pi**2 * ((across * float(thickness)) ** 2 + (along * float(fading)) ** 2))
    return np.sinc(down) * np.sinc(right) * np.sinc(along * float(0.85 * length)) * profile


def _turned(frequencies: Frequencies, angle: float) -> Frequencies:
    """The frequencies along and across a direction, `angle` from the vertical. Python's numbers keep them float32."""
    down, right = frequencies
    cosine, sine = float(np.cos(angle)), float(np.sin(angle))
    return down * cosine + right * sine, right * cosine - down * sine


def blur(image: np.ndarray, kernels: list[np.ndarray]) -> list[np.ndarray]:
    """The HxWxC image convolved with each kernel (odd sides, all of one size), reflected beyond its edges."""
    reach = kernels[0].shape[0] // 2
    height, width = image.shape[:2]
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    padded = np.pad(planes, [(0, 0), (reach, reach), (reach, reach)], mode="reflect")
    shape = _fast_length(height + 2 * reach), _fast_length(width + 2 * reach)
    spectrum = np.fft.rfft2(padded, shape)
    blurred = []
    for kernel in kernels:
        # The kernel's corner at the origin moves the result by `reach`: the picture starts at 2 * reach.
        full = np.fft.irfft2(spectrum * np.fft.rfft2(kernel.astype(np.float32), shape), shape)
        inside = full[:, 2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]
        blurred.append(np.ascontiguousarray(inside.transpose(1, 2, 0), dtype=np.float32))
    return blurred


def _fast_length(size: int) -> int:
    """The smallest product of 2, 3 and 5 that is at least `size`."""
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1
