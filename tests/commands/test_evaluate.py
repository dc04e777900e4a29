import csv
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtpm_fast.commands.evaluate import PREDICTOR, main
from dtpm_fast.diffusion import restore
from dtpm_fast.metrics.paper_tables import PAPER_TABLES, comparison
from dtpm_fast.metrics.protocols import PAPER_PROTOCOL, PROTOCOLS
from dtpm_fast.runtime.noise import noise_fields
from dtpm_fast.tasks import TASKS
from dtpm_fast.weights_file import load_model, read_weights

NAMES = ("a", "b", "c")
OFFLINE = ("--device", "cpu", "--lpips", "off")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, random_weights: Callable[..., Path]) -> str:
    return str(random_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


def write_pairs(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """`folder`/test/{input,target}, pairs named a, b, c of the given (width, height)."""
    rng = np.random.default_rng(5)
    for name, (width, height) in zip(NAMES, sizes, strict=False):
        target = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        degraded = np.clip(target + rng.normal(0, 25, target.shape), 0, 255).astype(np.uint8)
        for kind, picture in (("input", degraded), ("target", target)):
            (folder / "test" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / "test" / kind / f"{name}.png")
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "rain", [(32, 24), (37, 19), (16, 40)])


def test_figures_are_those_of_the_restored_pictures(
    pairs: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The JSON's figures equal those computed here from files, the plain reference and one loop."""
    out = tmp_path / "out"
    code = main(
        [
            "--task",
            "derain",
            "--data",
            str(pairs),
            "--weights",
            weights,
            "--steps",
            "4",
            "2",
            *OFFLINE,
            "--json",
            str(out / "r.json"),
            "--csv",
            str(out / "r.csv"),
            "--curve",
            str(out / "c.svg"),
            "--precision",
            "float32",
            "--tile",
            "128",
            "--note",
            "random weights",
        ]
    )
    assert code == 0
    found = json.loads((out / "r.json").read_text())
    model, config = load_model(read_weights(weights), stage=2), read_weights(weights).config
    sums: dict[str, list[float]] = {"input": [], PREDICTOR: [], "4 steps": [], "2 steps": []}
    for name in NAMES:
        degraded, target = (
            torch.from_numpy(np.array(Image.open(pairs / "test" / kind / f"{name}.png"))).permute(2, 0, 1)[None] / 255
            for kind in ("input", "target")
        )
        height, width = degraded.shape[-2:]
        pad = [(0, -side % model.multiple) for side in (height, width)]
        padded, noise = (
            torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), *pad], mode="reflect"))
            for x in (degraded * 2 - 1, noise_fields(0, height, width))
        )
        images = {"input": degraded}
        for steps in (4, 2):
            with torch.no_grad():
                result, y_eps = restore(model, padded, noise, steps, config.diffusion)
            images[f"{steps} steps"] = result[..., :height, :width] / 2 + 0.5
            images[PREDICTOR] = y_eps[..., :height, :width] / 2 + 0.5
        for method, image in images.items():
            error = (image.mul(255).round() - target.mul(255)).double()
            sums[method].append(20 * np.log10(255 / np.sqrt(error.square().mean().item())))
    for method, values in sums.items():
        assert found["mean"][method]["psnr_rgb"] == pytest.approx(np.mean(values), abs=0.02)
    assert found["images"] == 3
    assert found["tile"] == 128
    assert found["layout"] == "input+target"
    assert found["weights"]["sha256"] == hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    assert found["weights"]["trained"] == {"data": "none, random"}
    assert found["protocol"]["name"] == "native"
    assert found["versions"]["torch"] == torch.__version__

    with (out / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["method"]) for row in rows] == [(f"{n}.png", m) for n in NAMES for m in found["mean"]]
    for method, means in found["mean"].items():
        for figure, mean in means.items():
            own = [float(row[figure]) for row in rows if row["method"] == method]
            assert mean == pytest.approx(np.mean(own), abs=1e-5)

    assert "SSIM Y" in (out / "c.svg").read_text(encoding="utf-8")  # LPIPS is off
    printed = capsys.readouterr().out
    assert f"| **ours, 4 steps** | **{found['mean']['4 steps']['psnr_y']:.2f}** |" in printed
    assert "| DTPM, 4 steps (paper) | 30.99 | 0.934 | 0.0635 |" in printed
    assert "Not comparable with the paper's rows, on Outdoor-Rain's 750 test pictures: ours are on 3" in printed
    assert "Note: random weights" in printed


def test_the_same_seed_gives_the_same_figures_and_another_one_others(pairs: Path, weights: str, tmp_path: Path) -> None:
    def means(seed: int) -> dict[str, dict[str, float]]:
        file = tmp_path / f"{seed}.json"
        arguments = ["--task", "derain", "--data", str(pairs), "--weights", weights, "--json", str(file)]
        assert main([*arguments, "--limit", "1", "--seed", str(seed), *OFFLINE]) == 0
        return json.loads(file.read_text())["mean"]

    first = means(3)
    assert means(3) == first
    other = means(4)
    assert other["4 steps"] != first["4 steps"]
    assert other[PREDICTOR] == first[PREDICTOR]


def test_limit_and_split_file_choose_pictures(pairs: Path, weights: str, tmp_path: Path) -> None:
    split = tmp_path / "split.csv"
    split.write_text("name,split\na.png,train\nb.png,test\nc.png,test\n")
    file = tmp_path / "r.json"
    arguments = ["--task", "derain", "--data", str(pairs), "--weights", weights, "--steps", "1", "--json", str(file)]
    assert main([*arguments, "--split-file", str(split), "--protocol", "weatherdiff", *OFFLINE]) == 0
    rows = json.loads(file.read_text())["per_image"]
    assert [(row["name"], row["width"], row["height"]) for row in rows] == [("b.png", 48, 32), ("c.png", 16, 48)]
    assert main([*arguments, "--split-file", str(split), "--limit", "1", *OFFLINE]) == 0
    rows = json.loads(file.read_text())["per_image"]
    assert [(row["name"], row["width"], row["height"]) for row in rows] == [("b.png", 37, 19)]


def test_missing_backbones_leave_their_metric_out_and_say_so(
    pairs: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for variable in ("DTPM_ALEXNET", "DTPM_INCEPTION"):
        monkeypatch.delenv(variable, raising=False)
    file, page = tmp_path / "r.json", tmp_path / "r.html"
    arguments = ["--task", "derain", "--data", str(pairs), "--weights", weights, "--limit", "1", "--device", "cpu"]
    assert main([*arguments, "--json", str(file), "--report", str(page), "--fid", "auto"]) == 0
    left_out = json.loads(file.read_text())["left_out"]
    assert len(left_out) == 1  # FID is for deblurring
    assert "alexnet-owt-7be5be79.pth" in left_out[0]
    assert left_out[0] in capsys.readouterr().err
    assert "alexnet-owt-7be5be79.pth" in page.read_text()
    assert "lpips" not in json.loads(file.read_text())["mean"]["input"]


def test_the_report_shows_pictures_spread_over_the_set(pairs: Path, weights: str, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    arguments = ["--task", "derain", "--data", str(pairs), "--weights", weights, "--steps", "1", *OFFLINE]
    assert main([*arguments, "--report", str(page), "--report-images", "2"]) == 0
    text = page.read_text()
    assert "a.png" in text
    assert "b.png" not in text
    assert "c.png" in text
    assert "2 of them below" in text
    assert PREDICTOR in text


HANGS = 900  # seconds; a run that takes half a minute, on a machine with nothing else to do
SHARE = """
import sys, torch
import dtpm_fast.metrics.perceptual as perceptual
from dtpm_fast.commands.evaluate import main

class Statistics(torch.nn.Module):
    num_features = 6
    def forward(self, patches):
        x = patches.float()
        return torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3))], dim=1)

perceptual._inception = lambda *_: Statistics()
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_share_a_set_and_give_the_figures_of_one(weights: str, tmp_path: Path) -> None:
    """As torchrun starts them, on the CPU; FID, with a small network in the backbone's place, over all patches."""
    pairs = write_pairs(tmp_path / "rain", [(520, 256), (260, 264), (256, 300)])
    common = ["--task", "derain", "--data", str(pairs), "--weights", weights, "--device", "cpu", "--lpips", "off"]
    common += ["--steps", "1", "--fid", "any", "--report-images", "2"]
    script = tmp_path / "share.py"
    script.write_text(SHARE)

    def start(name: str, **group: str) -> "subprocess.Popen[str]":
        paths = ["--json", str(tmp_path / f"{name}.json"), "--report", str(tmp_path / f"{name}.html")]
        return subprocess.Popen(
            [sys.executable, str(script), *common, *paths], env={**os.environ, "OMP_NUM_THREADS": "1", **group},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [start("one"), *(start("two", **group, RANK=rank, LOCAL_RANK=rank) for rank in "01")]
    try:
        printed = [process.communicate(timeout=HANGS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0, 0]
    assert printed[0].splitlines()[:-1] == printed[1].splitlines()[:-1] and printed[2] == ""
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["fid_patches"] == two["fid_patches"] == 4
    assert [row["name"] for row in one["per_image"]] == ["a.png", "b.png", "c.png"]
    assert one["per_image"] == two["per_image"]
    for method, figures in one["mean"].items():
        assert "fid" in figures
        assert two["mean"][method] == pytest.approx(figures, rel=1e-6)
    shown = [re.findall(r'<h2 id="case\d+">(\S+)', (tmp_path / f"{name}.html").read_text()) for name in ("one", "two")]
    assert shown[0] == shown[1] == ["a.png", "c.png"]


def test_bad_input_is_one_line_and_writes_nothing(
    pairs: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.json"

    def error(*arguments: str) -> str:
        assert main(["--task", "derain", "--weights", weights, *OFFLINE, "--json", str(file), *arguments]) == 1
        assert not file.exists()
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err.splitlines()[-1]

    assert error("--data", str(tmp_path / "none")) == f"error: {tmp_path / 'none'}: no such folder"
    assert error("--data", str(pairs), "--weights", "x.safetensors") == "error: x.safetensors: no such weights file"
    assert "trained for the task 'derain', not for 'deblur'" in error("--data", str(pairs), "--task", "deblur")
    assert "no.pth: cannot be read" in error("--data", str(pairs), "--lpips", "no.pth")
    Image.new("RGB", (5, 5)).save(pairs / "test" / "target" / "b.png")
    monkeypatch.setattr("dtpm_fast.metrics.evaluation.read_image", lambda path: pytest.fail("a picture was scored"))
    assert "b.png: 37x19 pixels, but its target" in error("--data", str(pairs))
    small = write_pairs(tmp_path / "small", [(32, 24), (9, 20)])
    assert "b.png: a picture of 9x20 pixels is smaller than SSIM's window" in error("--data", str(small))
    broken = pairs / "test" / "target" / "b.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert "b.png: not a readable picture" in error("--data", str(pairs))


def test_names_that_are_no_utf8_cost_no_figures(weights: str, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / os.fsdecode(b"rain\xff"), [(32, 24)])
    for kind in ("input", "target"):
        (data / "test" / kind / "a.png").rename(data / "test" / kind / os.fsdecode(b"a\xff.png"))
    command = [sys.executable, "-m", "dtpm_fast.commands.evaluate", "--task", "derain", "--data", str(data)]
    command += ["--weights", weights, *OFFLINE, "--steps", "1", "2"]
    for flag, file in (("--json", "r.json"), ("--csv", "r.csv"), ("--curve", "c.svg"), ("--report", "r.html")):
        command += [flag, str(tmp_path / file)]
    run = subprocess.run(command, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert b"rain\\udcff" in run.stdout
    assert "a\\udcff.png" in (tmp_path / "r.csv").read_text(encoding="utf-8")
    assert "rain\\udcff" in (tmp_path / "c.svg").read_text(encoding="utf-8")


def test_a_reader_that_has_gone_costs_no_file(pairs: Path, weights: str, tmp_path: Path) -> None:
    """As in `dtpm-evaluate ... | head -1`."""
    command = [sys.executable, "-m", "dtpm_fast.commands.evaluate", "--task", "derain", "--data", str(pairs)]
    command += ["--weights", weights, "--limit", "1", *OFFLINE, "--json", str(tmp_path / "r.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        complaints = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in complaints and "BrokenPipe" not in complaints
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--limit", "0"],
        ["--steps", "4", "4"],
        ["--report-images", "0"],
        ["--protocol", "psnry"],
        ["--json", "."],
        ["--json", f"{__file__}/figures.json"],
        ["--curve", "c.svg"],
        ["--json", "photo.png"],
        ["--json", "figures", "--csv", "./figures"],
        ["--split-file", "list.txt", "--csv", "list.txt"],
    ],
)
def test_bad_usage(arguments: list[str], pairs: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--task", "derain", "--data", str(pairs), *arguments])
    assert stopped.value.code == 2


def test_help_shows_an_example_without_importing_torch() -> None:
    code = (
        "import sys\nfrom dtpm_fast.commands.evaluate import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    print(stop.code, 'torchmetrics' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "dtpm-evaluate --task derain --data rain100L" in run.stdout
    assert run.stdout.splitlines()[-1] == "0 False"


# ------------------------------------------------------------------------------------------------------- the tables


def test_every_task_has_a_table_a_protocol_and_complete_rows() -> None:
    assert set(PAPER_TABLES) == set(TASKS) == set(PAPER_PROTOCOL)
    assert set(PAPER_PROTOCOL.values()) <= set(PROTOCOLS)
    for table in PAPER_TABLES.values():
        for method, figures in table.rows:
            assert len(figures.split()) == len(table.sets) * len(table.columns), method


def figures_of(value: float) -> dict[str, float]:
    return {"psnr_y": value, "ssim_y": 0.9, "psnr_rgb": value - 1, "ssim_rgb": 0.8, "mae": 0.03, "lpips": 0.1, "fid": 9}


def test_snow_goes_into_the_columns_of_its_set() -> None:
    means = {"4 steps": figures_of(30)}
    lines = comparison("desnow", PROTOCOLS["weatherdiff"], means, 16801, "Snow100K-testset/Snow100K-L").splitlines()
    assert "| method | Snow100K-S PSNR | Snow100K-S SSIM | Snow100K-S LPIPS | Snow100K-L PSNR |" in lines[2]
    assert "| **ours, 4 steps** | – | – | – | **30.00** | **0.9000** | **0.1000** |" in lines
    assert any("As many pictures as Snow100K-L's test set has" in line for line in lines)
    lines = comparison("desnow", PROTOCOLS["weatherdiff"], means, 5, "mine").splitlines()
    assert "| **ours, 4 steps** | – | – | – | – | – | – | **30.00** | **0.9000** | **0.1000** |" in lines
    assert any("none of the paper's" in line for line in lines)
    counts = {line.count("|") for line in lines if line.startswith("|")}
    assert counts == {11}


def test_deblurring_tables_take_rgb_figures_and_say_where_the_paper_disagrees_with_itself() -> None:
    text = comparison("deblur", PROTOCOLS["gopro"], {"4 steps": figures_of(30)}, 1111, "GoPro")
    assert "| **ours, 4 steps** | **29.00** | **0.8000** | **0.1000** | **9.00** |" in text
    assert "| DTPM, 50 steps (paper) | 31.11 | 0.919 | 0.061 | 6.61 |" in text
    assert "text disagrees" in text
    text = comparison("defocus", PROTOCOLS["native"], {"4 steps": figures_of(30)}, 3, "DPDD", "synthetic blur")
    assert "The paper's rows follow the protocol dpdd, not native" in text
    assert "| **ours, 4 steps** | **30.00** | **0.9000** | **0.0300** | **0.1000** |" in text
    assert text.endswith("- Note: synthetic blur")
