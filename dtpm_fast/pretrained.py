"""Pretrained networks that others publish: found as a file, checked by hash, or downloaded once."""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dtpm_fast.errors import UserError

DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer, before a machine counts as offline


class BackboneMissing(UserError):
    """A backbone is not on this machine and cannot be downloaded. A metric is then left out."""


@dataclass(frozen=True)
class Backbone:
    """`user` needs the file, and `without` says what becomes of it offline. `sha256` is the beginning of the file's
    hash, which its publishers put into its name."""

    user: str
    url: str
    sha256: str
    variable: str
    without: str = "is left out"

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def find(self, file: Path | str | None = None) -> Path:
        """The file: `file`, else the one that the environment variable names, else torch's hub cache, else downloaded
        into it. Raises `UserError` for a given file that is missing or another one, `BackboneMissing` offline."""
        file = file or os.environ.get(self.variable)
        if file is not None:
            return self._checked(Path(file))
        cached = Path(torch.hub.get_dir()) / "checkpoints" / self.file_name
        if not cached.is_file():
            self._download(cached)
        return self._checked(cached)

    def _checked(self, path: Path) -> Path:
        try:
            with path.open("rb") as file:
                found = hashlib.sha256(file.read()).hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); {self._wanted()}") from error
        if not found.startswith(self.sha256):
            raise UserError(f"{path}: is another file (SHA-256 {found[:8]}...); {self._wanted()}")
        return path

    def _download(self, target: Path) -> None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _timeout(DOWNLOAD_TIMEOUT):
                torch.hub.download_url_to_file(self.url, str(target), hash_prefix=self.sha256)
        except (OSError, RuntimeError) as error:
            raise BackboneMissing(
                f"{self.user} {self.without}: {self.file_name} (SHA-256 {self.sha256}...) is not here and cannot be "
                f"downloaded from {self.url} ({error}); fetch it on a machine with a network and set {self.variable} "
                "to the file"
            ) from error

    def _wanted(self) -> str:
        return f"{self.user} needs {self.file_name} (SHA-256 {self.sha256}...) from {self.url}"


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
