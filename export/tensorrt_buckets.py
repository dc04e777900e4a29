"""Shape buckets: the sizes that an engine is built for, one optimisation profile each."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dtpm_fast.errors import UserError
from dtpm_fast.export.manifest import TensorSpec


@dataclass(frozen=True)
class Bucket:
    """Pictures up to (batch, 3, height, width), and tuned for that size."""

    batch: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str, multiple: int) -> "Bucket":
        """Of "1088x1920" or, with a batch, "4x256x256". Sides are rounded up to multiples of `multiple`. Raises
        `UserError`."""
        match = re.fullmatch(r"(?:(\d{1,4})x)?(\d{1,5})x(\d{1,5})", text)
        sides = [int(part) for part in match.groups(default="1")] if match else []
        if not sides or min(sides) < 1:
            raise UserError(f"bucket {text!r}: must be HEIGHTxWIDTH or BATCHxHEIGHTxWIDTH, as in 1088x1920")
        batch, height, width = sides
        return cls(batch, -(-height // multiple) * multiple, -(-width // multiple) * multiple)

    def holds(self, batch: int, height: int, width: int) -> bool:
        return batch <= self.batch and height <= self.height and width <= self.width

    def profile(self, spec: TensorSpec, multiple: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The smallest, the best and the largest shape of an input: from one picture of the smallest size on."""
        largest = spec.sides(self.batch, self.height, self.width)
        return spec.sides(1, multiple, multiple), largest, largest

    def __str__(self) -> str:
        return f"{self.batch}x{self.height}x{self.width}"


def buckets_of(engine: dict[str, Any]) -> list[Bucket]:
    """Those of a manifest's "engine", in the order of the profiles; none where sizes are free."""
    return [Bucket(**bucket) for bucket in engine.get("buckets", ())]


def choose_bucket(buckets: Sequence[Bucket], batch: int, height: int, width: int) -> int:
    """The index of the smallest bucket that holds the size. Raises `UserError` when none does."""
    fitting = [i for i, bucket in enumerate(buckets) if bucket.holds(batch, height, width)]
    if not fitting:
        raise UserError(
            f"a batch of {batch} at {height}x{width} (height x width) fits none of the engine's buckets "
            f"({', '.join(map(str, buckets))}): export again with --bucket {batch}x{height}x{width}"
        )
    return min(fitting, key=lambda i: buckets[i].batch * buckets[i].height * buckets[i].width)
