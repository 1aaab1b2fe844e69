"""The probe: which checkpoints it opens, and how good its linear layer is."""

import collections
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.models import resnet

import linear_eval


def build(arch, small_stem=False):
    """A torchvision network with random statistics, in eval mode, and its features of an image."""
    torch.manual_seed(0)
    network = models.get_model(arch, num_classes=7)
    if small_stem:
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    network.eval()
    x = torch.rand(2, 3, 32, 32)
    features = nn.Sequential(*list(network.children())[:-1])(x).flatten(1)
    return network, x, features


def prefixed(state, prefix):
    return {prefix + name: t for name, t in state.items()}


def momentum(state):
    """The same network a few steps later."""
    return {name: t + 1 if t.is_floating_point() else t for name, t in state.items()}


def numbered(network):
    return nn.Sequential(*list(network.children())[:-1]).state_dict()


def without_pool(network):
    """Numbered after the max-pool was taken out: layer1 is child 3."""
    keep = [m for m in network.children() if not isinstance(m, nn.MaxPool2d)]
    return nn.Sequential(*keep[:-1]).state_dict()


def profiled(state):
    """With the counters that profilers register in every module."""
    with_counters = {"total_ops": torch.zeros(1), "total_params": torch.zeros(1)}
    for name, tensor in state.items():
        with_counters[name] = tensor
        module = name.rpartition(".")[0]
        for level in range(module.count(".") + 1):
            part = module.rsplit(".", level)[0]
            with_counters[f"{part}.total_ops"] = torch.zeros(1)
            with_counters[f"{part}.total_params"] = torch.zeros(1)
    return {"state_dict": with_counters}


LAYOUTS = {
    "plain": lambda n, s: s,
    "ordered": lambda n, s: collections.OrderedDict(s),
    "state_dict": lambda n, s: {"state_dict": s, "epoch": 3, "arch": "resnet18"},
    "model": lambda n, s: {
        "model": s,
        "optimizer": {"state": {0: {"momentum_buffer": s["bn1.bias"]}}},
    },
    "no head": lambda n, s: {name: t for name, t in s.items() if name[:3] != "fc."},
    "DataParallel": lambda n, s: {"state_dict": prefixed(s, "module.encoder.")},
    "Lightning": lambda n, s: {
        "state_dict": prefixed(s, "backbone.") | {"projector.0.weight": s["fc.weight"]}
    },
    "MoCo": lambda n, s: {
        "state_dict": prefixed(momentum(s), "module.encoder_k.") | prefixed(s, "module.encoder_q.")
    },
    "momentum_backbone": lambda n, s: (
        prefixed(momentum(s), "momentum_backbone.") | prefixed(s, "backbone.")
    ),
    "online and target": lambda n, s: (
        prefixed(momentum(s), "target_network.net.") | prefixed(s, "online_network.net.")
    ),
    "teacher": lambda n, s: {
        "teacher": prefixed(momentum(s), "backbone."),
        "student": prefixed(s, "module.backbone."),
    },
    "numbered": lambda n, s: numbered(n),
    "numbered in backbone": lambda n, s: {"state_dict": prefixed(numbered(n), "backbone.")},
    "numbered without pool": lambda n, s: prefixed(without_pool(n), "f."),
    "shortcut": lambda n, s: {k.replace("downsample", "shortcut"): t for k, t in s.items()},
    "profiled": lambda n, s: profiled(s),
    "old, no batch counters": lambda n, s: {k: t for k, t in s.items() if "num_batches" not in k},
    "half precision": lambda n, s: {
        k: t.half() if t.is_floating_point() else t for k, t in s.items()
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_key_layouts(layout, tmp_path):
    network, x, features = build("resnet18")
    torch.save(LAYOUTS[layout](network, network.state_dict()), tmp_path / "saved.pth")
    backbone, trained = linear_eval.load_backbone(tmp_path / "saved.pth")
    tolerance = 0.02 if layout == "half precision" else 1e-5
    torch.testing.assert_close(backbone.eval()(x), features, rtol=tolerance, atol=tolerance)
    assert trained == {}


@pytest.mark.parametrize(
    ("arch", "small_stem"),
    [("resnet18", True), ("resnet34", False), ("resnet50", False), ("resnet50", True)]
    + [("resnet101", False), ("wide_resnet50_2", False), ("resnext50_32x4d", False)],
)
def test_architectures(arch, small_stem, tmp_path):
    network, x, features = build(arch, small_stem)
    torch.save(network.state_dict(), tmp_path / "saved.pth")
    backbone, _ = linear_eval.load_backbone(tmp_path / "saved.pth")
    torch.testing.assert_close(backbone.eval()(x), features)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(3)], "no conv1"),
        (models.VisionTransformer(32, 16, 1, 2, 16, 32).state_dict(), "no conv1"),
        (models.squeezenet1_1().state_dict(), "no conv1"),
        ({"epoch": 3}, "no conv1"),
    ],
    ids=["list", "ViT", "SqueezeNet", "no tensors"],
)
def test_what_is_no_resnet_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "saved.pth")
    with pytest.raises(ValueError, match=rf"saved\.pth is no checkpoint of a ResNet.*{message}"):
        linear_eval.load_backbone(tmp_path / "saved.pth")


class Code:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "saved.pth"
    network, _, _ = build("resnet18")
    torch.save(network.state_dict(), path)
    whole = path.read_bytes()
    harmful = pickle.dumps({"state_dict": Code(str(tmp_path / "harm"))}, protocol=2)
    for content in (b"", whole[: len(whole) // 2], b"hello\n", harmful):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"saved\.pth is damaged or not only tensors"):
            linear_eval.load_backbone(path)
    assert not (tmp_path / "harm").exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        linear_eval.load_backbone(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("name", ["layer2.1.conv2.weight", "bn1.running_var", "layer3.0.bn1.bias"])
def test_a_missing_or_misshapen_tensor_is_named(name, tmp_path):
    state = build("resnet18")[0].state_dict()
    tensor = state.pop(name)
    torch.save(prefixed(state, "encoder."), tmp_path / "saved.pth")
    with pytest.raises(ValueError, match=rf"saved\.pth: .*Missing key.*{name}"):
        linear_eval.load_backbone(tmp_path / "saved.pth")
    torch.save(prefixed(state | {name: tensor[:5]}, "encoder."), tmp_path / "saved.pth")
    with pytest.raises(ValueError, match=rf"saved\.pth: .*size mismatch for {name}: .*\[5[],]"):
        linear_eval.load_backbone(tmp_path / "saved.pth")


def blobs(count, seed):
    """Features of ten overlapping classes, correlated and of very different scales."""
    centers = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(count) % 10
    h = 0.22 * centers[y] @ mix + torch.randn(count, 64, generator=generator) @ mix.T
    return (h * torch.logspace(-1, 1, 64) + 3).relu(), y


def adam(h, y, test_h, test_y):
    """Top-1 in % of the usual protocol: Adam, lr 1e-2, batch 1000, 500 epochs, cosine."""
    torch.manual_seed(0)
    mean, std = h.mean(0), h.std(0)
    h, test_h = (h - mean) / std, (test_h - mean) / std
    layer = nn.Linear(h.shape[1], 10)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        for batch in torch.randperm(len(h)).split(1000):
            optimizer.zero_grad()
            F.cross_entropy(layer(h[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    return 100 * (layer(test_h).argmax(1) == test_y).float().mean().item()


def test_lbfgs_does_not_fall_behind_adam():
    (h, y), (test_h, test_y) = blobs(5000, seed=2), blobs(10000, seed=3)
    layer, _ = linear_eval.linear_probe(h, y)
    ours = 100 * (layer(test_h).argmax(1) == test_y).float().mean().item()
    theirs = adam(h, y, test_h, test_y)
    assert 40 < theirs < 95  # neither trivial nor hopeless
    assert ours > theirs - 0.3


def test_nor_with_few_labels():
    (h, y), (test_h, test_y) = blobs(200, seed=2), blobs(5000, seed=3)
    layer, _ = linear_eval.linear_probe(h, y)
    ours = 100 * (layer(test_h).argmax(1) == test_y).float().mean().item()
    assert ours > adam(h, y, test_h, test_y) - 0.3


def test_a_nearly_dead_feature_does_no_harm():
    (h, y), (test_h, test_y) = blobs(1000, seed=2), blobs(5000, seed=3)
    h[:, 0] = test_h[:, 0] = 0
    h[0, 0] = 1e-4
    layer, _ = linear_eval.linear_probe(h, y)
    before = (layer(test_h).argmax(1) == test_y).float().mean()
    test_h[::2, 0] = 0.1
    after = (layer(test_h).argmax(1) == test_y).float().mean()
    assert before - after < 0.003


def test_the_fit_is_a_minimum():
    """No gradient is left where the fit ends; first the layer is unfolded."""
    torch.manual_seed(0)
    h, y = blobs(500, seed=2)
    layer, decay = linear_eval.linear_probe(h, y)
    mean, std = h.mean(0), h.std(0).clamp(min=0.01 * h.std().item())
    weight = (layer.weight * std).detach().requires_grad_()
    bias = (layer.bias + layer.weight @ mean).detach().requires_grad_()
    loss = F.cross_entropy((h - mean) / std @ weight.T + bias, y)
    loss += decay / 2 * weight.square().sum()
    assert max(g.abs().max() for g in torch.autograd.grad(loss, [weight, bias])) < 1e-3


def test_weight_decay_is_chosen_on_what_is_held_out():
    """Labels that have nothing to do with the features: the strongest is the best."""
    torch.manual_seed(0)
    h, y = torch.randn(600, 200), torch.arange(600) % 2
    h[:, 0] += 2 * y  # but for one
    assert linear_eval.linear_probe(h, y)[1] >= 1e-2


def vote(bank, labels, h, k, temperature):
    """The class that wins among the k nearest, from the definition."""
    cosines = F.cosine_similarity(bank, h[None])
    votes = collections.Counter()
    for i in cosines.argsort(descending=True)[:k].tolist():
        votes[int(labels[i])] += (cosines[i] / temperature).exp().item()
    return min(votes, key=lambda y: (-round(votes[y], 5), y))


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (10, float("inf"))])
def test_knn_against_a_brute_force_vote(k, temperature):
    (h, y), (test_h, test_y) = blobs(300, seed=2), blobs(50, seed=3)
    hits = sum(vote(h, y, q, k, temperature) == t for q, t in zip(test_h, test_y.tolist()))
    accuracy = linear_eval.knn_accuracy(h, y, test_h, test_y, k, temperature)
    assert accuracy == pytest.approx(2 * hits)


def probe(*flags):
    linear_eval.main([*map(str, flags), "--device", "cpu"])


def test_untrained_floor(folder, capsys):
    probe("--data", folder, "--size", 8)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "48 train and 24 test images of 8 px, 512 features"
    assert [line.split(":")[0] for line in lines[1:]] == ["kNN top-1"] * 2 + [
        "linear top-5",
        "linear top-1",
    ]
    assert lines[3].startswith("linear top-5: 100.00%")  # there are three classes


def test_saved_layer_works_on_raw_features(folder, tmp_path, capsys):
    network, _, _ = build("resnet18", small_stem=True)
    torch.save(network.state_dict(), tmp_path / "network.pth")
    out = tmp_path / "layer.pt"
    probe(tmp_path / "network.pth", "--data", folder, "--size", 8, "--out", out)
    printed = capsys.readouterr().out.splitlines()[-1]
    network.fc = nn.Linear(512, 3)
    network.fc.load_state_dict(torch.load(out, weights_only=True))
    args = linear_eval.parse_args(["--data", str(folder), "--size", "8"])
    images, labels, _ = linear_eval.load_split(args, "test")
    with torch.no_grad():
        top1 = (
            network(
                linear_eval.TF.normalize(images / 255, linear_eval.MEAN, linear_eval.STD)
            ).argmax(1)
            == labels
        )
    assert printed == f"linear top-1: {100 * top1.float().mean():.2f}%"
    with pytest.raises(FileExistsError, match="layer.pt exists: choose another name"):
        probe(tmp_path / "network.pth", "--data", folder, "--out", out)


def test_other_tensors_than_torchvisions_are_named(tmp_path):
    state = build("resnet18")[0].state_dict()
    torch.save(state | {"layer2.0.se.fc1.weight": torch.ones(4, 4)}, tmp_path / "saved.pth")
    with pytest.raises(ValueError, match=r"layer2\.0\.se\.fc1\.weight"):
        linear_eval.load_backbone(tmp_path / "saved.pth")


def test_labels_are_needed(folder):
    with pytest.raises(ValueError, match=r"--data .*red: no train/<class>/.*--data FOLDER"):
        probe("--data", folder / "train" / "red", "--size", 8)


def test_data_and_size_are_those_of_the_training(runs, folder, capsys):
    probe(runs / "simclr" / "checkpoint.pt", "--subset", 20)
    assert "20 train and 20 test images of 8 px" in capsys.readouterr().out
    probe(runs / "simclr" / "checkpoint.pt", "--size", 12)
    assert "test images of 12 px" in capsys.readouterr().out


def test_two_images_are_enough_and_one_is_not(folder, tmp_path, capsys):
    probe("--data", folder, "--size", 8, "--subset", 2)
    assert "linear top-1" in capsys.readouterr().out
    for split, images in (("train", ["0.png"]), ("test", ["0.png", "1.png"])):
        (tmp_path / "few" / split / "red").mkdir(parents=True)
        for name in images:
            shutil.copy(folder / "train" / "red" / name, tmp_path / "few" / split / "red")
    with pytest.raises(ValueError, match="at least two images"):
        probe("--data", tmp_path / "few", "--size", 8)


def test_depths_are_read_off_the_names(tmp_path):
    network = resnet.ResNet(resnet.BasicBlock, [1, 3, 2, 1])
    torch.save(network.state_dict(), tmp_path / "saved.pth")
    backbone, _ = linear_eval.load_backbone(tmp_path / "saved.pth")
    stages = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
    assert [len(stage) for stage in stages] == [1, 3, 2, 1]


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_are_decoded_as_for_the_training(script, split, folder, tmp_path):
    """The same images in the same order with the same labels, whatever the folder holds."""
    root = tmp_path / "images"
    shutil.copytree(folder / "train", root / "train")
    shutil.copytree(folder / "test", root / "val")
    shutil.rmtree(root / "val" / "blue")  # which would have been number 0
    for part in ("train", "val"):
        gray = Image.new("I;16", (20, 20), 30000)
        gray.save(root / part / "red" / "gray.png")
        Image.new("RGBA", (30, 20), (200, 100, 50, 128)).save(root / part / "red" / "clear.png")
        Image.radial_gradient("L").convert("P").save(root / part / "red" / "palette.gif")
        (root / part / ".ipynb_checkpoints").mkdir()
        gray.save(root / part / ".ipynb_checkpoints" / "x.png")
        gray.save(root / part / "red" / "._x.png")
    flags = ["--data", str(root), "--size", "8", "--seed", "3", "--subset", "45"]
    images, labels, names = linear_eval.load_split(linear_eval.parse_args(flags), split)
    others, their_labels = script.load_split(script.parse_args(flags), split)
    assert torch.equal(images, others)
    assert torch.equal(labels, their_labels)
    assert names == ["blue", "green", "red"]
    assert set(labels.tolist()) == ({0, 1, 2} if split == "train" else {1, 2})
    assert any((x == 117).all() for x in images)  # 30000 / 256


def test_above_64_px_more_is_resized_than_is_cut_out(tmp_path):
    """To 8/7 of the size, of which the center remains: 256 and 224 in the literature."""
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        image = Image.new("RGB", (800, 800))
        image.paste((255, 255, 255), (50, 50, 750, 750))  # 7/8 of each side
        image.save(tmp_path / split / "a" / "x.png")
        image.save(tmp_path / split / "a" / "y.png")
    for size, darkest in ((112, 255), (64, 0)):
        flags = ["--data", str(tmp_path), "--size", str(size)]
        images, _, _ = linear_eval.load_split(linear_eval.parse_args(flags), "train")
        assert images.shape == (2, 3, size, size)
        assert images[0, :, 2:-2, 2:-2].min() == darkest


def test_a_class_that_train_lacks_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    shutil.copytree(folder / "test" / "red", tmp_path / "images" / "test" / "zebra")
    with pytest.raises(ValueError, match=r"train/ has no class \['zebra'\]"):
        probe("--data", tmp_path / "images", "--size", 8)


def test_arguments_of_other_software_are_not_taken(folder, tmp_path, capsys):
    network, _, _ = build("resnet18", small_stem=True)
    foreign = {"data": "/nowhere", "size": 224, "method": "moco"}
    torch.save({"model": network.state_dict(), "args": foreign}, tmp_path / "saved.pth")
    assert linear_eval.load_backbone(tmp_path / "saved.pth")[1] == {}
    probe(tmp_path / "saved.pth", "--data", folder)
    assert "test images of 32 px" in capsys.readouterr().out
