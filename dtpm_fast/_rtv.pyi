import numpy as np

def smooth(
    image: np.ndarray,
    out: np.ndarray,
    *,
    lam: float,
    sigma: float,
    sharpness: float,
    iterations: int,
    solver: str,
    mode: str,
    tol: float,
    threads: int,
    isa: str,
) -> list[list[tuple[int, float]]]: ...
def instruction_sets() -> list[str]: ...
