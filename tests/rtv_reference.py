"""Section by section the paper's equations, in float64 with scipy's sparse LU: the oracle of the smoother's tests and
benchmark. Slow, and nothing but readable."""

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from scipy.ndimage import correlate1d


def rtv_reference(
    image: np.ndarray, lam: float = 0.01, sigma: float = 3.0, sharpness: float = 0.02, iterations: int = 4
) -> np.ndarray:
    """HWC float64 in [0, 1], solved exactly: one factor an iteration, shared by the channels."""
    height, width, channels = image.shape
    x = image
    for _ in range(iterations):
        matrix = rtv_matrix(*rtv_weights(x, sigma, sharpness), lam)
        factor = scipy.sparse.linalg.splu(matrix)
        x = factor.solve(image.reshape(-1, channels)).reshape(height, width, channels)
        sigma = max(sigma / 2, 0.5)
    return x


def rtv_weights(x: np.ndarray, sigma: float, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the edges to the east and to the south, HW each; zero at the far border."""
    w = 1 / np.maximum(np.sqrt(east(x) ** 2 + south(x) ** 2).mean(axis=2), sharpness)
    taps = gaussian(sigma)
    blurred = correlate1d(correlate1d(x, taps, axis=1, mode="constant"), taps, axis=0, mode="constant")
    wx = w / np.maximum(np.abs(east(blurred)).mean(axis=2), 1e-3)
    wy = w / np.maximum(np.abs(south(blurred)).mean(axis=2), 1e-3)
    wx[:, -1] = 0
    wy[-1] = 0
    return wx, wy


def rtv_matrix(wx: np.ndarray, wy: np.ndarray, lam: float) -> scipy.sparse.csc_matrix:
    """I + (lam / 2) L, L the Laplacian of the grid with those weights."""
    height, width = wx.shape
    number = np.arange(height * width).reshape(height, width)
    pairs = np.concatenate(
        [
            np.stack([number[:, :-1].ravel(), number[:, 1:].ravel()]),
            np.stack([number[:-1].ravel(), number[1:].ravel()]),
        ],
        axis=1,
    )
    weights = lam / 2 * np.concatenate([wx[:, :-1].ravel(), wy[:-1].ravel()])
    size = height * width
    couplings = scipy.sparse.coo_array((weights, (pairs[0], pairs[1])), shape=(size, size)).tocsc()
    couplings = couplings + couplings.T
    return scipy.sparse.csc_matrix(scipy.sparse.diags_array(1 + couplings.sum(axis=0)) - couplings)


def gaussian(sigma: float) -> np.ndarray:
    radius = (int(np.floor(5 * sigma + 0.5)) | 1) // 2
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    return taps / taps.sum()


def east(x: np.ndarray) -> np.ndarray:
    difference = np.zeros_like(x)
    difference[:, :-1] = x[:, 1:] - x[:, :-1]
    return difference


def south(x: np.ndarray) -> np.ndarray:
    difference = np.zeros_like(x)
    difference[:-1] = x[1:] - x[:-1]
    return difference


def early_stopped(matrix: scipy.sparse.csc_matrix, rhs: np.ndarray) -> tuple[np.ndarray, int]:
    """Conjugate gradients on one channel as in the authors' program: modified incomplete Cholesky without fill-in, zero
    start, stopped at |b - A x| <= 0.1 |b|. Dense: for tiny pictures."""
    a = matrix.toarray()
    lower = np.tril(a)
    for k in range(len(a)):
        lower[k, k] = np.sqrt(lower[k, k])
        below = k + 1 + np.flatnonzero(lower[k + 1 :, k])
        lower[below, k] /= lower[k, k]
        for i in below:
            for j in below[below <= i]:
                fill = lower[i, k] * lower[j, k]
                if a[i, j] != 0:
                    lower[i, j] -= fill
                else:  # "modified": what is dropped goes to both diagonals
                    lower[i, i] -= fill
                    lower[j, j] -= fill
    x, residual, direction, rho, count = np.zeros_like(rhs), rhs.copy(), np.zeros_like(rhs), 1.0, 0
    while np.linalg.norm(residual) > 0.1 * np.linalg.norm(rhs):
        z = np.linalg.solve(lower.T, np.linalg.solve(lower, residual))
        rho, before = residual @ z, rho
        direction = z + (rho / before if count else 0.0) * direction
        image = a @ direction
        alpha = rho / (direction @ image)
        x, residual, count = x + alpha * direction, residual - alpha * image, count + 1
    return x, count
