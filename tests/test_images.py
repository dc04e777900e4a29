"""Pictures in and out: every mode that people have, and broken files by name."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from dtpm_fast.errors import UserError
from dtpm_fast.images import image_size, read_image, to_rgb8, write_image


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tif", ".ppm"])
def test_lossless_formats_keep_every_byte(tmp_path, rgb, suffix):
    write_image(tmp_path / f"a{suffix}", rgb)
    assert np.array_equal(read_image(tmp_path / f"a{suffix}"), rgb)


def test_grey_palette_16_bit_and_alpha(tmp_path, rgb):
    grey = rgb[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, 2))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    assert np.array_equal(read_image(tmp_path / "grey16.png"), np.repeat(grey[..., None], 3, 2))
    Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "palette.png"), rgb)
    alpha = np.dstack([rgb, np.full(grey.shape, 255, np.uint8)])
    alpha[0, 0, 3] = 0
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    read = read_image(tmp_path / "alpha.png")
    assert np.array_equal(read[1:], rgb[1:]) and (read[0, 0] == 255).all()


def test_exif_orientation_is_applied(tmp_path, rgb):
    image = Image.fromarray(rgb)
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(rgb, -1))


def test_broken_files_are_named(tmp_path, rgb):
    (tmp_path / "text.png").write_text("not a picture")
    write_image(tmp_path / "whole.jpg", np.tile(rgb, (20, 20, 1)))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    (tmp_path / "empty.png").touch()
    for name, message in (
        ("text.png", "not a readable picture"),
        ("cut.jpg", "not a readable"),
        ("empty.png", "not a readable"),
        ("none.png", "no such file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_a_broken_avif_is_named_whatever_its_suffix(tmp_path, rgb):
    """For which Pillow has another error: sites serve AVIF under names that end in .jpg."""
    Image.fromarray(rgb).save(tmp_path / "whole.avif")
    whole = (tmp_path / "whole.avif").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(whole.replace(b"av1C", b"xxxx"))
    for read in (read_image, image_size):
        with pytest.raises(UserError, match=r"broken\.jpg: not a readable picture"):
            read(tmp_path / "broken.jpg")


def test_an_unknown_suffix_or_a_failed_write_leaves_nothing(tmp_path, rgb):
    with pytest.raises(UserError, match="unknown picture format"):
        write_image(tmp_path / "a.xyz", rgb)
    with pytest.raises(TypeError):
        write_image(tmp_path / "a.png", rgb.astype(np.complex64))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_image(tmp_path / "file" / "a.png", rgb)


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".webp"])
def test_the_size_in_the_header_is_that_of_the_picture(tmp_path, rgb, suffix):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}{suffix}"
        Image.fromarray(rgb).save(path, exif=exif)
        assert image_size(path) == read_image(path).shape[:2]
        with Image.open(path) as opened:  # not loaded yet: newer Pillows turn a TIFF while they load it
            assert np.array_equal(to_rgb8(opened), read_image(path))
    with pytest.raises(UserError, match=r"none\.png: not a readable picture"):
        image_size(tmp_path / "none.png")


def test_odd_exif_does_not_matter(tmp_path, rgb):
    turn = struct.pack("<HHIHxx", 0x0112, 3, 1, 6)
    resolution = struct.pack("<HHI4s", 0x011A, 2, 4, b"abc")  # text where a fraction belongs
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turn + resolution + bytes(4)
    Image.fromarray(rgb).save(tmp_path / "odd.jpg", exif=exif)
    assert read_image(tmp_path / "odd.jpg").shape == (13, 9, 3)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_exif_that_is_none_leaves_the_picture_as_it_is(tmp_path, rgb, suffix):
    path = tmp_path / f"junk{suffix}"
    Image.fromarray(rgb).save(path, exif=b"no EXIF at all", lossless=True)
    assert np.array_equal(read_image(path), rgb) and image_size(path) == (9, 13)


def test_colours_of_another_profile_become_srgb(tmp_path, rgb):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace("sRGB".encode("utf-16-be"), "sBGR".encode("utf-16-be"))  # its description
    swapped = swapped.replace(b"rXYZ", b"_XYZ", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"_XYZ", b"bXYZ", 1)
    for name, profile in (("srgb", srgb), ("swapped", swapped), ("none", b"no profile")):
        Image.fromarray(rgb).save(tmp_path / f"{name}.png", icc_profile=profile)
    assert np.array_equal(read_image(tmp_path / "srgb.png"), rgb)
    assert np.array_equal(read_image(tmp_path / "none.png"), rgb)
    assert np.abs(read_image(tmp_path / "swapped.png").astype(int) - rgb[..., ::-1]).max() <= 2
    # Of an alpha channel and a palette too; but a grey picture has no use for a profile of three colours.
    alpha = Image.fromarray(rgb)
    alpha.putalpha(Image.fromarray(np.full(rgb.shape[:2], 255, np.uint8)))
    alpha.save(tmp_path / "alpha.png", icc_profile=swapped)
    assert np.array_equal(read_image(tmp_path / "alpha.png"), read_image(tmp_path / "swapped.png"))
    few = Image.fromarray(rgb).quantize(8)
    few.save(tmp_path / "palette.png", icc_profile=swapped)
    few.convert("RGB").save(tmp_path / "flat.png", icc_profile=swapped)
    assert np.array_equal(read_image(tmp_path / "palette.png"), read_image(tmp_path / "flat.png"))
    few.save(tmp_path / "clear.png", icc_profile=swapped, transparency=few.getpixel((0, 0)))
    clear = read_image(tmp_path / "clear.png")
    shown = np.asarray(few) != few.getpixel((0, 0))
    assert (clear[~shown] == 255).all()
    assert np.array_equal(clear[shown], read_image(tmp_path / "flat.png")[shown])


def test_linear_srgb_is_converted_for_all_its_name(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    linear = srgb.replace(b"para" + bytes(4) + b"\0\3\0\0", b"curv" + bytes(8))  # as GIMP's "built-in Linear sRGB"
    Image.new("RGB", (4, 3), (128, 128, 128)).save(tmp_path / "linear.png", icc_profile=linear)
    assert (read_image(tmp_path / "linear.png") == 188).all()


def linear_grey() -> bytes:
    """A profile of grey whose values are proportional to light."""
    text = b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 8, 28) + "grey".encode("utf-16-be")
    white = struct.pack(">3i", 63190, 65536, 54061)
    contents = {b"desc": text, b"cprt": text, b"wtpt": b"XYZ " + bytes(4) + white, b"kTRC": b"curv" + bytes(8)}
    table, data, start = struct.pack(">I", len(contents)), b"", 132 + 12 * len(contents)
    for name, content in contents.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(data), 0x04200000, b"mntr", b"GRAY", b"XYZ ", b"acsp") + white
    return head.ljust(128, b"\0") + table + data


def test_a_profile_of_grey_counts_for_grey_pictures(tmp_path: Path) -> None:
    for mode, expected in (("L", 188), ("LA", 188), ("RGB", 128)):  # half of white's light is 188 of 255 in sRGB
        Image.new("L", (4, 3), 128).convert(mode).save(tmp_path / "grey.png", icc_profile=linear_grey())
        assert (read_image(tmp_path / "grey.png") == expected).all()
    Image.fromarray(np.full((3, 4), 128 * 257, np.uint16)).save(tmp_path / "grey16.png", icc_profile=linear_grey())
    assert (read_image(tmp_path / "grey16.png") == 188).all()


@pytest.mark.parametrize("top", [1, 255, 65535])
def test_floating_point_pictures_are_scaled_by_their_range(tmp_path, rgb, top):
    Image.fromarray(rgb[..., 0].astype(np.float32) / 255 * top).save(tmp_path / "f.tif")
    assert np.array_equal(read_image(tmp_path / "f.tif")[..., 0], rgb[..., 0])
    Image.fromarray(np.full((3, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(UserError, match=r"nan\.tif: .*not finite"):
        read_image(tmp_path / "nan.tif")
