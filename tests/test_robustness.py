"""A night's work is not lost, and bad input ends in one sentence, not in a traceback."""

import csv
import importlib
import io
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import METHODS, ROOT, Small
from PIL import Image
from torchvision import datasets, models


@pytest.fixture
def quick(script, folder, monkeypatch):
    """run(*flags): the script's main with a tiny backbone."""
    monkeypatch.setattr(script, "build_backbone", Small)
    flags = f"--data {folder} --size 8 --epochs 1 --batch-size 16 --device cpu".split()
    return lambda *more: script.main([*flags, *map(str, more)])


def start(method, tmp_path, *flags):
    """The script as a process, with a tiny backbone, which saves after every epoch."""
    copy = tmp_path / f"{method}.py"
    text = (ROOT / f"{method}.py").read_text()
    for usual, here in {
        "\nSAVE_SECONDS = 60 ": "\nSAVE_SECONDS = 0 ",
        "build_backbone(args.arch, args.size)": "__import__('conftest').Small()",
    }.items():
        assert usual in text
        text = text.replace(usual, here)
    copy.write_text(text)
    command = [sys.executable, str(copy), *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


def log_rows(out):
    with open(out / "log.csv", newline="") as file:
        keep = ("epoch", "loss", "spread", "kNN", "lr")
        return [[row[key] for key in keep] for row in csv.DictReader(file)]


def test_killed_in_the_third_of_four_epochs_then_resumed(
    script, folder, tmp_path, monkeypatch, capsys
):
    """Equal to four epochs straight: weights, optimizer and log, to the bit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "SAVE_SECONDS", 0)
    monkeypatch.setattr(script, "build_backbone", Small)
    flags = f"--data {folder} --size 8 --epochs 4 --batch-size 48 --device cpu --out".split()
    broken = start(script.__name__, tmp_path, *flags, "broken")
    wait_for(broken, "epoch 2 ")
    wait_for(broken, "saved")
    broken.kill()
    assert broken.wait() == -signal.SIGKILL
    assert torch.load("broken/checkpoint.pt")["epoch"] == 2
    script.main([*flags, "straight"])
    capsys.readouterr()
    script.main([*flags, "broken", "--resume"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed if line[:6] == "epoch "] == ["3", "4"]
    a, b = (torch.load(f"{run}/checkpoint.pt") for run in ("straight", "broken"))
    assert [
        name for name in a["model"] if not torch.equal(a["model"][name], b["model"][name])
    ] == []
    momentum = [state["optimizer"]["state"] for state in (a, b)]
    assert len(momentum[0]) > 5
    for i, buffers in momentum[0].items():
        assert torch.equal(buffers["momentum_buffer"], momentum[1][i]["momentum_buffer"])
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert log_rows(tmp_path / "straight") == log_rows(tmp_path / "broken")
    assert len(log_rows(tmp_path / "broken")) == 4


def test_a_loss_that_is_not_finite_stops_the_run(script, quick, tmp_path, monkeypatch):
    out, augment = tmp_path / "run", script.augment
    quick("--out", out)
    before = (out / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(script, "augment", lambda x, *_, **__: augment(x) * float("nan"))
    monkeypatch.setattr(script, "SAVE_SECONDS", 0)
    with pytest.raises(SystemExit, match="the loss is not finite: lower --lr"):
        quick("--out", out, "--epochs", 3, "--resume")
    assert (out / "checkpoint.pt").read_bytes() == before
    assert len(log_rows(out)) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "resnet34"], "has arch resnet18, not resnet34"),
        (["--size", 12], "has size 8, not 12"),
        (["--batch-size", 24], "has batch_size 16, not 24"),
        (["--seed", 5], "has seed 0, not 5"),
        (["--weight-decay", 0.1], "has weight_decay .*, not 0.1"),
        (["--subset", 40], "has images 48, not 40"),
    ],
)
def test_resume_refuses_another_run(quick, flags, message, tmp_path):
    quick("--out", tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match=message):
        quick("--out", tmp_path / "run", "--epochs", 2, "--resume", *flags)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("simsiam", ["--no-stop-grad"], "has stop_grad True, not False"),
        ("byol", ["--ema-decay", "0.5"], "has ema_decay 0.99, not 0.5"),
        ("simclr", ["--temperature", "0.1"], "has temperature 0.5, not 0.1"),
    ],
)
def test_resume_refuses_another_setting_of_the_method(method, flags, message, runs, arguments):
    script = importlib.import_module(method)
    with pytest.raises(SystemExit, match=message):
        script.main([*arguments, "--out", str(runs / method), "--resume", *flags])


def test_resume_refuses_another_method(quick, script, runs):
    other = "byol" if script.__name__ != "byol" else "simclr"
    before = (runs / other / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match=" has .*, not "):
        quick("--out", runs / other, "--resume")
    assert (runs / other / "checkpoint.pt").read_bytes() == before


def test_resume_finds_the_data_elsewhere_but_not_another_number_of_images(
    quick, folder, tmp_path, monkeypatch
):
    quick("--out", tmp_path / "run")
    shutil.copytree(folder, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    quick("--out", "run", "--data", "moved", "--epochs", 2, "--resume")
    assert [row[0] for row in log_rows(tmp_path / "run")] == ["1", "2"]
    shutil.copy("moved/train/red/0.png", "moved/train/red/more.png")
    with pytest.raises(SystemExit, match="has images 48, not 49"):
        quick("--out", "run", "--data", "moved", "--epochs", 3, "--resume")


def test_resume_with_nothing_there_starts(quick, tmp_path):
    quick("--out", tmp_path / "run", "--resume")
    assert [row[0] for row in log_rows(tmp_path / "run")] == ["1"]


def test_a_checkpoint_of_former_heads_is_named_in_a_sentence(quick, script, tmp_path):
    """It has neither the number of images nor the precision in its arguments."""
    quick("--out", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path)
    del state["args"]["images"], state["args"]["bf16"]
    state["model"] = {f"old.{name}": t for name, t in state["model"].items()}
    torch.save(state, path)
    with pytest.raises(SystemExit, match="has images None, not 48"):
        quick("--out", tmp_path / "run", "--epochs", 2, "--resume")


def test_resume_with_more_epochs_takes_the_new_schedule(quick, tmp_path):
    quick("--out", tmp_path / "run", "--epochs", 2)
    quick("--out", tmp_path / "run", "--epochs", 4, "--resume")
    rates = [float(row[4]) for row in log_rows(tmp_path / "run")]
    assert rates[2] > 2 * rates[1]  # of four epochs the third is in the middle, not at the end
    assert rates[3] < rates[2] / 2


BAD_FLAGS = {
    "nowhere": (["--data", "{tmp}/nowhere"], "--data {tmp}/nowhere: 0 images"),
    "a file": (["--data", "{tmp}/file.txt"], "--data {tmp}/file.txt: 0 images"),
    "no image": (["--data", "{tmp}/empty"], "--data {tmp}/empty: 0 images"),
    "truncated": (["--data", "{tmp}/truncated"], "cannot read {tmp}/truncated/x.png"),
    "zero bytes": (["--data", "{tmp}/zero"], "cannot read {tmp}/zero/x.png"),
    "text": (["--data", "{tmp}/text"], "cannot read {tmp}/text/x.png"),
    "few images": (["--batch-size", "49"], "48 images; --batch-size: fewer, 1 x n"),
}


@pytest.fixture
def bad(tmp_path):
    """A folder with everything that BAD_FLAGS names."""
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    good = tmp_path / "good.png"
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(good)
    damaged = {"truncated": good.read_bytes()[:5000], "zero": b"", "text": b"hello"}
    for name, content in damaged.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(content)
    for name in ("train/a", "train/b", "test/a", "test/c"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        shutil.copy(good, tmp_path / "classes" / name)
    return tmp_path


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_input_is_named(case, script, folder, bad):
    """In the process, where it is an exception; nothing is written."""
    flags, message = BAD_FLAGS[case]
    flags = [flag.format(tmp=bad) for flag in flags]
    usual = f"--data {folder} --size 8 --epochs 1 --batch-size 2 --device cpu --out {bad / 'run'}"
    with pytest.raises(SystemExit) as error:
        script.main([*usual.split(), *flags])
    assert message.format(tmp=bad) in str(error.value)
    assert not (bad / "run").exists()


def test_train_without_test_trains_and_says_so(quick, folder, tmp_path, capsys):
    shutil.copytree(folder / "train", tmp_path / "data" / "train")
    quick("--data", tmp_path / "data", "--out", tmp_path / "run")
    printed = capsys.readouterr().out
    assert printed.startswith("48 images of 8 px, 0 test images for kNN, ")
    assert "kNN " not in printed


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "I;16"])
def test_every_mode_of_image_is_read(mode, script, tmp_path):
    if mode == "I;16":
        image = Image.new("I;16", (9, 9), 200 * 256)
    else:
        image = Image.new("RGB", (9, 9), (200, 200, 200)).convert(mode)
    path = tmp_path / ("ein Bild, größer.tif" if mode == "CMYK" else "ein Bild, größer.png")
    image.save(path)
    images, _ = script.load_split(
        script.parse_args(["--data", str(tmp_path), "--size", "8"]), "train"
    )
    level = images[0, 0, 4, 4].item()
    assert level in range(195, 206)


def test_an_image_too_large_to_open_is_named(script, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (60, 60)).save(tmp_path / "x.png")
    args = script.parse_args(["--data", str(tmp_path), "--size", "8"])
    with pytest.raises(SystemExit, match="cannot read .*x.png: .*decompression bomb"):
        script.load_split(args, "train")


@pytest.mark.parametrize("size", [(1, 1), (3000, 20), (20, 3000)])
def test_images_of_odd_sizes_are_read(size, script, tmp_path):
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "x.png")
    images, _ = script.load_split(
        script.parse_args(["--data", str(tmp_path), "--size", "8"]), "train"
    )
    assert images[0, :, 3, 5].tolist() == [10, 20, 30]


def test_out_of_gpu_memory_is_one_line(folder, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.nn.Module, "to", fail)
    monkeypatch.setattr(sys, "argv", ["linear_eval.py", "--data", str(folder), "--size", "8"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "linear_eval.py"), run_name="__main__")
    assert len(end.value.code.splitlines()) == 1
    assert "--device cpu" in end.value.code


def run_as_script(name, monkeypatch, *flags):
    """The script as a program, up to its end: what it exits with."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("name", METHODS)
def test_a_failed_download_names_the_ways_out(name, monkeypatch, tmp_path):
    missing = (tmp_path / "nothing.tar.gz").as_uri()
    monkeypatch.setattr(datasets.CIFAR10, "url", missing)
    flags = ["--data-dir", tmp_path / "data", "--device", "cpu", "--out", tmp_path / "run"]
    sentence = run_as_script(name, monkeypatch, *flags)
    assert len(sentence.splitlines()) == 1
    assert all(way in sentence for way in ("--data-dir", "--data FOLDER", "tests/toy.py"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("what", ["memory", "Ctrl-C"])
def test_out_of_memory_and_ctrl_c_end_without_traceback(name, what, folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        if what == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.Module, "to", fail)
    flags = ["--data", folder, "--size", 8, "--batch-size", 16, "--device", "cpu"]
    code = run_as_script(name, monkeypatch, *flags, "--out", tmp_path / "run")
    assert code == 130 if what == "Ctrl-C" else "--batch-size" in code


class Harmful:
    """Unpickled without care it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def vit():
    return {"conv_proj.weight": torch.zeros(768, 3, 16, 16), "class_token": torch.zeros(1, 1, 768)}


def resnet(change):
    state = models.resnet18().state_dict()
    change(state)
    return state


BAD_CHECKPOINTS = {
    "a ViT": (vit, "is no torchvision ResNet"),
    "a bare list": (lambda: [torch.zeros(3)], "is no torchvision ResNet"),
    "a tensor missing": (
        lambda: resnet(lambda s: s.pop("layer3.1.conv2.weight")),
        "layer3.1.bn2.weight [256]",  # what comes in its place
    ),
    "a tensor of the wrong shape": (
        lambda: resnet(lambda s: s.update({"layer2.0.conv1.weight": torch.zeros(128, 32, 3, 3)})),
        "layer2.0.conv1.weight [128, 32, 3, 3]",
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_named(case, folder, tmp_path):
    make, message = BAD_CHECKPOINTS[case]
    torch.save(make(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/x.pt") + ".*" + re.escape(message)):
        importlib.import_module("linear_eval").main([str(tmp_path / "x.pt"), "--data", str(folder)])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_does_not(folder, tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"state_dict": Harmful(tmp_path / "harm")}))
    torch.save({"state_dict": Harmful(tmp_path / "harm")}, tmp_path / "y.pt")
    for name in ("x.pt", "y.pt"):
        with pytest.raises(ValueError, match=name):
            importlib.import_module("linear_eval").main([str(tmp_path / name)])
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02.", b"PK\x03\x04 truncated"])
def test_files_that_are_no_checkpoint_at_all(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="x.pt: .*; torch.save its state_dict"):
        importlib.import_module("linear_eval").load_backbone(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{tmp}/nowhere.pt"], "{tmp}/nowhere.pt"),
        (["--subset", "0"], "0 images, too few"),
        (["--features", "{tmp}/file.txt"], "{tmp}/file.txt exists: choose another name"),
        (["--neighbors", "{tmp}/file.txt"], "{tmp}/file.txt exists: choose another name"),
        (["--features", "{tmp}/file.txt/f.pt"], "{tmp}/file.txt"),
        (["--data", "{tmp}/classes"], "no test/ or val/; or not in train/: ['c']"),
        (["--data", "{tmp}/nowhere"], "{tmp}/nowhere: 0 images, too few"),
    ],
)
def test_bad_flags_of_linear_eval(flags, message, folder, bad):
    flags = [flag.format(tmp=bad) for flag in flags]
    usual = ["--data", str(folder), "--size", "8", "--device", "cpu"]
    with pytest.raises((OSError, ValueError)) as error:
        importlib.import_module("linear_eval").main([*usual, *flags])
    assert message.format(tmp=bad) in str(error.value)


def test_linear_eval_names_a_damaged_image(folder, bad):
    (bad / "images").mkdir()
    for split in ("train", "test"):
        shutil.copytree(folder / split, bad / "images" / split)
    shutil.copy(bad / "truncated" / "x.png", bad / "images" / "test" / "red")
    flags = ["--data", str(bad / "images"), "--size", "8", "--device", "cpu"]
    with pytest.raises(ValueError, match=r"cannot read .*images/test/red/x\.png"):
        importlib.import_module("linear_eval").main(flags)
