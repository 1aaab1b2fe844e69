"""The README's commands and code do what it says."""

import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import bench
import plot
import pytest
import torch
from conftest import ROOT
from PIL import Image

README = (ROOT / "README.md").read_text()
HAS_LIBRARIES = plot.find_spec("matplotlib") and plot.find_spec("sklearn")
needs_libraries = pytest.mark.skipif(
    not HAS_LIBRARIES, reason="pip install matplotlib scikit-learn"
)
JOINED = README.replace("\\\n    ", "")  # a command's continued lines
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [
    part.strip()
    for line in re.findall(r"^    ((?:python|pip|torchrun|git) .*)$", JOINED, flags=re.MULTILINE)
    for part in line.split("&&")
]


def test_it_is_short():
    assert len(README.splitlines()) <= 180


def test_commands_are_found():
    assert len(COMMANDS) > 10
    assert {"python simsiam.py", "python tests/toy.py data/toy"} <= set(COMMANDS)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_the_flags_of_each_command(command):
    words = shlex.split(command, comments=True)
    if "matplotlib" in words:  # as plot.py says
        assert command in (ROOT / "tests" / "plot.py").read_text()
        return
    if words[0] in ("pip", "git"):
        assert (ROOT / words[-1]).exists()
        return
    words = [word for word in words[1:] if not word.startswith("--nproc_per_node")]
    if words == ["-m", "pytest"] or words[0] == "tests/toy.py":  # toy.py: below
        return
    if words[0] == "tests/plot.py":  # the file it wants is that of the command before
        assert words[2] in README.split(shlex.join(words))[0]
        return
    if words[0] == "tests/bench.py":
        assert bench.parse_args(words[1:]).batch_size == 256
        return
    script = importlib.import_module(words[0].removesuffix(".py"))
    args = script.parse_args(words[1:])
    assert args.size is None or args.size >= 8


def test_the_toy_set_as_the_readme_makes_it(tmp_path, capsys):
    """Drawn once, trained on for an epoch of a subset, measured and drawn by the README's flags."""
    data = tmp_path / "toy"
    make = [sys.executable, str(ROOT / "tests" / "toy.py"), str(data)]
    assert subprocess.run(make, capture_output=True, timeout=100).returncode == 0
    assert len(list(data.rglob("*.png"))) == 1500
    again = subprocess.run(make, capture_output=True, text=True, timeout=100)
    assert (again.returncode, len(again.stderr.splitlines())) == (2, 1)
    train = next(line for line in COMMANDS if "simclr.py --data data/toy" in line)
    flags = shlex.split(train)[2:] + ["--data", str(data), "--out", str(tmp_path / "simclr")]
    flags += ["--epochs", "1", "--subset", "64", "--device", "cpu"]
    importlib.import_module("simclr").main(flags)
    probe = next(command for command in COMMANDS if "toy/checkpoint.pt --features" in command)
    features = str(tmp_path / "features.pt")
    flags = shlex.split(probe)[3:] + ["--features", features, "--subset", "100", "--device", "cpu"]
    checkpoint = str(tmp_path / "simclr" / "checkpoint.pt")
    importlib.import_module("linear_eval").main([checkpoint, *flags])
    assert "linear top-1: " in capsys.readouterr().out
    if HAS_LIBRARIES:
        map_words = next(shlex.split(command) for command in COMMANDS if "toy/map.png" in command)
        assert map_words[:3] == ["python", "tests/plot.py", "map"]
        plot.main(["map", features, str(tmp_path / "map.png")])
        assert (tmp_path / "map.png").exists()


def test_the_backbone_elsewhere(runs, monkeypatch, tmp_path):
    """The two functions of a script, and what they need, give the features of linear_eval."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "simsiam").symlink_to(runs / "simsiam")
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module("simsiam")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    names = {"torch": torch, "nn": torch.nn, "models": script.models, "images": images}
    for function in (script.build_backbone, script.normalize):
        exec(inspect.getsource(function), names)
    exec(next(code for code in BLOCKS if "load_state_dict" in code), names)
    expected = script.compute_features(names["backbone"], images, "cpu")
    assert torch.equal(names["h"], expected)
    assert expected.shape == (2, 512)


@pytest.fixture
def photos(folder, monkeypatch, tmp_path):
    """photos.pt by the README's flags, of 49 photos of which two are the same."""
    shutil.copytree(folder / "train", tmp_path / "PHOTOS" / "beach")
    shutil.copy(tmp_path / "PHOTOS" / "beach" / "red" / "4.png", tmp_path / "PHOTOS" / "copy.png")
    monkeypatch.chdir(tmp_path)
    probe(next(command for command in COMMANDS if "--features photos.pt" in command))


def probe(command):
    flags = shlex.split(command)[3:] + ["--size", "8", "--device", "cpu"]
    importlib.import_module("linear_eval").main(flags)


def draw(part):
    """Runs the README's command for plot.py that has this part."""
    words = shlex.split(next(line for line in COMMANDS if part in line), comments=True)
    assert words[:2] == ["python", "tests/plot.py"]
    plot.main(words[2:])


@needs_libraries
@pytest.mark.usefixtures("photos")
def test_the_map_of_photos():
    draw("map photos.pt")
    with Image.open("map.jpg") as picture:
        assert picture.width > 1000


@needs_libraries
@pytest.mark.usefixtures("photos")
def test_the_pairs_of_photos():
    """An untrained network takes most photos for copies, so this is about a cosine of 1."""
    command = next(line for line in COMMANDS if "pairs photos.pt" in line)
    plot.main([*shlex.split(command)[2:], "--above", "1"])
    with Image.open("pairs.jpg") as picture:
        assert picture.width > 300
    [line] = Path("pairs.txt").read_text().splitlines()
    assert line.split("\t") == ["1.0000", "PHOTOS/copy.png", "PHOTOS/beach/red/4.png"]


@needs_libraries
@pytest.mark.usefixtures("photos")
def test_a_search_by_a_new_photo(tmp_path, capsys):
    """A copy of a photo finds the photo, and its other copy; the other command is by name."""
    (tmp_path / "NEW").mkdir()
    shutil.copy(tmp_path / "PHOTOS" / "copy.png", tmp_path / "NEW" / "new.png")
    probe(next(command for command in COMMANDS if "--features new.pt" in command))
    capsys.readouterr()
    draw("--queries new.pt")
    query, *found = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert query == ["NEW/new.png"]
    assert [words[0] for words in found[:2]] == ["1.000", "1.000"]
    assert {words[1] for words in found[:2]} == {"PHOTOS/copy.png", "PHOTOS/beach/red/4.png"}
    draw("--query beach")
    queries = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PHOTOS")]
    assert len(queries) == 25
    assert all("beach" in query for query in queries)
    for picture in ("found.jpg", "beach.jpg"):
        with Image.open(picture) as opened:
            assert opened.width > 1000


def test_the_views(folder, monkeypatch, tmp_path):
    """The first row is the images."""
    monkeypatch.chdir(tmp_path)
    block = next(code for code in BLOCKS if "augment" in code)
    assert len(block.splitlines()) <= 6
    names = {}
    exec(block.replace("data/toy", str(folder)), names)
    with Image.open("views.png") as picture:
        assert picture.size == (6 * 98 + 2, 5 * 98 + 2)
        shown = picture.getpixel((2 + 3 * 5 + 1, 2 + 3 * 9 + 1))
    assert shown == tuple(names["images"][0, :, 9, 5].tolist())


def test_the_forward_that_the_readme_shows_is_the_scripts():
    shown = next(code for code in BLOCKS if "def forward" in code)
    indented = "".join(f"    {line}\n" for line in shown.splitlines())
    assert indented in (ROOT / "simsiam.py").read_text()


def test_the_diff_that_the_readme_shows_is_the_scripts():
    shown = re.search(r"```diff\n(.*?)```", README, re.S)[1].splitlines()
    for sign, name in (("-", "simsiam"), ("+", "byol")):
        source = (ROOT / f"{name}.py").read_text().splitlines()
        assert [line for line in shown if line[0] == sign and line[1:] not in source] == []
