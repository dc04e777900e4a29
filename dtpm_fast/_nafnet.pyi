import numpy as np

def first_pass(
    x: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    conv1: np.ndarray,
    conv1_bias: np.ndarray,
    depthwise: np.ndarray,
    depthwise_bias: np.ndarray,
    gated: np.ndarray,
    average: np.ndarray,
    threads: int,
    isa: str,
) -> None: ...
def second_pass(
    x: np.ndarray,
    gated: np.ndarray,
    average: np.ndarray,
    attention: np.ndarray,
    attention_bias: np.ndarray,
    conv3: np.ndarray,
    conv3_bias: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    conv4: np.ndarray,
    conv4_bias: np.ndarray,
    conv5: np.ndarray,
    conv5_bias: np.ndarray,
    condition: np.ndarray | None,
    adapter: np.ndarray | None,
    threads: int,
    isa: str,
) -> None: ...
def down(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, out: np.ndarray, threads: int, isa: str) -> None: ...
def up(x: np.ndarray, weight: np.ndarray, skip: np.ndarray, threads: int, isa: str) -> None: ...
def intro(
    picture: np.ndarray, weight: np.ndarray, addend: np.ndarray, out: np.ndarray, threads: int, isa: str
) -> None: ...
def ending(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, picture: np.ndarray, threads: int, isa: str
) -> None: ...
def update(
    row: np.ndarray,
    x: np.ndarray,
    output: np.ndarray,
    previous: np.ndarray,
    y_eps: np.ndarray,
    next: np.ndarray,
    x0: np.ndarray,
    threads: int,
) -> None: ...
def strip_width(height: int, width: int, channels: int) -> int: ...
def instruction_sets(bfloat16: bool = False) -> list[tuple[str, int]]: ...
