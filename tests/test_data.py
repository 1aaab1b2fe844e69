"""Folders of images, and torchvision's built-in sets through torchvision's own download."""

import hashlib
import pickle
import tarfile
import urllib.response

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

import linear_eval


def load(script, split="train", **flags):
    args = script.parse_args([])
    for name, value in flags.items():
        setattr(args, name, value)
    return script.load_split(args, split)


def test_folder_with_classes(script, folder):
    images, labels = load(script, data=str(folder), size=16)
    assert images.shape == (48, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [16, 16, 16]
    means = images.float().mean((2, 3))  # the channel that names the class: blue, green, red
    assert torch.equal(means.argmax(1), 2 - labels)


def test_same_size_is_read_exactly_and_others_are_resized_then_cropped(script, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images, labels = load(script, data=str(tmp_path), size=16)
    assert torch.equal(images[0], torch.from_numpy(pixels).permute(2, 0, 1))
    assert labels.tolist() == [-1]
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 255  # the middle third is what the center crop keeps
    Image.fromarray(wide).save(tmp_path / "a.png")
    images, _ = load(script, data=str(tmp_path), size=10)
    assert images[0, :, :, 1:-1].min() == 255


def test_images_at_any_depth_have_no_labels(script, tmp_path):
    for i, name in enumerate(["a.png", "b/c.PNG", "b/d/e f/ü.jpg"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, i, i)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    images, labels = load(script, data=str(tmp_path), size=9)
    assert sorted(images[:, 0, 4, 4].tolist()) == [0, 1, 2]
    assert labels.tolist() == [-1, -1, -1]


def test_subset_is_drawn_with_the_seed(script, folder):
    def draw(subset, seed):
        return load(script, data=str(folder), size=8, subset=subset, seed=seed)[0]

    assert len(draw(10, 0)) == 10
    assert torch.equal(draw(10, 0), draw(10, 0))
    assert not torch.equal(draw(10, 0), draw(10, 1))
    assert len(draw(None, 0).flatten(1).unique(dim=0)) == 48


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_broken_image_is_named(script, tmp_path, damage):
    path = tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    data = {"truncated": path.read_bytes()[:5000], "empty": b"", "text": b"hello"}[damage]
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot read .*broken\.png"):
        load(script, data=str(tmp_path), size=8)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_images_is_named(script, tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=name):
        load(script, data=str(tmp_path / name), size=8)


def test_other_classes_in_test_than_in_train(script, tmp_path):
    for name in ("train/a", "train/b", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name / "x.png")
    with pytest.raises(ValueError, match=r"test/ has other classes than train/"):
        load(script, "test", data=str(tmp_path), size=8)


def md5(path):
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def serve(monkeypatch, dataset, source, folder):
    """Pack source/folder as the archive that dataset downloads from."""
    archive = source / dataset.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source / folder, arcname=folder)
    monkeypatch.setattr(dataset, "url", archive.as_uri())
    monkeypatch.setattr(urllib.response.addinfourl, "length", None, raising=False)  # as HTTP has
    monkeypatch.setattr(dataset, "tgz_md5", md5(archive))


@pytest.fixture
def tiny_cifar(request, monkeypatch, tmp_path):
    """CIFAR-10 or CIFAR-100 of 12 + 6 images, where torchvision looks for it."""
    dataset = getattr(datasets, request.param.upper())
    source = tmp_path / "source"
    folder = source / dataset.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (18, 3072), dtype=np.uint8)
    key = "labels" if dataset is datasets.CIFAR10 else "fine_labels"
    for split, rows in (("train_list", range(12)), ("test_list", range(12, 18))):
        files = [name for name, _ in getattr(dataset, split)]
        listed = []
        for i, name in enumerate(files):
            part = [row for row in rows if row % len(files) == i]
            content = {"data": pixels[part], key: [row % 6 for row in part]}
            (folder / name).write_bytes(pickle.dumps(content))
            listed.append([name, md5(folder / name)])
        monkeypatch.setattr(dataset, split, listed)
    meta = folder / dataset.meta["filename"]
    meta.write_bytes(pickle.dumps({dataset.meta["key"]: list("abcdef")}))
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": md5(meta)})
    serve(monkeypatch, dataset, source, dataset.base_folder)
    return request.param, pixels.reshape(18, 3, 32, 32)


@pytest.mark.parametrize("tiny_cifar", ["cifar10", "cifar100"], indirect=True)
def test_cifar_is_downloaded_and_read_exactly(script, tiny_cifar, tmp_path):
    name, pixels = tiny_cifar
    flags = {"data": name, "data_dir": str(tmp_path / "data"), "size": 32}
    images, labels = load(script, **flags)
    expected = {image.tobytes(): i % 6 for i, image in enumerate(pixels[:12])}
    assert {x.numpy().tobytes(): int(y) for x, y in zip(images, labels)} == expected
    images, labels = load(script, "test", **flags)
    expected = {image.tobytes(): i % 6 for i, image in enumerate(pixels[12:])}
    assert {x.numpy().tobytes(): int(y) for x, y in zip(images, labels)} == expected


@pytest.mark.parametrize("tiny_cifar", ["cifar10", "cifar100"], indirect=True)
def test_linear_eval_reads_cifar_exactly(tiny_cifar, tmp_path):
    name, pixels = tiny_cifar
    flags = {
        "data": name,
        "data_dir": str(tmp_path / "data"),
        "size": 32,
        "subset": None,
        "seed": 0,
    }
    for split, part in (("train", slice(12)), ("test", slice(12, 18))):
        images, labels, names = load(linear_eval, split, **flags)
        expected = {image.tobytes(): i % 6 for i, image in enumerate(pixels[part])}
        assert {x.numpy().tobytes(): int(y) for x, y in zip(images, labels)} == expected
        assert names == list("abcdef")


@pytest.fixture
def tiny_stl10(monkeypatch, tmp_path):
    """STL-10 of 4 labeled train, 4 test and 16 unlabeled images."""
    dataset, source = datasets.STL10, tmp_path / "source"
    folder = source / dataset.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, count in (("train", 4), ("test", 4), ("unlabeled", 16)):
        random.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{name}_X.bin")
    for name in ("train", "test"):
        np.array([1, 2, 1, 2], dtype=np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / dataset.class_names_file).write_text("a\nb\n")
    (folder / dataset.folds_list_file).write_text("0 1\n")
    for split in ("train_list", "test_list"):
        listed = [[name, md5(folder / name)] for name, _ in getattr(dataset, split)]
        monkeypatch.setattr(dataset, split, listed)
    serve(monkeypatch, dataset, source, dataset.base_folder)


@pytest.mark.usefixtures("tiny_stl10")
def test_stl10_pretrains_on_the_unlabeled_images(script, tmp_path, capsys):
    data, out = str(tmp_path / "data"), tmp_path / "run"
    flags = ["--data", "stl10", "--data-dir", data, "--epochs", "1", "--batch-size", "8"]
    script.main([*flags, "--device", "cpu", "--size", "8", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "16 images of 8 px" in printed
    assert "kNN" in (out / "log.csv").read_text().splitlines()[0]
    assert "kNN " in printed.splitlines()[1]
    args = script.parse_args(["--data", "stl10"])
    assert args.size == 96


@pytest.mark.usefixtures("tiny_stl10")
def test_linear_eval_takes_the_labeled_images_of_stl10(tmp_path, capsys):
    flags = ["--data", "stl10", "--data-dir", str(tmp_path / "data"), "--size", "8"]
    linear_eval.main([*flags, "--device", "cpu", "--pictures", str(tmp_path / "pictures")])
    printed = capsys.readouterr().out
    assert "4 train and 4 test images of 8 px" in printed
    assert [line.split(":")[0] for line in printed.splitlines() if line[:4] == "    "] == [
        "    a",
        "    b",
    ]


def test_linear_eval_names_the_ways_out_of_a_failed_download(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "nothing.tar.gz").as_uri())
    with pytest.raises(OSError, match="--data cifar10: .*--data-dir and --data FOLDER"):
        linear_eval.main(["--data-dir", str(tmp_path / "data"), "--device", "cpu"])


def test_a_failed_download_names_address_and_ways_out(script, monkeypatch, tmp_path):
    missing = (tmp_path / "nothing.tar.gz").as_uri()
    monkeypatch.setattr(datasets.CIFAR10, "url", missing)
    with pytest.raises(OSError, match="--data-dir.*--data FOLDER") as error:
        load(script, data="cifar10", data_dir=str(tmp_path / "data"), size=32)
    assert missing in str(error.value)
