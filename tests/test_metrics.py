"""Metrics against independent implementations: numpy, scipy and scikit-image, computed another way."""

import hashlib
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.signal
import scipy.special
import skimage.metrics
import torch
import torchmetrics
import torchvision
from PIL import Image
from torch import Tensor, nn

from dtpm_fast.errors import UserError
from dtpm_fast.metrics import niqe as niqe_module
from dtpm_fast.metrics import perceptual
from dtpm_fast.metrics.__main__ import main as metrics_main
from dtpm_fast.metrics.curve import write_curve
from dtpm_fast.metrics.distortion import PSNR_MAX, luma, psnr
from dtpm_fast.metrics.evaluation import check_sizes
from dtpm_fast.metrics.niqe import Niqe
from dtpm_fast.metrics.perceptual import Lpips, PatchFid, cut_patches
from dtpm_fast.metrics.protocols import PROTOCOLS, default_protocol, weatherdiff_size
from dtpm_fast.metrics.texture import remove_texture
from dtpm_fast.pretrained import DOWNLOAD_TIMEOUT, Backbone, BackboneMissing

CPU = torch.device("cpu")


def tensor(image: np.ndarray) -> Tensor:
    """HxWx3 to (1, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]


def photo(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture in [0, 1] that is smooth with edges, and a disturbed one; not on the 8-bit grid."""
    rng = np.random.default_rng()
    y, x = np.mgrid[:height, :width] / 20
    target = np.stack([np.sin(x + i) * np.cos(y * (i + 1)) * 0.4 + 0.5 for i in range(3)], axis=2)
    target[height // 3 :, : width // 2] *= 0.5
    image = np.clip(target + rng.normal(0, rng.uniform(0.02, 0.2), target.shape), 0, 1)
    return image, target


def y_by_hand(rgb: np.ndarray) -> np.ndarray:
    """Y of BT.601 from its definition: Kr = 0.299, Kb = 0.114, 219 levels above 16."""
    kr, kb = 0.299, 0.114
    return 16 + 219 * (kr * rgb[..., 0] + (1 - kr - kb) * rgb[..., 1] + kb * rgb[..., 2])


def psnr_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    return 20 * np.log10(255 / np.sqrt(np.mean((a - b) ** 2)))


def ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al.'s SSIM of one channel through a full 2-d convolution, valid part."""
    axis = np.arange(-5, 6)
    window = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(x: np.ndarray) -> np.ndarray:
        return scipy.signal.convolve2d(x, window, mode="valid")

    mx, my = mean(a), mean(b)
    vx, vy, cov = mean(a * a) - mx**2, mean(b * b) - my**2, mean(a * b) - mx * my
    c1, c2 = 6.5025, 58.5225
    return float((((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


@pytest.mark.parametrize("name", ["native", "weatherdiff", "gopro"])
@pytest.mark.parametrize("size", [(37, 53), (64, 48)])
def test_eight_bit_protocols_equal_independent_implementations(name: str, size: tuple[int, int]) -> None:
    image, target = photo(*size)
    found = PROTOCOLS[name].compare(tensor(image), tensor(target))
    image, target = np.rint(image * 255), np.rint(target * 255)
    y, y_target = y_by_hand(image / 255), y_by_hand(target / 255)
    assert found["psnr_y"] == pytest.approx(psnr_by_hand(y, y_target), abs=1e-4)
    assert found["ssim_y"] == pytest.approx(ssim_by_hand(y, y_target), abs=1e-4)
    assert found["psnr_rgb"] == pytest.approx(psnr_by_hand(image, target), abs=1e-4)
    per_channel = [ssim_by_hand(image[..., i], target[..., i]) for i in range(3)]
    assert found["ssim_rgb"] == pytest.approx(np.mean(per_channel), abs=1e-4)
    assert found["mae"] == pytest.approx(np.abs(image - target).mean() / 255, abs=1e-4)


def test_dpdd_equals_scikit_image_with_its_defaults_on_unrounded_pictures() -> None:
    image, target = photo(45, 61)
    found = PROTOCOLS["dpdd"].compare(tensor(image), tensor(target))
    expected = skimage.metrics.structural_similarity(target, image, data_range=1.0, channel_axis=-1)
    assert found["ssim_rgb"] == pytest.approx(expected, abs=1e-6)
    expected = skimage.metrics.peak_signal_noise_ratio(target, image, data_range=1.0)
    assert found["psnr_rgb"] == pytest.approx(expected, abs=1e-5)
    assert found["mae"] == pytest.approx(np.abs(image - target).mean(), abs=1e-9)


def test_golden_values_of_a_written_down_picture() -> None:
    """Figures noted once from the numpy and scipy functions above."""
    target = (np.arange(16 * 20 * 3).reshape(16, 20, 3) * 37 % 256) / 255
    image = (np.arange(16 * 20 * 3).reshape(16, 20, 3) * 41 % 256) / 255
    found = PROTOCOLS["native"].compare(tensor(image), tensor(target))
    assert found == pytest.approx(GOLDEN, abs=1e-4)


GOLDEN = {"psnr_y": 11.631008, "ssim_y": 0.386923, "psnr_rgb": 7.760046, "ssim_rgb": 0.275707, "mae": 0.334118}


def test_luma_is_studio_range() -> None:
    colours = torch.tensor([[0.0, 0, 0], [255, 255, 255], [255, 0, 0]], dtype=torch.float64).T.reshape(1, 3, 1, 3)
    assert luma(colours).flatten().tolist() == pytest.approx([16, 235, 81.481])


def test_full_range_luma_would_be_lower_by_a_constant() -> None:
    """Why the range matters: 20 log10(255/219) = 1.32 dB."""
    image, target = (torch.rand(1, 3, 20, 20, dtype=torch.float64) * 255 for _ in range(2))
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)
    full = psnr((image * weights).sum(1, keepdim=True), (target * weights).sum(1, keepdim=True))
    assert (psnr(luma(image), luma(target)) - full).item() == pytest.approx(20 * np.log10(255 / 219), abs=1e-3)


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_equal_pictures_get_the_best_figures(name: str) -> None:
    image = tensor(photo(24, 31)[0])
    found = PROTOCOLS[name].compare(image, image)
    assert found == pytest.approx({"psnr_y": PSNR_MAX, "ssim_y": 1, "psnr_rgb": PSNR_MAX, "ssim_rgb": 1, "mae": 0})


def test_rounding_belongs_to_the_protocol() -> None:
    target = tensor(np.full((20, 20, 3), 100 / 255))
    image = target + 0.4 / 255
    assert PROTOCOLS["native"].compare(image, target)["mae"] == 0
    assert PROTOCOLS["dpdd"].compare(image, target)["mae"] == pytest.approx(0.4 / 255)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 320), (480, 320)),
        ((481, 321), (496, 336)),
        ((2048, 1365), (1024, 688)),
        ((1365, 2048), (688, 1024)),
        ((1025, 1025), (1024, 1024)),
        ((3, 5000), (16, 1024)),
    ],
)
def test_weatherdiff_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert weatherdiff_size(*size) == expected


def test_weatherdiff_resizes_both_pictures_and_the_others_none() -> None:
    degraded, target = (np.random.default_rng().integers(0, 256, (33, 50, 3), dtype=np.uint8) for _ in range(2))
    for name, protocol in PROTOCOLS.items():
        shapes = {protocol.prepare(picture).shape for picture in (degraded, target)}
        assert shapes == ({(48, 64, 3)} if name == "weatherdiff" else {(33, 50, 3)})
    flat = np.full((33, 50, 3), 77, dtype=np.uint8)
    assert (PROTOCOLS["weatherdiff"].prepare(flat) == 77).all()


def test_default_protocols() -> None:
    assert [default_protocol(task) for task in ("deblur", "defocus", "derain")] == ["gopro", "dpdd", "native"]


def test_sizes_that_do_not_fit_are_named() -> None:
    small = torch.rand(1, 3, 8, 30)
    with pytest.raises(UserError, match="30x8 pixels is smaller than SSIM's window of 11x11"):
        PROTOCOLS["native"].compare(small, small)
    with pytest.raises(UserError, match="sizes differ"):
        PROTOCOLS["native"].compare(torch.rand(1, 3, 20, 20), torch.rand(1, 3, 20, 21))


def test_sizes_are_checked_as_the_protocol_compares_them(alexnet: tuple[Path, nn.Module]) -> None:
    pairs = [(Path(name), Path("t", name)) for name in ("a.png", "b.png")]
    lpips = Lpips(CPU, alexnet[0], backbone_of(alexnet[0]))
    check_sizes(pairs, [(11, 11), (8, 8)], PROTOCOLS["weatherdiff"])  # both are compared at 16x16
    check_sizes(pairs, [(63, 63), (70, 80)], PROTOCOLS["native"], lpips)
    with pytest.raises(UserError, match=r"^b\.png: a picture of 30x8 pixels is smaller than SSIM's window"):
        check_sizes(pairs, [(11, 11), (8, 30)], PROTOCOLS["dpdd"])
    with pytest.raises(UserError, match=r"^a\.png: LPIPS needs .* 63x63 pixels, got 80x48"):
        check_sizes(pairs, [(40, 70), (70, 80)], PROTOCOLS["weatherdiff"], lpips)


# ------------------------------------------------------------------------------------------------------- perceptual


@pytest.fixture
def alexnet(tmp_path: Path) -> tuple[Path, nn.Module]:
    """An AlexNet's convolutions with fresh weights, as a file and a network."""
    features = torchvision.models.alexnet(weights=None).features.eval()
    file = tmp_path / "alexnet.pth"
    torch.save({f"features.{key}": value for key, value in features.state_dict().items()}, file)
    return file, features


def backbone_of(file: Path) -> Backbone:
    """A backbone that accepts this file alone."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Backbone("LPIPS", "https://example.invalid/file.pth", digest[:8], "DTPM_TEST_BACKBONE")


def test_lpips_equals_its_definition(alexnet: tuple[Path, nn.Module]) -> None:
    """Zhang et al. 2018, eq. 1, written out over torchvision's network."""
    file, features = alexnet
    image, target = (tensor(x).float() for x in photo(70, 91))
    found = Lpips(CPU, file, backbone_of(file))(image, target)
    weights = torch.load(linear_layers(), map_location="cpu", weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    expected, layer = 0.0, 0
    x, y = ((picture * 2 - 1 - shift) / scale for picture in (image, target))
    with torch.no_grad():
        for module in features.children():
            x, y = module(x.clone()), module(y.clone())
            if isinstance(module, nn.ReLU):
                a, b = (z / z.square().sum(1, keepdim=True).sqrt() for z in (x, y))
                weight = weights[f"lin{layer}.model.1.weight"]
                expected += ((a - b).square().nan_to_num() * weight).sum(1).mean().item()
                layer += 1
    assert layer == 5
    assert found == pytest.approx(expected, rel=1e-4)
    assert found > 0


def linear_layers() -> Path:
    """LPIPS' linear layers, as torchmetrics ships them."""
    return Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"


def test_lpips_of_equal_pictures_is_zero_and_tiny_ones_are_refused(
    alexnet: tuple[Path, nn.Module],
) -> None:
    lpips = Lpips(CPU, alexnet[0], backbone_of(alexnet[0]))
    assert lpips(torch.full((1, 3, 64, 64), 0.3), torch.full((1, 3, 64, 64), 0.3)) == 0
    with pytest.raises(UserError, match="at least 63x63"):
        lpips(torch.rand(1, 3, 62, 80), torch.rand(1, 3, 62, 80))


def test_another_file_than_the_backbones_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "alexnet.pth"
    file.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"alexnet.pth: is another file .*7be5be79"):
        Lpips(CPU, file)
    with pytest.raises(UserError, match=r"none.pth: cannot be read"):
        Lpips(CPU, tmp_path / "none.pth")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(3)}, file)
    with pytest.raises(UserError, match="does not hold torchvision's AlexNet"):
        Lpips(CPU, file, backbone_of(file))


def test_offline_says_which_file_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(url: str, *_: object, **__: object) -> None:
        assert socket.getdefaulttimeout() == DOWNLOAD_TIMEOUT
        raise OSError(f"no route to {url}")

    before = socket.getdefaulttimeout()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.delenv("DTPM_ALEXNET", raising=False)
    with pytest.raises(BackboneMissing, match=r"LPIPS is left out: alexnet-owt-7be5be79.pth .*DTPM_ALEXNET"):
        Lpips(CPU)
    assert socket.getdefaulttimeout() == before


def test_environment_and_cache_give_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, alexnet: tuple[Path, nn.Module]
) -> None:
    backbone = backbone_of(alexnet[0])
    monkeypatch.setenv(backbone.variable, str(alexnet[0]))
    assert backbone.find() == alexnet[0]
    monkeypatch.setenv(backbone.variable, str(tmp_path / "another.pth"))
    assert backbone.find(alexnet[0]) == alexnet[0]  # what is given goes before what the environment says
    monkeypatch.delenv(backbone.variable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / "file.pth"
    cached.parent.mkdir()
    cached.write_bytes(alexnet[0].read_bytes())
    assert backbone.find() == cached


class _Statistics(nn.Module):
    """A cheap stand-in for a network: 6 features of a patch."""

    num_features = 6

    def forward(self, patches: Tensor) -> Tensor:
        x = patches.float()
        return torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3))], dim=1)


def frechet_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)) through a matrix square root; torchmetrics takes eigenvalues."""
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * root))


def test_patch_fid_equals_the_definition() -> None:
    generator = torch.Generator().manual_seed(int(np.random.default_rng().integers(2**31)))
    distance = PatchFid(["input", "result"], CPU, extractor=_Statistics())
    pictures: dict[str, list[Tensor]] = {"input": [], "result": [], "target": []}
    for height, width in ((600, 520), (512, 800), (300, 260)):
        target = torch.rand(1, 3, height, width, generator=generator) ** torch.rand(1, generator=generator).item()
        images = {"input": (target * 0.7) ** 2, "result": target * 0.95}
        distance.update(images, target)
        for name, picture in {**images, "target": target}.items():
            rounded = (picture * 255).round().to(torch.uint8)
            for top in range(0, height - 255, 256):
                for left in range(0, width - 255, 256):
                    pictures[name].append(rounded[:, :, top : top + 256, left : left + 256])
    assert distance.patches == 4 + 6 + 1
    features = {name: _Statistics()(torch.cat(patches)).double().numpy() for name, patches in pictures.items()}
    for name, found in distance.compute().items():
        assert found == pytest.approx(frechet_by_hand(features[name], features["target"]), rel=1e-4, abs=1e-4)


def test_patches_are_cut_row_by_row_and_the_rest_is_left_out() -> None:
    image = torch.randint(0, 256, (1, 3, 530, 700), dtype=torch.uint8)
    patches = cut_patches(image)
    assert patches.shape == (4, 3, 256, 256)
    assert torch.equal(patches[1], image[0, :, :256, 256:512])
    assert torch.equal(patches[2], image[0, :, 256:512, :256])
    assert len(cut_patches(image[:, :, :255])) == 0


def test_too_few_patches_give_no_distance() -> None:
    distance = PatchFid(["input"], CPU, extractor=_Statistics())
    distance.update({"input": torch.rand(1, 3, 256, 300)}, torch.rand(1, 3, 256, 300))
    distance.update({"input": torch.rand(1, 3, 100, 300)}, torch.rand(1, 3, 100, 300))
    assert distance.patches == 1
    assert distance.compute() == {}


@pytest.mark.slow
def test_patch_fid_runs_with_inception_from_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh weights: the path runs, equal sets have distance 0 and unequal ones more."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="needs torch-fidelity")
    file = tmp_path / "inception.pth"
    fresh = inception_state(module.FeatureExtractorInceptionV3, monkeypatch)
    torch.save(fresh, file)
    distance = PatchFid(["same", "other"], CPU, file, backbone_of(file))
    target = torch.rand(1, 3, 256, 512)
    distance.update({"same": target, "other": (target * 0.3).clamp(0, 1)}, target)
    found = distance.compute()
    assert found["other"] > 1000 * abs(found["same"])  # both are small: so are the features of fresh weights


def inception_state(network: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The constructor loads a file always: give it its own fresh weights."""
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        return network("inception-v3-compat", ["2048"]).state_dict()


def test_patch_fid_without_torch_fidelity_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "inception.pth"
    file.write_bytes(b"any")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(BackboneMissing, match="needs torch-fidelity"):
        PatchFid(["a"], CPU, file, backbone_of(file))


def test_published_files_are_the_ones_whose_hash_is_in_their_name() -> None:
    for backbone in (perceptual.ALEXNET, perceptual.INCEPTION):
        assert backbone.sha256 in backbone.file_name


# ---------------------------------------------------------------------------------------------------------- figure 8


def test_the_curve_draws_every_point_where_its_axes_say(tmp_path: Path) -> None:
    figures = {4.0: {"psnr_y": 30.99, "lpips": 0.0635}, 50.0: {"psnr_y": 30.48, "lpips": 0.0540}}
    figures[10.0] = {"psnr_y": 30.92, "lpips": 0.0617}
    path = tmp_path / "curve.svg"
    write_curve(path, figures, "psnr_y", "lpips", "a < b")
    root = ElementTree.parse(path).getroot()
    space = {"s": "http://www.w3.org/2000/svg"}
    assert root.findtext("s:title", namespaces=space) == "a < b"
    for line, name, ticks_left in zip(
        root.findall("s:polyline", space), ("psnr_y", "lpips"), (True, False), strict=True
    ):
        points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        texts = [text for text in root.findall("s:text", space) if text.get("fill") == line.get("stroke")]
        ticks = [text for text in texts if text.get("text-anchor") == ("end" if ticks_left else "start")]
        at = {float(str(text.text)): float(text.attrib["y"]) - 4 for text in ticks}
        low, high = min(at), max(at)
        for (x, y), step in zip(points, (4, 10, 50), strict=True):
            value = low + (y - at[low]) / (at[high] - at[low]) * (high - low)
            assert value == pytest.approx(figures[step][name], abs=0.005 * (high - low))
            assert x == pytest.approx(80 + step * (points[-1][0] - 80) / 50, abs=0.1)


@pytest.mark.parametrize("values", [(30.0, 30.0), (0.0, 1e-5), (-3.0, 1000.0), (0.05, 0.0501)])
def test_any_values_can_be_drawn(values: tuple[float, float], tmp_path: Path) -> None:
    write_curve(tmp_path / "c.svg", {1: {"a": values[0]}, 2: {"a": values[1]}}, "a", "a")
    with pytest.raises(ValueError, match="at least two"):
        write_curve(tmp_path / "d.svg", {1: {"a": values[0]}}, "a", "a")
    assert [path.name for path in tmp_path.iterdir()] == ["c.svg"]


# -------------------------------------------------------------------------------------------------------------- NIQE


def halved_by_hand(y: np.ndarray) -> np.ndarray:
    """Bicubic (a = -0.5) stretched by two, over a mirrored border, as a matrix for each axis."""

    def matrix(size: int) -> np.ndarray:
        rows = np.zeros((size // 2, size))
        for i in range(size // 2):
            for j in range(2 * i - 6, 2 * i + 9):
                d = abs(j - (2 * i + 0.5)) / 2
                weight = 1.5 * d**3 - 2.5 * d**2 + 1 if d <= 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0
                mirrored = -1 - j if j < 0 else 2 * size - 1 - j if j >= size else j
                rows[i, mirrored] += weight / 2
        return rows

    return matrix(y.shape[0]) @ y @ matrix(y.shape[1]).T


def niqe_features_by_hand(y: np.ndarray, size: int) -> np.ndarray:
    mu = scipy.ndimage.gaussian_filter(y, 7 / 6, radius=3, mode="nearest")
    sigma = np.sqrt(np.abs(scipy.ndimage.gaussian_filter(y * y, 7 / 6, radius=3, mode="nearest") - mu * mu))
    coefficients = (y - mu) / (sigma + 1)
    found = []
    for top in range(0, y.shape[0], size):
        for left in range(0, y.shape[1], size):
            block = coefficients[top : top + size, left : left + size]
            alpha, low, high = fit_by_hand(block)
            features = [alpha, (low + high) / 2]
            for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
                alpha, low, high = fit_by_hand(block * np.roll(block, shift, axis=(0, 1)))
                gamma = scipy.special.gamma
                features += [alpha, (high - low) * gamma(2 / alpha) / gamma(1 / alpha), low, high]
            found.append(features)
    return np.array(found)


def fit_by_hand(x: np.ndarray) -> tuple[float, float, float]:
    low, high = np.sqrt(np.mean(x[x < 0] ** 2)), np.sqrt(np.mean(x[x > 0] ** 2))
    ratio, gamma = low / high, scipy.special.gamma
    wanted = np.mean(np.abs(x)) ** 2 / np.mean(x**2) * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    shapes = 0.2 + 0.001 * np.arange(9801)
    alpha = shapes[np.argmin(np.abs(gamma(2 / shapes) ** 2 / gamma(1 / shapes) / gamma(3 / shapes) - wanted))]
    scale = np.sqrt(gamma(1 / alpha) / gamma(3 / alpha))
    return float(alpha), float(low * scale), float(high * scale)


def niqe_model(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A file as NIQE's authors' model is distributed, of other content."""
    rng = np.random.default_rng()
    mean, root = rng.uniform(0.2, 2, 36), rng.normal(0, 0.3, (36, 50))
    covariance = root @ root.T / 50 + 0.01 * np.eye(36)
    file = folder / "niqe.npz"
    np.savez(file, mu_pris_param=mean[None], cov_pris_param=covariance, gaussian_window=np.ones((7, 7)))
    return file, mean, covariance


def test_niqe_equals_an_independent_implementation(tmp_path: Path) -> None:
    file, mean, covariance = niqe_model(tmp_path)
    image = np.rint(photo(200, 300)[0] * 255)
    y = np.rint(y_by_hand(image / 255))[:192, :288]
    features = np.concatenate([niqe_features_by_hand(y, 96), niqe_features_by_hand(halved_by_hand(y), 48)], axis=1)
    difference = mean - features.mean(axis=0)
    pooled = np.linalg.pinv((covariance + np.cov(features, rowvar=False)) / 2)
    expected = np.sqrt(difference @ pooled @ difference)
    # A fitted alpha comes from a table in steps of 0.001 (of 0.2 to 10): rounding may choose its neighbour.
    assert Niqe(file, backbone_of(file))(tensor(image / 255)) == pytest.approx(expected, rel=2e-3)


def test_niqe_refuses_small_and_flat_pictures_and_other_files(tmp_path: Path) -> None:
    file, _, _ = niqe_model(tmp_path)
    niqe = Niqe(file, backbone_of(file))
    with pytest.raises(UserError, match="two blocks of 96x96 pixels, got 191x100"):
        niqe(torch.rand(1, 3, 100, 191))
    with pytest.raises(UserError, match="this picture is flat"):
        niqe(torch.full((1, 3, 96, 192), 0.5))
    other = tmp_path / "other.npz"
    np.savez(other, something=np.zeros(3))
    with pytest.raises(UserError, match="does not hold NIQE's model"):
        Niqe(other, backbone_of(other))
    with pytest.raises(UserError, match="is another file"):
        Niqe(file)


def test_removing_texture_ends_at_the_photo() -> None:
    picture = np.rint(photo(40, 50)[0] * 255).astype(np.uint8)
    found = remove_texture(picture, (0.0, 0.5, 1.0))
    assert np.array_equal(found[1.0], picture)
    change = [float(np.abs(found[alpha].astype(float) - picture).mean()) for alpha in (0.0, 0.5)]
    assert 0.4 * change[0] < change[1] < 0.6 * change[0]


def test_the_texture_command_writes_curve_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _, _ = niqe_model(tmp_path)
    monkeypatch.setattr(niqe_module.Niqe.__init__, "__defaults__", (None, backbone_of(file)))
    picture = tmp_path / "photo.png"
    Image.fromarray(np.rint(photo(100, 200)[0] * 255).astype(np.uint8)).save(picture)
    arguments = ["texture", str(picture), "-o", str(tmp_path / "t.svg"), "--report", str(tmp_path / "t.html")]
    assert metrics_main([*arguments, "--niqe", str(file)]) == 0
    assert "| 1.0 |" in capsys.readouterr().out
    assert "NIQE" in (tmp_path / "t.svg").read_text(encoding="utf-8")
    assert "photo.png" in (tmp_path / "t.html").read_text(encoding="utf-8")
    assert metrics_main([*arguments[:1], str(tmp_path / "none.png"), *arguments[2:], "--niqe", str(file)]) == 1
    assert "none.png: no such file" in capsys.readouterr().err
