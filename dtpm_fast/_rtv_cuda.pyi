def unusable() -> str: ...
def workspace(height: int, width: int, channels: int) -> int: ...
def smooth(
    planes: int,
    workspace: int,
    reports: int,
    is_double: bool,
    images: int,
    channels: int,
    height: int,
    width: int,
    lam: float,
    sigma: float,
    sharpness: float,
    iterations: int,
    tol: float,
    stream: int,
) -> None: ...
