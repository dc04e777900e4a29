"""The HTML page: its content, and how it behaves in a real browser."""

import base64
import io
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtpm_fast import Restorer
from dtpm_fast.commands.restore import main as restore
from dtpm_fast.errors import UserError
from dtpm_fast.report import Case, Picture, chosen, evenly, find_crops, write_report

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")


def flat(colour: tuple[int, int, int], height: int = 120, width: int = 160) -> np.ndarray:
    return np.full((height, width, 3), colour, dtype=np.uint8)


RED, GREEN, BLUE, GREY = (220, 20, 20), (20, 200, 20), (20, 20, 220), (128, 128, 128)


def cases() -> list[Case]:
    versions = [
        Picture("input", flat(RED), {"psnr_y": 20.5, "ssim_y": 0.5}),
        Picture("initial predictor", flat(BLUE), {"psnr_y": 25.25, "ssim_y": 0.7}),
        Picture("4 steps", flat(GREEN), {"psnr_y": 31.123, "ssim_y": 0.91}),
    ]
    return [Case("rain/<1>.png", versions, Picture("ground truth", flat(GREY))), Case("two", versions[::2])]


class Page(HTMLParser):
    """Every tag's attributes, and whether tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("img", "input", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_one_file_that_loads_nothing_and_escapes_names(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    means = {"input": {"psnr_y": 20.5}, "4 steps": {"psnr_y": 31.123, "lpips": 0.05}}
    write_report(cases(), path, title="a <b> & c", about={"Data": "here & there"}, means=means)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.found:
        assert tag not in ("link", "iframe", "object")
        source = attributes.get("src")
        assert source is None or source.startswith("data:image/")
        assert "href" not in attributes
        assert tag != "img" or "alt" in attributes
    assert "http" not in text
    assert "url(" not in text
    assert "a &lt;b&gt; &amp; c" in text
    assert "rain/&lt;1&gt;.png" in text
    assert "31.12</td>" in text
    assert "0.0500</td>" in text
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_survive_embedding_and_crops_are_lossless(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    rng = np.random.default_rng(1)
    before, after = (rng.integers(0, 256, (50, 70, 3), dtype=np.uint8) for _ in range(2))
    write_report([Case("x", [Picture("input", before), Picture("result", after)])], path)
    embedded = re.findall(r"data:image/(\w+);base64,([A-Za-z0-9+/=]+)", path.read_text())
    assert [kind for kind, _ in embedded] == ["webp", "webp", "png", "png"]
    assert path.read_text().count('class="frame"') == 1
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for _, data in embedded]
    assert sizes == [(70, 50), (70, 50), (50, 50), (50, 50)]
    (left, top, right, bottom), *_ = find_crops(before, after)
    for picture, (_, data) in zip((before, after), embedded[2:], strict=True):
        crop = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
        assert np.array_equal(crop, picture[top:bottom, left:right])


def test_large_pictures_are_shrunk(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    wide = [Picture(label, flat(RED, 40, 3200)) for label in ("input", "result")]
    write_report([Case("wide", wide)], path)
    data = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", path.read_text())[0]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (1600, 20)


def test_crops_lie_where_the_pictures_differ_most() -> None:
    before = flat(GREY, 300, 400)
    after = before.copy()
    after[200:280, 300:380] += 50
    after[100:110, 100:110] += 50
    first, second = find_crops(before, after)
    assert first == (288, 192, 384, 288)
    assert second == (96, 96, 192, 192)
    assert find_crops(before[:1, :1], after[:1, :1]) == [(0, 0, 1, 1)]


def test_pictures_of_a_large_set_are_chosen_evenly() -> None:
    assert evenly(3, 12) == {0, 1, 2}
    assert evenly(101, 3) == {0, 50, 100}
    assert evenly(5, 1) == {0}
    assert chosen(3, 3) == "all of them" and "3 of them" in chosen(3, 5)


def test_wrong_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with pytest.raises(ValueError, match="at least one case"):
        write_report([], path)
    with pytest.raises(ValueError, match="x: needs at least two versions"):
        write_report([Case("x", [Picture("input", flat(RED))])], path)
    with pytest.raises(ValueError, match=r"x: needs .* all of one size"):
        write_report([Case("x", [Picture("input", flat(RED)), Picture("result", flat(RED, 9))])], path)
    assert not path.exists()
    (tmp_path / "file").write_text("")
    taken = iter(cases())
    with pytest.raises(UserError, match="cannot be written"):
        write_report(taken, tmp_path / "file" / "page.html")
    assert next(taken).name == "rain/<1>.png"  # no picture was worked on in vain


def browse(page: Path, width: int, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    profile = page.parent / f"profile{width}"
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += [f"user-data-dir={profile}", f"window-size={width},900"]
    return subprocess.run(
        [BROWSER, *(f"--{flag}" for flag in flags), *options, page.as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip


@needs_browser
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_input_and_result_on_either_side_of_the_divider(tmp_path: Path, width: int) -> None:
    path, shot = tmp_path / "page.html", tmp_path / "shot.png"
    write_report(cases()[1:], path, title="t")
    browse(path, width, f"--screenshot={shot}")
    pixels = np.array(Image.open(shot).convert("RGB")).astype(int)
    red, green = (np.abs(pixels - np.array(colour)).max(axis=2) < 20 for colour in (RED, GREEN))
    row = int((red.sum(axis=1) * green.sum(axis=1)).argmax())  # through the slider
    reds, greens = np.flatnonzero(red[row]), np.flatnonzero(green[row])
    assert reds.max() < greens.min()
    assert abs(len(reds) - len(greens)) <= 0.1 * len(reds)  # the divider starts in the middle
    assert len(reds) + len(greens) > 0.4 * width


@needs_browser
def test_the_divider_moves_and_other_versions_can_be_chosen(tmp_path: Path) -> None:
    """A key press becomes an input event of the range: here a script that the test adds sends it."""
    path = tmp_path / "page.html"
    write_report(cases(), path)
    script = """<script>
      var section = document.querySelector('.case'), range = section.querySelector('input');
      range.focus();
      range.value = 20;
      range.dispatchEvent(new Event('input'));
      var select = section.querySelector('select[data-side=right]');
      select.value = 3;
      select.dispatchEvent(new Event('change'));
      var stage = section.querySelector('.stage'), right = stage.querySelector('.right');
      document.title = [document.activeElement.type, getComputedStyle(stage.querySelector('.left')).clipPath,
        right.alt, right.src === section.querySelectorAll('.versions img')[3].src,
        document.documentElement.scrollWidth <= innerWidth, range.getAttribute('aria-valuetext')].join(' | ');
    </script></body>"""
    path.write_text(path.read_text().replace("</body>", script))
    title = re.findall(r"<title>(.*?)</title>", browse(path, 500, "--dump-dom").stdout)[0]
    kind, clip, alt, same, fits, spoken = title.split(" | ")
    assert (kind, alt, same, fits, spoken) == ("range", "ground truth", "true", "true", "20% input")
    assert "80%" in clip


@needs_browser
def test_a_browser_shows_what_dtpm_restore_did(tmp_path: Path, random_weights: Callable[..., Path]) -> None:
    """Without ground truth: input, predictor's picture and result, each as it was computed, and the crops' frames where
    the crops were cut."""
    photo = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")
    weights = random_weights(tmp_path / "tiny.safetensors")
    page = tmp_path / "page.html"
    common = ["--task", "derain", "--weights", str(weights), "--device", "cpu", "--report", str(page)]
    assert restore([str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png"), *common]) == 0
    script = """<script>
      var crop = document.querySelectorAll('.crops')[0].querySelectorAll('img');
      Array.from(document.images, function (image) { image.loading = 'eager'; });
      // Not image.decode(): the browser's virtual time does not wait for it, and ran out on a busy machine.
      window.addEventListener('load', function () {
        var stage = document.querySelector('.stage').getBoundingClientRect();
        var frame = document.querySelector('.frame').getBoundingClientRect();
        var canvas = document.createElement('canvas');
        canvas.width = canvas.height = crop[0].naturalWidth;
        var pen = canvas.getContext('2d');
        var mean = Array.from(crop, function (image) {
          pen.drawImage(image, 0, 0);
          var data = pen.getImageData(0, 0, canvas.width, canvas.height).data, sum = 0;
          for (var i = 0; i < data.length; i += 4) sum += data[i] + data[i + 1] + data[i + 2];
          return (sum / data.length * 4 / 3).toFixed(3);
        });
        document.title = [
          Array.from(document.querySelectorAll('.versions figcaption'), function (c) { return c.textContent; }).join(),
          mean.join(), Math.round((frame.left - stage.left) / stage.width * 160),
          Math.round((frame.top - stage.top) / stage.height * 120), Math.round(frame.width / stage.width * 160)
        ].join(' | ');
      });
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", script))
    title = re.findall(r"<title>(.*?)</title>", browse(page, 1000, "--dump-dom", "--virtual-time-budget=20000").stdout)[
        0
    ]
    labels, means, left, top, side = title.split(" | ")
    assert labels == "input,initial predictor,result"
    result = np.array(Image.open(tmp_path / "b.png"))
    predicted = Restorer.from_pretrained(weights, "derain", device="cpu").predict(photo)
    (x, y, right, bottom), *_ = find_crops(photo, result)
    assert [int(v) for v in (left, top, side)] == [x, y, right - x]
    wanted = [image[y:bottom, x:right].mean() for image in (photo, predicted, result)]
    assert [float(v) for v in means.split(",")] == pytest.approx(wanted, abs=0.01)
    assert len({round(float(v), 2) for v in wanted}) == 3
