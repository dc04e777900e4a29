"""Photos are found wherever a folder keeps them."""

from pathlib import Path

import pytest
from PIL import Image

from dtpm_fast.data.pictures import find_photos
from dtpm_fast.errors import UserError


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    top = tmp_path / "photos"
    for name in ("b/two.png", "one.JPG", "b/.hidden/x.png", ".y.png"):
        picture(top / name)
    picture(tmp_path / "elsewhere" / "deep" / "three.webp")
    (top / "a").symlink_to(top / "b")  # a second name of what is there
    (top / "b" / "up").symlink_to(top)  # a circle
    (top / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(top)
    (top / "gone").symlink_to(tmp_path / "nowhere")
    assert [str(path.relative_to(top)) for path in find_photos(top)] == ["b/two.png", "c/deep/three.webp", "one.JPG"]


def test_a_folder_without_pictures_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(UserError, match=r"no pictures in it \(looked for \.bmp"):
        find_photos(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_photos(tmp_path / "none")
