"""Each script from start to finish: what it prints, what it leaves behind, how it goes on."""

import csv
import importlib
import io
import math
import os
import re
import runpy
import shutil
import sys

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import CLASSES, METHODS, ROOT, Small, shrink, vote
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import models


def log_of(out):
    """The rows of a run's log, as dictionaries."""
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_leaves_behind(method, runs):
    out = runs / method
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "log.csv"]
    rows = log_of(out)
    assert list(rows[0]) == ["epoch", "loss", "spread", "lr", "seconds", "kNN"]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(float(row["kNN"]) >= 0 and float(row["spread"]) > 0 for row in rows)
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert 0 < float(rows[1]["lr"]) < float(rows[0]["lr"])


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_opens_in_plain_torchvision(method, runs):
    saved = torch.load(runs / method / "checkpoint.pt", weights_only=True)
    assert {"backbone", "network", "optimizer", "epoch", "log", "args"} == set(saved)
    assert saved["epoch"] == 2
    assert saved["args"]["size"] == 8
    expected = {name for name in models.resnet18().state_dict() if not name.startswith("fc.")}
    assert set(saved["backbone"]) == expected
    assert all(torch.isfinite(t).all() for t in saved["network"].values())
    shared = {f"backbone.{name}": t for name, t in saved["backbone"].items()}
    assert all(torch.equal(saved["network"][name], t) for name, t in shared.items())


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_weights(method, runs):
    script = importlib.import_module(method)
    saved = torch.load(runs / method / "checkpoint.pt", weights_only=True)["backbone"]
    torch.manual_seed(0)
    start = script.build_backbone("resnet18", 8).state_dict()
    assert (saved["conv1.weight"] - start["conv1.weight"]).abs().max() > 1e-4
    assert saved["layer1.0.bn2.weight"].abs().max() > 0  # which starts at zero


def test_an_earlier_run_is_not_written_over(script, runs, arguments):
    out = runs / script.__name__
    before = (out / "checkpoint.pt").stat().st_mtime_ns
    with pytest.raises(SystemExit, match=r"--resume.*--out"):
        script.main([*arguments, "--out", str(out)])
    assert (out / "checkpoint.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (4, [1, 2, 3, 4]),
        (10, [*range(1, 11)]),
        (25, [3, 6, 9, 12, 15, 18, 21, 24, 25]),
        (40, [*range(4, 41, 4)]),
    ],
)
def test_when_knn_is_measured_and_the_run_saved(
    script, epochs, expected, folder, tmp_path, monkeypatch
):
    """Every ceil(epochs / 10) epochs, and after the last; at the start the flags alone."""
    saved = []
    monkeypatch.setattr(script, "knn_accuracy", lambda *_: 50.0)
    monkeypatch.setattr(script.time, "time", lambda: 0)
    shrink(monkeypatch, script)
    monkeypatch.setattr(script, "train_step", lambda *_: (torch.zeros(()), torch.eye(4)))
    save = script.save
    monkeypatch.setattr(script, "save", lambda *args: saved.append(args[1]) or save(*args))
    flags = f"--data {folder} --size 8 --epochs {epochs} --batch-size 48 --device cpu".split()
    script.main([*flags, "--out", str(tmp_path / "run")])
    rows = log_of(tmp_path / "run")
    assert [int(row["epoch"]) for row in rows] == [*range(1, epochs + 1)]
    assert [int(row["epoch"]) for row in rows if row["kNN"]] == expected
    assert saved == [0, *sorted(2 * expected)]  # before and after it is measured


def test_the_learning_rate_falls_by_half_a_cosine(script, folder, tmp_path, monkeypatch):
    """From --lr times the batch over 256 to 0; the decay is --weight-decay all the time."""
    groups = []

    def spy(network, optimizer, x, bf16):
        groups.append(dict(optimizer.param_groups[0]))
        return torch.zeros(()), torch.eye(4)

    shrink(monkeypatch, script)
    monkeypatch.setattr(script, "train_step", spy)
    flags = f"--data {folder} --size 8 --epochs 3 --batch-size 16 --device cpu".split()
    flags += ["--lr", "0.5", "--weight-decay", "0.01", "--out", str(tmp_path / "run")]
    script.main(flags)
    cosine = [(1 + math.cos(math.pi * (step + 0.5) / 9)) / 2 for step in range(9)]
    assert [group["lr"] for group in groups] == pytest.approx([c / 32 for c in cosine])
    assert {group["weight_decay"] for group in groups} == {0.01}
    assert {group["momentum"] for group in groups} == {0.9}


def test_an_epoch_takes_every_image_once(script, folder, tmp_path, monkeypatch):
    """In other batches and other views each time; the log's loss is the mean over the steps."""
    seen, draws = [], []

    def spy(network, optimizer, x, bf16):
        seen.append(x)
        draws.append(torch.rand(()).item())
        return torch.tensor(float(len(seen))), torch.eye(4)

    shrink(monkeypatch, script)
    monkeypatch.setattr(script, "train_step", spy)
    flags = f"--data {folder} --size 8 --epochs 2 --batch-size 16 --device cpu".split()
    script.main([*flags, "--out", str(tmp_path / "run")])
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    for epoch in (first, second):
        assert len(epoch.flatten(1).unique(dim=0)) == 48
    batches = [{image.numpy().tobytes() for image in batch} for batch in seen]
    assert not [batch for batch in batches[:3] if batch in batches[3:]]
    assert len(set(draws)) == 6
    assert [float(row["loss"]) for row in log_of(tmp_path / "run")] == [2, 5]


@pytest.mark.parametrize("kind", ["collapsed", "spread"])
def test_the_line_of_an_epoch(script, kind, folder, tmp_path, monkeypatch, capsys):
    """Loss, spread, kNN where it was measured, and the seconds at the end."""
    p = torch.ones(4, 4) if kind == "collapsed" else torch.eye(4)
    now, step_seconds = [0.0], iter([12.34, 5.67] + 9 * [1])

    def step(*_):
        now[0] += next(step_seconds)
        return torch.zeros(()), p

    shrink(monkeypatch, script)
    monkeypatch.setattr(script, "train_step", step)
    monkeypatch.setattr(script.time, "time", lambda: now[0])
    flags = f"--data {folder} --size 8 --epochs 11 --batch-size 48 --device cpu".split()
    script.main([*flags, "--out", str(tmp_path / "run")])
    lines = capsys.readouterr().out.splitlines()
    rows = log_of(tmp_path / "run")
    spread = f"{float(rows[0]['spread']):.3f}"
    assert lines[1] == f"epoch 1  loss 0.0000  spread {spread}  kNN        12.3 s"
    assert lines[2] == f"epoch 2  loss 0.0000  spread {spread}  kNN {rows[1]['kNN']}  5.7 s"
    assert re.fullmatch(r"\d+\.\d\d", rows[1]["kNN"])
    assert [row["seconds"] for row in rows[:2]] == ["12.3", "5.7"]
    assert float(rows[0]["spread"]) == pytest.approx(script.spread(p))
    assert (float(rows[0]["spread"]) < 1e-3) == (kind == "collapsed")


class Terminal(io.StringIO):
    """A standard output that is a terminal, or says so."""

    def __init__(self, tty):
        super().__init__()
        self.isatty = lambda: tty


@pytest.mark.parametrize("tty", [True, False])
def test_progress_on_a_terminal_alone(script, tty, folder, tmp_path, monkeypatch):
    """While images are read, within an epoch and within a measurement; not a line of it stays."""
    shrink(monkeypatch, script)
    flags = f"--data {folder} --size 8 --epochs 2 --batch-size 16 --device cpu".split()
    monkeypatch.setattr(sys, "stdout", Terminal(tty))
    script.main([*flags, "--out", str(tmp_path / "run")])
    printed = sys.stdout.getvalue()
    if not tty:
        assert "\r" not in printed
        return
    for part in ("train images  47/48", "test images  0/24", "epoch 2  2/3", "kNN  0/1"):
        assert part.ljust(40) + "\r" in printed
    for line in printed.split("\n"):
        *progress, last = line.split("\r")
        assert all(len(part) == 40 for part in progress)  # none shows behind the next
        assert "/" not in last or last.startswith(("48 images, 3 classes", "done: "))


def test_progress_does_not_wait_for_the_gpu(script):
    """It looks at no item."""
    items = [object(), object()]
    assert [*script.track(items, "x")] == items
    with FakeTensorMode():
        on_gpu = [torch.empty(2, device="cuda")]
        assert [*script.track(on_gpu, "x")] == on_gpu


def test_unlabeled_images_train_without_knn(script, tmp_path, monkeypatch, capsys):
    shrink(monkeypatch, script)
    for i in range(8):
        Image.new("RGB", (12, 12), (30 * i, 9 * i, 255 - 20 * i)).save(tmp_path / f"{i}.png")
    flags = f"--data {tmp_path} --size 8 --epochs 1 --batch-size 4 --device cpu".split()
    script.main([*flags, "--out", str(tmp_path / "run")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"no labels: classes are the folders in {tmp_path}/train; there are none"
    assert lines[1].startswith("8 images, 0 classes, 0 to test ")
    assert log_of(tmp_path / "run")[0]["kNN"] == ""
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_with_one_class_there_is_no_knn(script, folder, tmp_path, monkeypatch, capsys):
    """100 % would say nothing: train/images/ is how unlabeled images often lie there."""
    shrink(monkeypatch, script)
    for split in ("train", "test"):
        shutil.copytree(folder / split / "red", tmp_path / "data" / split / "images")
    flags = f"--data {tmp_path / 'data'} --size 8 --epochs 1 --batch-size 4 --device cpu".split()
    script.main([*flags, "--out", str(tmp_path / "run")])
    assert capsys.readouterr().out.startswith("16 images, 1 classes, 8 to test ")
    assert log_of(tmp_path / "run")[0]["kNN"] == ""


def test_the_first_line_says_what_will_happen(script, arguments, tmp_path, monkeypatch, capsys):
    class Begun(Exception):
        """The first step."""

    def stop(*_):
        raise Begun

    monkeypatch.setattr(script, "train_step", stop)
    with pytest.raises(Begun):
        script.main([*arguments, "--bf16", "--out", str(tmp_path / "run")])
    line = capsys.readouterr().out
    assert line.startswith("48 images, 3 classes, 24 to test ")
    for part in ("size=8", "batch_size=16", "device='cpu'", "bf16=True"):
        assert part in line


def test_the_seed_decides(script, folder, tmp_path, monkeypatch):
    shrink(monkeypatch, script)
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
def test_the_seed_alone_draws_the_weights(script, kind, tmp_path, folder, monkeypatch):
    """As after torch.manual_seed(3), whatever was read before."""
    shrink(monkeypatch, script)
    root = tmp_path / "images"
    shutil.copytree(folder / "train", root / "train")
    if kind == "one with a test split":
        shutil.copytree(folder / "test", root / "test")
    flags = f"--data {root} --size 8 --epochs 1 --batch-size 24 --lr 0 --seed 3 --device cpu"
    script.main([*flags.split(), "--out", str(tmp_path / "run")])
    saved = torch.load(tmp_path / "run" / "checkpoint.pt")["network"]
    torch.manual_seed(3)
    fresh = getattr(script, METHODS[script.__name__])(Small()).state_dict()
    drawn = [name for name in fresh if name.endswith("weight")]
    assert len(drawn) > 3
    assert all(torch.equal(saved[name], fresh[name]) for name in drawn)


def read_apart(root, split, size):
    """Images (N, 3, size, size) in 0-1 and classes of a split, without a script's help."""
    images, labels = [], []
    for path in sorted(root.glob(f"{split}/*/*")):
        with Image.open(path) as picture:
            image = TF.center_crop(TF.resize(TF.pil_to_tensor(picture), size), size)
        images.append(image / 255)
        labels.append(sorted(CLASSES).index(path.parent.name))
    return torch.stack(images), torch.tensor(labels)


def test_the_logs_knn_is_that_of_the_saved_network(
    script, mislabeled, tmp_path, monkeypatch, capsys
):
    """Of the test images among the training images, computed from the files alone."""
    monkeypatch.setattr(script, "build_backbone", Small)
    flags = f"--data {mislabeled} --size 20 --epochs 1 --batch-size 24 --device cpu".split()
    script.main([*flags, "--out", str(tmp_path / "run")])
    backbone = Small().eval()
    backbone.load_state_dict(torch.load(tmp_path / "run" / "checkpoint.pt")["backbone"])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    h, y = {}, {}
    for split in ("train", "test"):
        x, y[split] = read_apart(mislabeled, split, 20)
        h[split] = backbone(TF.normalize(x, mean, std)).detach()
    hits = [
        vote(h["train"], y["train"], query, 200, 0.1) == truth
        for query, truth in zip(h["test"], y["test"].tolist())
    ]
    assert len(hits) == 24
    assert 30 < 100 * sum(hits) / 24 < 80
    assert f"  kNN {100 * sum(hits) / 24:.2f}  " in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_goes_through_linear_eval(method, runs, capsys):
    linear_eval = importlib.import_module("linear_eval")
    linear_eval.main([str(runs / method / "checkpoint.pt"), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resnet18: backbone.conv1.weight and on, run with ReLU True, max-pool False"
    assert lines[4] == "train: 48 images, resized to 8 px, cut to 8 px, 512 features"
    assert lines[5] == "test: 24 images, resized to 8 px, cut to 8 px, 512 features"
    accuracy = re.fullmatch(r"linear top-1: (.*)% \(weight decay .*\)", lines[-1])
    assert float(accuracy[1]) > 80


def test_arch_and_size_reach_the_backbone(script, folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(script, "build_backbone", lambda *flags: asked.append(flags) or Small())
    flags = f"--data {folder} --size 12 --arch resnet50 --epochs 1 --batch-size 24 --device cpu"
    script.main([*flags.split(), "--out", str(tmp_path / "run")])
    assert asked == [("resnet50", 12)]


def test_the_temperature_reaches_the_loss(arguments, tmp_path, monkeypatch):
    simclr = importlib.import_module("simclr")
    shrink(monkeypatch, simclr)
    seen, nt_xent = set(), simclr.nt_xent

    def spy(z1, z2, temperature):
        seen.add(temperature)
        return nt_xent(z1, z2, temperature)

    monkeypatch.setattr(simclr, "nt_xent", spy)
    simclr.main([*arguments, "--temperature", "0.2", "--out", str(tmp_path / "run")])
    assert seen == {0.2}


def test_no_stop_grad_reaches_the_method(arguments, tmp_path, monkeypatch):
    simsiam = importlib.import_module("simsiam")
    shrink(monkeypatch, simsiam)
    flags = [*arguments, "--lr", "1"]
    losses = []
    for flag in ("--stop-grad", "--no-stop-grad"):
        simsiam.main([*flags, flag, "--out", str(tmp_path / flag)])
        losses.append((tmp_path / flag / "log.csv").read_text().splitlines()[2].split(",")[1])
    assert float(losses[1]) < float(losses[0])
