"""A night's work is not lost, and bad input ends in one sentence, not in a traceback."""

import csv
import importlib
import os
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Small, shrink
from PIL import Image
from torchvision import datasets


@pytest.fixture
def quick(script, folder, monkeypatch):
    """run(*flags): the script's main with a tiny backbone."""
    shrink(monkeypatch, script)
    flags = f"--data {folder} --size 8 --epochs 1 --batch-size 16 --device cpu".split()
    return lambda *more: script.main([*flags, *map(str, more)])


def start(method, tmp_path, *flags):
    """The script as a process, with a tiny backbone; it stands still in its first epoch.
    What it prints is read at once, though from no terminal."""
    copy = tmp_path / f"{method}.py"
    text = (ROOT / f"{method}.py").read_text()
    pause = """        print("standing still")
        time.sleep(100)
"""
    for usual, here in {
        "        loss = total.item()": pause + "        loss = total.item()",
        "build_backbone(args.arch, args.size)": "__import__('conftest').Small()",
    }.items():
        assert text.count(usual) == 1
        text = text.replace(usual, here)
    copy.write_text(text)
    command = [sys.executable, str(copy), *map(str, flags)]
    environment = {"PYTHONPATH": str(ROOT / "tests"), "PYTHONUNBUFFERED": ""}
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's "&" ignores it
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
        return list(csv.DictReader(file))


def epochs(out):
    return [int(row["epoch"]) for row in log_rows(out)]


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["network"]


def test_stopped_in_the_third_of_four_epochs_then_resumed(
    script, folder, tmp_path, monkeypatch, capsys
):
    """Equal to four epochs straight: weights, optimizer and log, to the bit."""
    monkeypatch.chdir(tmp_path)
    shrink(monkeypatch, script)
    flags = f"--data {folder} --size 8 --epochs 4 --batch-size 16 --device cpu --out".split()
    train_step, steps = script.train_step, []

    def stop(*args):
        steps.append(args)
        if len(steps) == 8:  # the second of three in this epoch
            raise KeyboardInterrupt
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            script.main([*flags, "broken"])
    assert torch.load("broken/checkpoint.pt")["epoch"] == 2
    torch.manual_seed(99)  # of no interest to what follows
    script.main([*flags, "straight"])
    capsys.readouterr()
    script.main(["--out", "broken", "--resume"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed if line[:6] == "epoch "] == ["3", "4"]
    a, b = (torch.load(f"{run}/checkpoint.pt") for run in ("straight", "broken"))
    for part in ("network", "backbone"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    momentum, resumed = (state["optimizer"]["state"] for state in (a, b))
    assert len(momentum) > 5
    for i, buffers in momentum.items():
        assert torch.equal(buffers["momentum_buffer"], resumed[i]["momentum_buffer"])
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    rows = [without_seconds(log_rows(tmp_path / run)) for run in ("straight", "broken")]
    assert rows[0] == rows[1]
    assert [row["epoch"] for row in rows[1]] == ["1", "2", "3", "4"]
    assert all(row["kNN"] for row in rows[1])


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a process")
def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(script, folder, tmp_path):
    """Here in the first epoch: the flags are kept, and the next run begins with it."""
    flags = f"--data {folder} --size 8 --epochs 3 --batch-size 48 --seed 5 --device cpu".split()
    out = tmp_path / "a run"
    stopped = start(script.__name__, tmp_path, *flags, "--out", out)
    wait_for(stopped, "standing still")
    stopped.send_signal(signal.SIGINT)
    _, error = stopped.communicate(timeout=100)
    assert stopped.returncode != 0
    message = f'stopped: go on with python {tmp_path / script.__name__}.py --resume --out "{out}"'
    assert error.split("\n") == ["", message, ""]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "build_backbone", Small)
        script.main(["--resume", "--out", str(out)])
    assert epochs(out) == [1, 2, 3]
    assert torch.load(out / "checkpoint.pt")["args"]["seed"] == 5


def test_ctrl_c_while_images_are_read_leaves_no_folder(script, tmp_path, monkeypatch):
    """The line then does not send to a checkpoint that is not there."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--device", "cpu"])
    monkeypatch.setattr(datasets, "CIFAR10", stop)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{script.__name__}.py"), run_name="__main__")
    assert str(end.value) == "\nstopped before the first epoch: nothing to go on from yet"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (1, [0, 4, 4, 8, 8]),  # with kNN, before and after it is measured
        (25, [0, 3, 4, 4, 7, 8, 8]),  # and when a minute has passed
        (61, [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]),
    ],
)
def test_a_stop_costs_a_minute_or_an_epoch(script, quick, tmp_path, monkeypatch, seconds, expected):
    """When an epoch takes so many seconds. Stopped in the ninth of forty."""
    now, saved = [0], []
    save, train_step = script.save, script.train_step

    def slow(*args):
        if now[0] == 8 * seconds:
            raise KeyboardInterrupt
        now[0] += seconds
        return train_step(*args)

    monkeypatch.setattr(script.time, "time", lambda: now[0])
    monkeypatch.setattr(script, "save", lambda *args: saved.append(args[1]) or save(*args))
    monkeypatch.setattr(script, "train_step", slow)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        quick("--epochs", 40, "--batch-size", 48, "--out", out)
    assert saved == expected
    assert torch.load(out / "checkpoint.pt")["epoch"] == saved[-1]
    assert epochs(out) == [*range(1, saved[-1] + 1)]
    assert {row["seconds"] for row in log_rows(out)} == {f"{seconds}.0"}


def test_no_memory_for_knn_costs_no_epoch(script, quick, tmp_path, monkeypatch):
    """It is saved before; what had no memory is measured by the next run."""

    def fail(*_):
        raise MemoryError

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(script, "knn_accuracy", fail)
        with pytest.raises(MemoryError):
            quick("--out", out, "--epochs", 2)
    assert torch.load(out / "checkpoint.pt")["epoch"] == 1
    script.main(["--resume", "--out", str(out)])
    rows = log_rows(out)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [bool(row["kNN"]) for row in rows] == [False, True]
    assert all(row["loss"] for row in rows)


def test_a_save_that_breaks_off_leaves_the_last_one(script, quick, tmp_path, monkeypatch):
    """As on a full disk: half of the new checkpoint is written, then an error."""
    out = tmp_path / "run"
    quick("--out", out)
    before = (out / "checkpoint.pt").read_bytes()

    def break_off(state, path):
        path.write_bytes(before[:1000])
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(script.torch, "save", break_off)
        with pytest.raises(OSError, match="No space"):
            quick("--out", out, "--epochs", 2, "--resume")
    assert (out / "checkpoint.pt").read_bytes() == before
    quick("--out", out, "--epochs", 2, "--resume")
    assert epochs(out) == [1, 2]


def test_a_loss_that_is_not_finite_stops_the_run(script, quick, tmp_path, monkeypatch):
    out, augment = tmp_path / "run", script.augment
    quick("--out", out)
    before = weights(out)
    monkeypatch.setattr(script, "augment", lambda x, *_, **__: augment(x) * float("nan"))
    with pytest.raises(AssertionError, match="the loss is not finite: lower --lr"):
        quick("--out", out, "--epochs", 3, "--resume")
    assert all(torch.equal(before[name], t) for name, t in weights(out).items())
    assert epochs(out) == [1]


def test_a_second_run_into_the_same_folder_is_refused(script, quick, tmp_path, monkeypatch):
    """Also while the first one is in its first epoch, with nothing saved."""
    out, augment, tried = tmp_path / "run", script.augment, []

    def second(x, *_, **__):
        if not tried:
            tried.append(True)
            with pytest.raises(SystemExit, match=f"{out} exists: go on with --resume, or .* --out"):
                quick("--out", out)
        return augment(x)

    monkeypatch.setattr(script, "augment", second)
    quick("--out", out)
    assert tried
    assert epochs(out) == [1]


def test_the_folder_is_claimed_only_once(script, quick, tmp_path, monkeypatch):
    """Of two runs that have both read their data, the second finds the folder there."""
    out, load_split = tmp_path / "run", script.load_split

    def other_is_faster(args, split):
        out.mkdir(exist_ok=True)
        return load_split(args, split)

    monkeypatch.setattr(script, "load_split", other_is_faster)
    with pytest.raises(FileExistsError):
        quick("--out", out)
    assert list(out.iterdir()) == []


def test_a_folder_that_cannot_be_written_shows_before_the_training(script, quick, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        quick("--out", tmp_path / "file" / "run")


def test_resume_keeps_the_flags_of_the_run(script, quick, folder, tmp_path, monkeypatch):
    """Those not given. --out alone is where the checkpoint lies now, also after a move."""
    monkeypatch.chdir(tmp_path)
    quick("--out", "run", "--epochs", 2, "--batch-size", 24, "--lr", 0.25, "--seed", 3)
    out = tmp_path / "runs" / script.__name__  # the default
    out.parent.mkdir()
    (tmp_path / "run").rename(out)
    script.main(["--resume", "--epochs", "3"])
    assert not (tmp_path / "run").exists()
    args = torch.load(out / "checkpoint.pt", weights_only=True)["args"]
    assert (args["batch_size"], args["lr"], args["seed"], args["size"]) == (24, 0.25, 3, 8)
    assert (args["data"], args["epochs"]) == (str(folder), 3)
    assert epochs(out) == [1, 2, 3]


def test_flags_given_to_resume_are_kept_at_once(script, quick, tmp_path, monkeypatch):
    """Stopped before its first epoch ends, the run still goes on by them."""

    def stop(*_):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    quick("--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(script, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            script.main(["--resume", "--out", str(out), "--epochs", "3"])
    script.main(["--resume", "--out", str(out)])
    assert epochs(out) == [1, 2, 3]


def test_a_finished_run_says_so(script, quick, tmp_path, capsys):
    """Also when it is resumed."""
    quick("--out", tmp_path / "run")
    line = f"done: {tmp_path / 'run' / 'checkpoint.pt'}"
    assert capsys.readouterr().out.splitlines()[-1] == line
    script.main(["--resume", "--out", str(tmp_path / "run")])
    assert capsys.readouterr().out.splitlines()[1:] == [line]


def test_resume_takes_the_flags_that_are_given(quick, folder, tmp_path):
    quick("--out", tmp_path / "run")
    shutil.copytree(folder, tmp_path / "elsewhere")
    new = ["--data", tmp_path / "elsewhere", "--weight-decay", 0.25, "--lr", 0.5, "--bf16"]
    quick("--out", tmp_path / "run", "--epochs", 2, "--resume", *new)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["args"]["data"] == str(tmp_path / "elsewhere")
    assert saved["args"]["bf16"] is True
    assert saved["optimizer"]["param_groups"][0]["weight_decay"] == 0.25
    rates = [float(row["lr"]) for row in log_rows(tmp_path / "run")]
    assert rates[1] > rates[0]  # of the default, at the end of its cosine


@pytest.mark.parametrize(
    ("method", "flag", "default", "new"),
    [
        ("simsiam", "--no-stop-grad", True, False),
        ("byol", "--ema-decay=0.5", 0.99, 0.5),
        ("simclr", "--temperature=0.1", 0.5, 0.1),
    ],
)
def test_resume_keeps_the_flag_of_the_method(method, flag, default, new, arguments, tmp_path):
    script = importlib.import_module(method)
    name = flag.removeprefix("--no").split("=")[0].strip("-").replace("-", "_")
    out = ["--out", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, script)
        script.main([*arguments, flag, *out])
        script.main([*out, "--resume", "--epochs", "3"])
    args = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["args"]
    assert (args[name], getattr(script.parse_args([]), name)) == (new, default)


def test_resume_with_nothing_there_is_refused(script, tmp_path, monkeypatch):
    """Instead of a run by the default flags, on CIFAR-10."""
    monkeypatch.setattr(script, "load_split", None)
    out = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(SystemExit) as error:
            script.main(["--resume", "--out", str(out)])
        assert str(error.value) == f"--resume: there is no {out}/checkpoint.pt"
        out.mkdir(exist_ok=True)  # nor is there one in an empty folder
    assert list(out.iterdir()) == []


def test_resume_of_another_method_does_not_train(quick, script, runs):
    other = "byol" if script.__name__ != "byol" else "simclr"
    before = (runs / other / "checkpoint.pt").read_bytes()
    with pytest.raises(RuntimeError, match="Missing key"):
        quick("--out", runs / other, "--resume", "--epochs", 3)
    assert (runs / other / "checkpoint.pt").read_bytes() == before


def test_resume_with_more_epochs_takes_the_new_schedule(quick, tmp_path):
    quick("--out", tmp_path / "run", "--epochs", 2)
    quick("--out", tmp_path / "run", "--epochs", 4, "--resume")
    rates = [float(row["lr"]) for row in log_rows(tmp_path / "run")]
    assert rates[2] > 2 * rates[1]  # of four epochs the third is in the middle, not at the end
    assert rates[3] < rates[2] / 2


def test_draws_differ_by_epoch_and_seed(script, quick, tmp_path, monkeypatch):
    seeds, augment = [], script.augment

    def spy(images, *_, **__):
        seeds.append(torch.initial_seed())
        return augment(images)

    monkeypatch.setattr(script, "augment", spy)
    for seed in (0, 1, 2):
        quick("--out", tmp_path / str(seed), "--seed", seed, "--epochs", 3, "--batch-size", 48)
    assert len(set(seeds)) == 9


NONE = "no images (nor is it cifar10, cifar100 or stl10)"
BAD_FLAGS = {
    "nowhere": (["--data", "{tmp}/nowhere"], "--data {tmp}/nowhere: " + NONE),
    "mistyped": (["--data", "cifar-10"], "--data cifar-10: " + NONE),
    "a file": (["--data", "{tmp}/file.txt"], "--data {tmp}/file.txt: " + NONE),
    "no image": (["--data", "{tmp}/empty"], "--data {tmp}/empty: " + NONE),
    "a class in test alone": (["--data", "{tmp}/classes"], "test/c/good.png: there is no class c"),
    "all truncated": (["--data", "{tmp}/truncated"], "0 images, less than one --batch-size"),
    "few images": (["--batch-size", "49"], "48 images, less than one --batch-size"),
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
    data = tmp_path / "data"
    shutil.copytree(folder / "train", data / "train")
    quick("--data", data, "--out", tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"no test images in {data}/test: no kNN"
    assert lines[1].startswith("48 images, 3 classes, 0 to test ")
    assert log_rows(tmp_path / "run")[0]["kNN"] == ""


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK"])
def test_every_mode_of_image_is_read(mode, script, tmp_path):
    image = Image.new("RGB", (9, 9), (200, 200, 200)).convert(mode)
    path = tmp_path / ("ein Bild, größer.tif" if mode == "CMYK" else "ein Bild, größer.png")
    image.save(path)
    images, _ = script.load_split(
        script.parse_args(["--data", str(tmp_path), "--size", "8"]), "train"
    )
    level = images[0, 0, 4, 4].item()
    assert level in range(195, 206)


def test_an_image_too_large_to_open_is_named(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (60, 60)).save(tmp_path / "x.png")
    args = script.parse_args(["--data", str(tmp_path), "--size", "8"])
    assert len(script.load_split(args, "train")[0]) == 0
    printed = capsys.readouterr().out
    assert f"passed over {tmp_path}/x.png: " in printed
    assert "decompression bomb" in printed


@pytest.mark.parametrize("size", [(1, 1), (3000, 20), (20, 3000)])
def test_images_of_odd_sizes_are_read(size, script, tmp_path):
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "x.png")
    images, _ = script.load_split(
        script.parse_args(["--data", str(tmp_path), "--size", "8"]), "train"
    )
    assert images[0, :, 3, 5].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{tmp}/nowhere.pt"], "{tmp}/nowhere.pt"),
        (["--features", "{tmp}/file.txt"], "{tmp}/file.txt exists: choose another name"),
        (["--features", "{tmp}/file.txt/f.pt"], "{tmp}/file.txt"),
        (["--data", "{tmp}/classes"], "there is no class c in train"),
        (["--data", "{tmp}/nowhere"], "--data {tmp}/nowhere: " + NONE),
    ],
)
def test_bad_flags_of_linear_eval(flags, message, folder, bad):
    flags = [flag.format(tmp=bad) for flag in flags]
    usual = ["--data", str(folder), "--size", "8", "--device", "cpu"]
    with pytest.raises((OSError, ValueError, SystemExit)) as error:
        importlib.import_module("linear_eval").main([*usual, *flags])
    assert message.format(tmp=bad) in str(error.value)
