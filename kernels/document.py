"""Puts a generated table into a document, between the two marker lines that name it."""

from pathlib import Path

from dtpm_fast.atomic import atomic_path
from dtpm_fast.errors import UserError


def write_table(document: Path, name: str, table: str) -> None:
    """Replace what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`. Raises `UserError` without them."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{document}: cannot be read ({error.strerror or error})") from error
    if begin not in text or end not in text:
        raise UserError(f"{document}: lacks the lines {begin} and {end}")
    before, after = text.split(begin)[0], text.split(end)[1]
    with atomic_path(document) as path:
        path.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
