"""Folders of images, and torchvision's built-in sets through torchvision's own download."""

import argparse
import hashlib
import pickle
import re
import tarfile
import urllib.response

import numpy as np
import plot
import pytest
import torch
from conftest import shrink
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


def test_images_are_resized_as_pillow_does(script, tmp_path):
    """Averaging what a pixel covers: the nearest one would be another picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images, _ = load(script, data=str(tmp_path), size=16)
    expected = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR))
    assert torch.equal(images[0], torch.from_numpy(expected.copy()).permute(2, 0, 1))


def test_images_at_any_depth_have_no_labels(script, tmp_path):
    for i, name in enumerate(["a.png", "b/c.PNG", "b/d/e f/ü.jpg"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, i, i)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    images, labels = load(script, data=str(tmp_path), size=9)
    assert sorted(images[:, 0, 4, 4].tolist()) == [0, 1, 2]
    assert labels.tolist() == [-1, -1, -1]


def test_the_subset_does_not_depend_on_the_seed(script, folder):
    def draw(subset, seed):
        torch.manual_seed(seed)
        return load(script, data=str(folder), size=8, subset=subset, seed=seed)[0]

    assert len(draw(10, 0)) == 10
    assert torch.equal(draw(10, 0), draw(10, 1))
    assert torch.equal(draw(10, 0), draw(20, 0)[:10])
    assert len(draw(None, 0).flatten(1).unique(dim=0)) == 48


def test_loading_leaves_the_random_state_alone(script, folder):
    torch.manual_seed(3)
    load(script, data=str(folder), size=8)
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(()))


def draw_folders(root, names):
    """An image of 9 x 9 for each of the names, of a gray level that counts them."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, i, i)).save(root / name)


def grays(script, root, split="train"):
    """{gray level: label} of a split."""
    images, labels = load(script, split, data=str(root), size=9)
    return dict(zip(images[:, 0, 4, 4].tolist(), labels.tolist()))


def test_hidden_files_and_folders_are_passed_over(script, tmp_path):
    root = tmp_path / ".cache" / "images"  # a hidden folder above --data does not matter
    hidden = ["train/a/._1.png", "train/.ipynb_checkpoints/1.png", "train/a/.trash/1.png"]
    draw_folders(root, ["train/a/1.png", "train/b/1.png", *hidden])
    assert grays(script, root) == {0: 0, 1: 1}
    draw_folders(tmp_path / "flat", ["1.png", ".2.png", "x/.y/3.png", "x/4.png"])
    assert grays(script, tmp_path / "flat") == {0: -1, 3: -1}


def test_labels_are_numbered_by_train_in_test_as_well(script, tmp_path):
    names = ["train/a/1.png", "train/b/1.png", "train/c/deeper/1.png", "test/c/1.png"]
    draw_folders(tmp_path, [*names, "train/loose.png"])
    assert grays(script, tmp_path) == {0: 0, 1: 1, 2: 2}
    assert grays(script, tmp_path, "test") == {3: 2}


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        (["test/a/1.png", "val/b/1.png"], {2: 0}),
        (["test/b/1.png", "test/2.png"], {2: 1}),  # what lies in no class is passed over
        (["val/b/1.png"], {}),
        ([], {}),
    ],
)
def test_the_test_split(script, tmp_path, capsys, others, expected):
    draw_folders(tmp_path, ["train/a/1.png", "train/b/1.png", *others])
    assert grays(script, tmp_path, "test") == expected
    assert capsys.readouterr().out == ""
    grays(script, tmp_path)  # before the first picture is decoded
    note = "" if expected else f"no test images in {tmp_path}/test: no kNN\n"
    assert capsys.readouterr().out == note


@pytest.mark.parametrize("names", [["cat/1.png", "dog/1.png"], ["1.png"], ["train/1.png"]])
def test_without_classes_it_says_where_they_would_be(script, tmp_path, capsys, names):
    draw_folders(tmp_path, names)
    images, labels = load(script, data=str(tmp_path), size=9)
    assert labels.tolist() == [-1] * len(names)
    assert (
        capsys.readouterr().out
        == f"no labels: classes are the folders in {tmp_path}/train; there are none\n"
    )
    assert len(load(script, "test", data=str(tmp_path), size=9)[0]) == 0
    assert capsys.readouterr().out == ""


def test_a_class_that_train_lacks_is_named(script, tmp_path, monkeypatch):
    """Before a picture of either split is decoded."""
    draw_folders(tmp_path, ["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/zebra/1.png"])
    monkeypatch.setattr(script.Image, "open", None)
    message = f"{tmp_path}/test/zebra/1.png: there is no class zebra in train"
    for split in ("train", "test"):
        with pytest.raises(SystemExit) as error:
            load(script, split, data=str(tmp_path), size=9)
        assert str(error.value) == message


def test_a_folder_with_brackets_and_spaces_in_its_name(script, tmp_path):
    root = tmp_path / "photos [2024] *"
    draw_folders(root, ["train/a [x]/1.png", "train/b c/1.png", "test/b c/1.png"])
    assert grays(script, root) == {0: 0, 1: 1}
    assert grays(script, root, "test") == {2: 1}


def test_train_without_classes_has_neither_labels_nor_test(script, tmp_path):
    draw_folders(tmp_path, ["train/1.png", "train/2.png", "test/3.png"])
    assert grays(script, tmp_path) == {0: -1, 1: -1}
    assert grays(script, tmp_path, "test") == {}


@pytest.mark.parametrize("ending", [".JPG", ".jpeg", ".webp", ".bmp", ".tiff", ".Png"])
def test_endings_that_are_read(script, tmp_path, ending):
    Image.init()
    if Image.registered_extensions()[ending.lower()] not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {ending}")
    Image.new("RGB", (9, 9), (200, 200, 200)).save(tmp_path / f"x{ending}")
    images, _ = load(script, data=str(tmp_path), size=9)
    assert abs(images[0, 0, 4, 4].item() - 200) < 6


def test_endings_that_are_not(script, tmp_path):
    for name in ("x.txt", "x.mp4", "x.json", "png"):
        (tmp_path / name).write_text("no image")
    Image.new("RGB", (9, 9)).save(tmp_path / "x.pdf")
    with pytest.raises(SystemExit) as error:
        load(script, data=str(tmp_path), size=9)
    sentence = f"--data {tmp_path}: no images (nor is it cifar10, cifar100 or stl10)"
    assert str(error.value) == sentence


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_an_image_that_cannot_be_read_is_named_and_passed_over(script, tmp_path, capsys, damage):
    """Its place is left to none: labels and images still agree."""
    draw_folders(tmp_path, [f"train/{name}/{i}.png" for name in "abc" for i in range(4)])
    before = grays(script, tmp_path)
    path = tmp_path / "train" / "b" / "broken.png"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    data = {"truncated": path.read_bytes()[:5000], "empty": b"", "text": b"hello"}[damage]
    path.write_bytes(data)
    capsys.readouterr()
    assert grays(script, tmp_path) == before
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(rf"passed over {path}: .{{8,}}", lines[1])


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "pgm"])
def test_more_than_8_bits_a_channel_are_passed_over(script, tmp_path, capsys, mode):
    """Pillow would make white or black of them."""
    path = tmp_path / "x.tif"
    if mode == "pgm":
        path = tmp_path / "x.pgm"
        path.write_bytes(b"P5 2 2 65535 " + bytes(8))
    else:
        Image.new(mode, (9, 9), 200).save(path)
    assert len(load(script, data=str(tmp_path), size=8)[0]) == 0
    assert f"passed over {path}: more than 8 bits a channel\n" in capsys.readouterr().out


def test_photos_are_turned_upright(script, tmp_path):
    """By the orientation in their EXIF data, here: turn by 90 degrees to the right."""
    left = np.zeros((40, 20, 3), dtype=np.uint8)
    left[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(left).save(tmp_path / "x.jpg", exif=exif, quality=95)
    images, _ = load(script, data=str(tmp_path), size=10)
    assert images[0, :, :4].min() > 200  # what was left is on top
    assert images[0, :, 6:].max() < 50


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
def test_cifar_is_downloaded_and_read_exactly(script, tiny_cifar, tmp_path, monkeypatch):
    name, pixels = tiny_cifar
    monkeypatch.chdir(tmp_path)
    flags = {"data": name, "size": 32}
    images, labels = load(script, **flags)
    expected = {image.tobytes(): i % 6 for i, image in enumerate(pixels[:12])}
    assert {x.numpy().tobytes(): int(y) for x, y in zip(images, labels)} == expected
    images, labels = load(script, "test", **flags)
    expected = {image.tobytes(): i % 6 for i, image in enumerate(pixels[12:])}
    assert {x.numpy().tobytes(): int(y) for x, y in zip(images, labels)} == expected


@pytest.fixture
def tiny_stl10(monkeypatch, tmp_path):
    """STL-10 of 6 + 4 labeled and 16 unlabeled images, where torchvision looks for it: the pixels
    and labels of each part, (N, 3, 96, 96) and (N,)."""
    dataset, source = datasets.STL10, tmp_path / "source"
    folder = source / dataset.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    labels = {"train": [1, 2, 3, 3, 2, 1], "test": [1, 2, 2, 3]}  # in the file from 1 on
    parts = {}
    for name, count in (("train", 6), ("test", 4), ("unlabeled", 16)):
        pixels = random.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        pixels.transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")  # column by column
        parts[name] = pixels, [y - 1 for y in labels.get(name, [0] * count)]
        if name in labels:
            np.array(labels[name], dtype=np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / dataset.class_names_file).write_text("a\nb\nc\n")
    (folder / dataset.folds_list_file).write_text("0 1\n")
    for split in ("train_list", "test_list"):
        listed = [[name, md5(folder / name)] for name, _ in getattr(dataset, split)]
        monkeypatch.setattr(dataset, split, listed)
    serve(monkeypatch, dataset, source, dataset.base_folder)
    monkeypatch.chdir(tmp_path)
    return parts


def test_stl10_is_downloaded_and_read_exactly(script, tiny_stl10):
    """The unlabeled images are trained on as well."""
    for split, names in (("train", ["train", "unlabeled"]), ("test", ["test"])):
        images, labels = load(script, split, data="stl10", size=96)
        expected = {}
        for name in names:
            pixels, classes = tiny_stl10[name]
            expected |= {x.tobytes(): y for x, y in zip(pixels, classes)}
        assert {x.numpy().tobytes(): int(y) for x, y in zip(images, labels)} == expected


def test_the_bank_of_stl10_is_its_labeled_images(script, tiny_stl10, tmp_path, monkeypatch, capsys):
    """A label of -1 has no vote; every image is trained on."""
    shrink(monkeypatch, script)
    banks, seen = [], []
    knn_accuracy, train_step = script.knn_accuracy, script.train_step

    def spy(bank, labels, queries, truth):
        banks.append((len(bank), labels.sort().values.tolist(), len(queries), len(truth)))
        return knn_accuracy(bank, labels, queries, truth)

    def count(network, optimizer, x, bf16):
        seen.append(len(x))
        return train_step(network, optimizer, x, bf16)

    monkeypatch.setattr(script, "knn_accuracy", spy)
    monkeypatch.setattr(script, "train_step", count)
    flags = "--data stl10 --size 96 --epochs 1 --batch-size 11 --device cpu --out run"
    script.main(flags.split())
    assert capsys.readouterr().out.startswith("22 images, 3 classes, 4 to test ")
    assert banks == [(6, [0, 0, 1, 1, 2, 2], 4, 4)]
    assert sum(seen) == 22


def test_linear_eval_takes_the_labeled_images_of_stl10(tiny_stl10, tmp_path):
    saved = tmp_path / "features.pt"
    flags = ["--data", "stl10", "--size", "8", "--device", "cpu", "--features", str(saved)]
    linear_eval.main(flags)
    for split in ("train", "test"):
        part = torch.load(saved)[split]
        assert sorted(part["labels"].tolist()) == sorted(tiny_stl10[split][1])
        assert sorted(part["paths"]) == [*range(len(part["labels"]))]
    assert torch.load(saved)["classes"] == ["a", "b", "c"]


@pytest.mark.parametrize("tiny_cifar", ["cifar10"], indirect=True)
def test_pictures_are_found_again_by_the_features_file_alone(tiny_cifar, tmp_path, monkeypatch):
    """Also those of a built-in set: the file says which one, and the places in it."""
    monkeypatch.chdir(tmp_path)
    flags = "--data cifar10 --size 8 --device cpu --subset 5 --features f.pt"
    linear_eval.main(flags.split())
    saved = torch.load("f.pt")
    assert saved["classes"] == list("abcdef")
    torch.manual_seed(0)
    backbone = linear_eval.build_backbone("resnet18", small_stem=True, max_pool=False).eval()
    for split in ("train", "test"):
        listed = linear_eval.list_images(argparse.Namespace(**saved["args"]), split)
        for h, y, i in zip(*saved[split].values()):
            picture, label = listed[i]
            assert label == y
            x = linear_eval.load_picture(picture, saved["args"]["size"], saved["args"]["resize"])
            x = linear_eval.TF.normalize(x / 255, saved["args"]["mean"], saved["args"]["std"])
            with torch.no_grad():
                torch.testing.assert_close(backbone(x[None])[0], h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tiny_cifar", ["cifar10", "cifar100"], indirect=True)
def test_pictures_of_a_built_in_set_are_drawn_by_their_places(tiny_cifar, tmp_path, monkeypatch):
    name, _ = tiny_cifar
    monkeypatch.chdir(tmp_path)
    linear_eval.main(f"--data {name} --size 8 --device cpu --subset 5 --features f.pt".split())
    saved = torch.load("f.pt")
    h, pictures, _ = plot.load_features("f.pt")
    assert [picture["split"] for picture in pictures] == ["test"] * 5 + ["train"] * 5
    for i, picture in enumerate(pictures):
        part, k = saved[picture["split"]], i % 5
        place = part["paths"][k]
        assert picture["name"] == f"{picture['split']} {place}"
        assert picture["class"] == "abcdef"[int(part["labels"][k])]
        dataset = getattr(datasets, name.upper())("data", train=picture["split"] == "train")
        assert picture["source"].tobytes() == dataset[place][0].tobytes()
        assert plot.draw(picture, 40).size == (40, 40)
        torch.testing.assert_close(h[i], torch.nn.functional.normalize(part["features"][k], dim=0))


class Pixels(torch.nn.Flatten):
    """The features are the normalized pixels."""

    inplanes = 3 * 32 * 32


@pytest.mark.parametrize("tiny_cifar", ["cifar10", "cifar100"], indirect=True)
def test_linear_eval_reads_cifar_exactly(tiny_cifar, tmp_path, monkeypatch):
    """Its paths are places in the data set."""
    name, pixels = tiny_cifar
    monkeypatch.chdir(tmp_path)
    args = linear_eval.parse_args(["--data", name, "--size", "32", "--device", "cpu"])
    args.resize = 32
    for split, part in (("train", pixels[:12]), ("test", pixels[12:18])):
        listed = linear_eval.list_images(args, split)
        saved, _ = linear_eval.extract_features(Pixels(), args, split, listed)
        expected = {image.tobytes(): i % 6 for i, image in enumerate(part)}
        assert sorted(saved["paths"]) == list(range(len(part)))
        for h, y, i in zip(*saved.values()):
            x = linear_eval.TF.pil_to_tensor(listed[i][0])
            assert y == expected.pop(x.numpy().tobytes())
            x = linear_eval.TF.normalize(x / 255, args.mean, args.std).flatten()
            torch.testing.assert_close(h, x)
        assert not expected
