"""Each script from start to finish: what it prints, what it leaves behind, how it goes on."""

import csv
import importlib
import os
import re
import runpy
import shutil
import sys

import pytest
import torch
from conftest import METHODS, ROOT, Small
from PIL import Image
from torchvision import models


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_leaves_behind(method, runs):
    out = runs / method
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "log.csv"]
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["epoch", "loss", "spread", "kNN", "lr", "images/s"]
    assert list(rows[0]) == columns
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(float(row["kNN"]) >= 0 and float(row["images/s"]) > 0 for row in rows)
    assert 0 < float(rows[1]["lr"]) < float(rows[0]["lr"])


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_opens_in_plain_torchvision(method, runs):
    saved = torch.load(runs / method / "checkpoint.pt", weights_only=True)
    assert {"backbone", "model", "optimizer", "epoch", "args"} <= set(saved)
    assert saved["epoch"] == 2
    assert saved["args"]["size"] == 8
    expected = {name for name in models.resnet18().state_dict() if not name.startswith("fc.")}
    assert set(saved["backbone"]) == expected
    assert all(torch.isfinite(t).all() for t in saved["model"].values())
    shared = {f"backbone.{name}": t for name, t in saved["backbone"].items()}
    assert all(torch.equal(saved["model"][name], t) for name, t in shared.items())


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_weights(method, runs):
    script = importlib.import_module(method)
    saved = torch.load(runs / method / "checkpoint.pt", weights_only=True)["backbone"]
    torch.manual_seed(0)
    start = script.build_backbone("resnet18", 8).state_dict()
    assert (saved["conv1.weight"] - start["conv1.weight"]).abs().max() > 1e-4
    assert saved["layer1.0.bn2.weight"].abs().max() > 0  # which starts at zero


def test_byol_target_follows_the_online_network(runs):
    model = torch.load(runs / "byol" / "checkpoint.pt", weights_only=True)["model"]
    torch.manual_seed(0)
    start = importlib.import_module("byol").build_backbone("resnet18", 8).state_dict()
    target, online = model["target.0.conv1.weight"], model["backbone.conv1.weight"]
    assert not torch.equal(target, online)
    assert not torch.equal(target, start["conv1.weight"])


def test_an_earlier_run_is_not_written_over(script, runs, arguments):
    out = runs / script.__name__
    before = (out / "checkpoint.pt").stat().st_mtime_ns
    with pytest.raises(SystemExit, match=r"--resume.*--out"):
        script.main([*arguments, "--out", str(out)])
    assert (out / "checkpoint.pt").stat().st_mtime_ns == before


class Instant(torch.nn.Module):
    """Stands in for a method whose step costs nothing."""

    def __init__(self, backbone, **_):
        super().__init__()
        self.backbone = backbone
        self.target = torch.nn.Module()

    def forward(self, x1, x2):
        return self.backbone[2].weight.sum(), torch.eye(4)


def test_knn_runs_ten_times_at_even_distances(script, folder, tmp_path, monkeypatch):
    """Twenty-five epochs without the training: which of them measure kNN?"""
    monkeypatch.setattr(script, "knn_accuracy", lambda *_: 50.0)
    monkeypatch.setattr(script, "build_backbone", Small)
    monkeypatch.setattr(script, METHODS[script.__name__], Instant)
    monkeypatch.setattr(script, "augment", lambda images, *_, **__: images)
    monkeypatch.setattr(script, "normalize", lambda x: x)
    flags = f"--data {folder} --size 8 --epochs 25 --batch-size 48 --device cpu".split()
    script.main([*flags, "--out", str(tmp_path / "run")])
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        measured = [int(row["epoch"]) for row in csv.DictReader(file) if row["kNN"]]
    assert measured == [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]


class Projections(torch.nn.Module):
    """Stands in for a method: the projections are given, so that the meter can be read off."""

    def __init__(self, backbone, **_):
        super().__init__()
        self.backbone = backbone
        self.target = torch.nn.Module()

    def forward(self, x1, x2):
        return self.backbone(x1).square().mean(), self.z


@pytest.mark.parametrize("kind", ["constant", "isotropic", "skewed"])
def test_the_collapse_meter(script, kind, folder, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    z = torch.randn(2048, 64) + (2 if kind == "skewed" else 0)
    z = torch.ones(2048, 64) if kind == "constant" else z
    monkeypatch.setattr(Projections, "z", z, raising=False)
    monkeypatch.setattr(script, METHODS[script.__name__], Projections)
    monkeypatch.setattr(script, "build_backbone", Small)
    flags = f"--data {folder} --size 8 --epochs 1 --batch-size 24 --device cpu".split()
    script.main([*flags, "--out", str(tmp_path / "run")])
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        spread = float(next(csv.DictReader(file))["spread"])
    unit = z / z.norm(dim=1, keepdim=True)
    expected = sum(unit[:, d].std().item() for d in range(64)) / 64 * 8
    assert spread == pytest.approx(expected, abs=1e-5)
    low, high = {"constant": (0, 1e-6), "isotropic": (0.97, 1.03), "skewed": (0.2, 0.6)}[kind]
    assert low <= spread <= high
    line = next(line for line in capsys.readouterr().out.splitlines() if "epoch 1 " in line)
    assert line.rstrip().endswith("collapsed?") == (kind == "constant")


def test_unlabeled_images_train_and_say_so(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "build_backbone", Small)
    for i in range(8):
        Image.new("RGB", (12, 12), (30 * i, 9 * i, 255 - 20 * i)).save(tmp_path / f"{i}.png")
    flags = f"--data {tmp_path} --size 8 --epochs 1 --batch-size 4 --device cpu".split()
    script.main([*flags, "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert printed.startswith("8 images of 8 px, 0 test images for kNN, ")
    assert "kNN " not in printed
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_the_seed_decides(script, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "build_backbone", Small)
    flags = f"--data {folder} --size 8 --epochs 1 --batch-size 24 --device cpu".split()
    weights = []
    for i, seed in enumerate([0, 0, 1]):
        out = tmp_path / str(i)
        script.main([*flags, "--seed", str(seed), "--out", str(out)])
        weights.append(torch.load(out / "checkpoint.pt")["backbone"]["2.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", [*METHODS, "linear_eval"])
def test_errors_are_one_line_and_exit_code_not_0(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--data", "nowhere", "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert end.value.code != 0
    sentence = str(end.value)
    assert len(sentence.splitlines()) == 1
    assert "nowhere" in sentence
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["a folder of classes", "one with a test split"])
def test_the_weights_do_not_depend_on_the_test_split(script, kind, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(script, "build_backbone", Small)
    root = tmp_path / "images"
    shutil.copytree(folder / "train", root / "train")
    if kind == "one with a test split":
        shutil.copytree(folder / "test", root / "test")
    flags = f"--data {root} --size 8 --epochs 1 --batch-size 24 --lr 0 --device cpu".split()
    script.main([*flags, "--out", str(tmp_path / "run")])
    saved = torch.load(tmp_path / "run" / "checkpoint.pt")["backbone"]
    torch.manual_seed(0)
    assert torch.equal(saved["2.weight"], Small()[2].weight)


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_goes_through_linear_eval(method, runs, capsys):
    linear_eval = importlib.import_module("linear_eval")
    linear_eval.main([str(runs / method / "checkpoint.pt"), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "resnet18 from backbone, 3x3 stem without max-pool",
        "train: 48 images of 8 px, 512 features",
        "test: 24 images of 8 px, 512 features",
    ]
    accuracy = re.fullmatch(r"linear top-1: (.*)% \(weight decay .*\)", lines[-1])
    assert float(accuracy[1]) > 80


def test_no_stop_grad_reaches_the_method(arguments, tmp_path, monkeypatch):
    simsiam = importlib.import_module("simsiam")
    monkeypatch.setattr(simsiam, "build_backbone", Small)
    flags = [*arguments, "--lr", "1"]
    losses = []
    for flag in ("--stop-grad", "--no-stop-grad"):
        simsiam.main([*flags, flag, "--out", str(tmp_path / flag)])
        losses.append((tmp_path / flag / "log.csv").read_text().splitlines()[2].split(",")[1])
    assert float(losses[1]) < float(losses[0])
