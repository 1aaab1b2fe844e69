"""Losses against loops written from the equations, gradients, moving average, kNN, meter."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from conftest import METHODS, NARROW, shrink, vote
from torch import nn
from torchvision import models

import byol
import simclr
import simsiam


class TinyBackbone(nn.Sequential):
    """Stands in for a ResNet: (B, 3, S, S) -> (B, 8)."""

    inplanes = 8

    def __init__(self):
        pool = nn.AdaptiveAvgPool2d(2)
        super().__init__(pool, nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU())


def tiny(method, **options):
    torch.manual_seed(0)
    return method(TinyBackbone(), **NARROW[method.__name__], **options)


def views(count=6):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, count, 3, 8, 8, generator=generator).unbind(0)


def cosine_by_hand(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def test_negative_cosine_against_a_loop():
    p, z = torch.randn(5, 7), torch.randn(5, 7)
    expected = -sum(cosine_by_hand(a, b) for a, b in zip(p.tolist(), z.tolist())) / 5
    assert simsiam.negative_cosine(p, z).item() == pytest.approx(expected, abs=1e-6)


def test_regression_loss_against_a_loop():
    p, z = torch.randn(5, 7), torch.randn(5, 7)
    total = 0.0
    for a, b in zip(p.tolist(), z.tolist()):  # Eq. (2): squared distance of the unit vectors
        norm_a, norm_b = math.hypot(*a), math.hypot(*b)
        total += sum((x / norm_a - y / norm_b) ** 2 for x, y in zip(a, b))
    assert byol.regression_loss(p, z).item() == pytest.approx(total / 5, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_against_a_double_loop(size, temperature):
    z1, z2 = torch.randn(size, 5), torch.randn(size, 5)
    z = [*z1.tolist(), *z2.tolist()]
    total = 0.0
    for i in range(2 * size):  # Eq. (1), summed over both members of each pair
        scores = [math.exp(cosine_by_hand(z[i], z[k]) / temperature) for k in range(2 * size)]
        positive = scores[(i + size) % (2 * size)]
        total -= math.log(positive / sum(s for k, s in enumerate(scores) if k != i))
    loss = simclr.nt_xent(z1, z2, temperature).item()
    assert loss == pytest.approx(total / (2 * size), abs=1e-5)


def test_nt_xent_by_chance_and_at_its_least():
    """What simclr.py's docstring says of B = 512, and the least value at views spread evenly."""
    alike = torch.ones(512, 4)
    assert simclr.nt_xent(alike, alike, 0.5).item() == pytest.approx(math.log(1023), abs=1e-4)
    corners = torch.eye(512) - 1 / 512  # of a simplex: no 512 directions are further apart
    least = math.log(1 + 1022 * math.exp((-1 / 511 - 1) / 0.5))
    assert simclr.nt_xent(corners, corners, 0.5).item() == pytest.approx(least, abs=1e-4)
    for text in (f"{math.log(1023):.1f} for B = 512", f"below {least:.1f}"):
        assert text in simclr.__doc__


def test_nt_xent_stays_float32_under_autocast():
    z1, z2 = torch.randn(16, 32), torch.randn(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = simclr.nt_xent(z1, z2, 0.1)
    torch.testing.assert_close(loss, simclr.nt_xent(z1, z2, 0.1), rtol=1e-6, atol=0)


def test_simsiam_forward_is_eq_4():
    model, (x1, x2) = tiny(simsiam.SimSiam), views()
    loss, p1 = model(x1, x2)
    z = [model.projector(model.backbone(x)) for x in (x1, x2)]
    p = [model.predictor(z) for z in z]
    d12 = -F.cosine_similarity(p[0], z[1].detach()).mean()
    d21 = -F.cosine_similarity(p[1], z[0].detach()).mean()
    torch.testing.assert_close(loss, (d12 + d21) / 2)
    torch.testing.assert_close(p1, p[0])
    expected = torch.autograd.grad((d12 + d21) / 2, [*model.parameters()])
    actual = torch.autograd.grad(loss, [*model.parameters()])
    torch.testing.assert_close(actual, expected)


def test_simsiam_without_stop_grad_has_another_gradient():
    x1, x2 = views()
    gradients = []
    for stop_grad in (True, False):
        model = tiny(simsiam.SimSiam, stop_grad=stop_grad)
        gradients.append(torch.autograd.grad(model(x1, x2)[0], model.backbone[2].weight)[0])
    assert not torch.allclose(*gradients)


def test_byol_sums_both_directions_across_the_views():
    model, (x1, x2) = tiny(byol.BYOL), views()
    with torch.no_grad():
        model.target[0][2].weight.add_(torch.randn(8, 12))  # so that target and online differ
    loss, p1 = model(x1, x2)
    z = [model.projector(model.backbone(x)) for x in (x1, x2)]
    p = [model.predictor(z) for z in z]
    t = [model.target(x) for x in (x1, x2)]
    expected = 4 - 2 * sum(F.cosine_similarity(p[i], t[1 - i]).mean() for i in (0, 1))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(p1, p[0])


def test_byol_target_gets_no_gradient_and_starts_as_a_copy():
    model, (x1, x2) = tiny(byol.BYOL), views()
    online = nn.Sequential(model.backbone, model.projector).state_dict()
    assert all(torch.equal(online[name], t) for name, t in model.target.state_dict().items())
    loss, _ = model(x1, x2)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())
    assert all(p.grad is not None for p in model.backbone.parameters())
    assert model.target.training


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_byol_update_target(rate):
    """The target becomes (1 - rate) target + rate online, weight by weight: Eq. (1)."""
    model = tiny(byol.BYOL)
    with torch.no_grad():
        for p in [*model.backbone.parameters(), *model.projector.parameters()]:
            p.add_(torch.randn_like(p))
    before = copy.deepcopy(model)
    model.update_target(rate)
    online = nn.Sequential(model.backbone, model.projector).parameters()
    for new, old, weight in zip(model.target.parameters(), before.target.parameters(), online):
        torch.testing.assert_close(new, (1 - rate) * old + rate * weight)
    for name in ("backbone", "projector", "predictor"):  # these stay
        parts = zip(getattr(model, name).parameters(), getattr(before, name).parameters())
        assert all(torch.equal(a, b) for a, b in parts)


def test_byol_update_target_refuses_another_number_of_weights():
    model = tiny(byol.BYOL)
    model.projector.append(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="zip"):
        model.update_target(0.1)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_byol_moves_the_target_after_each_step(decay, folder, tmp_path, monkeypatch):
    """By 1 - decay at the start of the training, by 0 at its end: tau rises to 1, Sec. 3.3."""
    steps, rates = [], []
    train_step = byol.train_step

    def spy(network, *args):
        steps.append(len(rates))
        return train_step(network, *args)

    monkeypatch.setattr(byol, "train_step", spy)
    monkeypatch.setattr(byol.BYOL, "update_target", lambda _, rate: rates.append(rate))
    shrink(monkeypatch, byol)
    flags = f"--data {folder} --size 8 --epochs 2 --batch-size 24 --lr 1 --device cpu".split()
    byol.main([*flags, "--ema-decay", str(decay), "--out", str(tmp_path / "run")])
    assert steps == [0, 1, 2, 3]  # once, after each of four steps
    cosine = [(1 + math.cos(math.pi * (step + 0.5) / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx([(1 - decay) * c for c in cosine])


@pytest.mark.parametrize("bf16", [False, True])
def test_train_step_is_one_update_by_the_loss_of_two_views(script, bf16):
    model = tiny(getattr(script, METHODS[script.__name__]))
    twin = copy.deepcopy(model)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    torch.manual_seed(1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    loss, watched = script.train_step(model, sgd, images, bf16)
    torch.manual_seed(1)
    options = {"solarize": 0.2} if script is byol else {}
    x1, x2 = script.augment(images), script.augment(images, **options)
    x1, x2 = script.normalize(x1), script.normalize(x2)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected, p1 = twin(x1, x2)
    assert torch.equal(loss, expected)
    assert torch.equal(watched, p1)
    assert watched.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert not loss.requires_grad
    assert not watched.requires_grad
    expected.backward()
    for new, old in zip(model.parameters(), twin.parameters()):
        step = 0 if old.grad is None else 0.1 * (old.grad + 0.01 * old)
        torch.testing.assert_close(new, old - step)


def test_train_step_forgets_the_last_gradient(script):
    gradients = []
    for steps in (1, 2):
        model = tiny(getattr(script, METHODS[script.__name__]))
        sgd = torch.optim.SGD(model.parameters(), lr=0)
        images = torch.arange(6 * 192).view(6, 3, 8, 8).to(torch.uint8)
        for _ in range(steps):
            torch.manual_seed(1)
            script.train_step(model, sgd, images, False)
        gradients.append(model.projector[0].weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_two_views(script):
    """Of the same images, drawn each on its own; BYOL solarizes some of the second ones."""
    seen = []

    class Network(nn.Linear):
        def forward(self, x1, x2):
            seen.extend([x1, x2])
            return super().forward(x1[:, 0, 0, :1]).sum(), x1

    network = Network(1, 1)
    sgd = torch.optim.SGD(network.parameters(), lr=0)
    white, black = (script.normalize(torch.full((1, 3, 1, 1), level)) for level in (1.0, 0.0))
    images = torch.full((200, 3, 8, 8), 255, dtype=torch.uint8)  # a crop of white is white
    torch.manual_seed(0)
    script.train_step(network, sgd, images, False)
    middle = (white + black) / 2
    dark = [(x < middle).flatten(1).all(1).float().mean().item() for x in seen]
    assert dark[0] == 0
    assert 0.1 < dark[1] < 0.3 if script is byol else dark[1] == 0
    pictures = torch.rand(4, 3, 8, 8).mul(255).to(torch.uint8)
    script.train_step(network, sgd, pictures, False)
    x1, x2 = seen[2:]
    assert (x1 - x2).abs().amax((1, 2, 3)).min() > 0


LOSSES = {
    "SimSiam": simsiam.negative_cosine,
    "BYOL": byol.regression_loss,
    "SimCLR": lambda z1, z2: simclr.nt_xent(z1, z2, 0.5),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_the_losses_against_finite_differences(name, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # the losses' own is float32
    torch.manual_seed(0)
    a = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LOSSES[name], (a, b))


def test_losses_are_float32_of_bfloat16_input():
    torch.manual_seed(0)
    a, b = torch.randn(64, 32).bfloat16(), torch.randn(64, 32).bfloat16()
    for loss in LOSSES.values():
        assert loss(a, b).dtype == torch.float32
        torch.testing.assert_close(loss(a, b), loss(a.float(), b.float()), rtol=1e-6, atol=1e-6)


def test_simsiam_does_not_care_which_view_comes_first_nor_for_scale():
    model, (x1, x2) = tiny(simsiam.SimSiam), views()
    torch.testing.assert_close(model(x1, x2)[0], model(x2, x1)[0])
    torch.manual_seed(0)
    p, z = torch.randn(6, 5), torch.randn(6, 5)
    loss = simsiam.negative_cosine(p, z)
    torch.testing.assert_close(simsiam.negative_cosine(3 * p, 0.2 * z), loss)
    assert not torch.allclose(simsiam.negative_cosine(p + 1, z), loss)


def test_simclr_forward_is_nt_xent_of_the_projections():
    model, (x1, x2) = tiny(simclr.SimCLR, temperature=0.2), views()
    loss, z1 = model(x1, x2)
    z = [model.projector(model.backbone(x)) for x in (x1, x2)]
    torch.testing.assert_close(loss, simclr.nt_xent(*z, 0.2))
    torch.testing.assert_close(z1, z[0])


def layers(head):
    """[(kind, what it is made of), ...] of a projector or predictor."""
    listed = []
    for layer in head:
        kind = type(layer).__name__
        if kind == "Linear":
            bias = "bias" if layer.bias is not None else "no bias"
            listed.append((kind, layer.in_features, layer.out_features, bias))
        elif kind == "BatchNorm1d":
            affine = "affine" if layer.affine else "not affine"
            listed.append((kind, layer.num_features, affine, layer.eps, layer.momentum))
        else:
            listed.append((kind,))
    return listed


def linear(inputs, outputs, bias):
    return "Linear", inputs, outputs, bias


def norm(width, affine="affine"):
    return "BatchNorm1d", width, affine, 1e-5, 0.1


RELU = ("ReLU",)
MLP = [norm(4096), RELU, linear(4096, 256, "no bias")]  # BYOL Sec. 3.3
HEADS = {  # biases as in each method's official code
    "simsiam": {  # App. D, and the authors' simsiam/builder.py
        "projector": [linear(512, 2048, "no bias"), norm(2048), RELU]
        + [linear(2048, 2048, "no bias"), norm(2048, "not affine")],
        "predictor": [linear(2048, 512, "no bias"), norm(512), RELU, linear(512, 2048, "bias")],
    },
    "byol": {
        "projector": [linear(512, 4096, "bias"), *MLP],
        "predictor": [linear(256, 4096, "bias"), *MLP],
    },
    "simclr": {  # dkobak/simclr-cifar10
        "projector": [linear(512, 1024, "bias"), RELU, linear(1024, 128, "no bias")],
    },
}


def test_heads_are_the_recipes(script):
    """Layer by layer; BYOL's target has the projector's."""
    name = script.__name__
    model = getattr(script, METHODS[name])(script.build_backbone("resnet18", 32))
    heads = {part: layers(getattr(model, part)) for part in HEADS[name]}
    assert heads == HEADS[name]
    parts = {"backbone", *heads}
    if name == "byol":
        assert layers(model.target[1]) == HEADS[name]["projector"]
        parts.add("target")
    assert {part for part, _ in model.named_children()} == parts
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"target"} if name == "byol" else set())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_backbone_is_torchvisions(script, arch):
    """Layer by layer, with the eps and momentum of each BatchNorm, but for classifier and stem."""
    expected = models.get_model(arch)
    expected.fc = nn.Identity()
    assert str(script.build_backbone(arch, 96)) == str(expected)
    expected.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    expected.maxpool = nn.Identity()
    assert str(script.build_backbone(arch, 32)) == str(expected)


class Recipe(NamedTuple):
    """Of a run without flags: what the sources use for CIFAR-10."""

    lr: float  # at a batch of 512, before it falls
    weight_decay: float
    own: dict  # of the method
    epochs: int = 100
    batch: int = 512
    size: int = 32
    momentum: float = 0.9


RECIPES = {
    "simsiam": Recipe(0.03 * 512 / 256, 5e-4, {"stop_grad": True}),  # App. D
    # lightly's 0.06 at a batch of 128 with 5e-4 and a constant tau of 0.99, here for a loss four
    # times as large; tau rises to 1 as in Sec. 3.3
    "byol": Recipe(0.06 * 512 / 128 / 4, 4 * 5e-4, {"tau": 0.99}),
    "simclr": Recipe(0.06 * 512 / 256, 5e-4, {"temperature": 0.5}),  # dkobak; App. B.9
}


def test_a_run_without_flags_is_the_recipe(script, tmp_path, monkeypatch):
    """Of 1,100 images: two full steps an epoch. By the sources, not by the code."""
    seen, rates = [], []
    recipe = RECIPES[script.__name__]

    def spy(network, optimizer, x, bf16):
        assert optimizer.state.get("steps", 0) == len(seen)  # momentum is never forgotten
        optimizer.state["steps"] = len(seen) + 1
        seen.append((network, optimizer, dict(optimizer.param_groups[0]), x.shape))
        return torch.zeros(()), torch.eye(4)

    def load(args, split):
        count = 1100 if split == "train" else 0
        return torch.zeros(count, 3, args.size, args.size, dtype=torch.uint8), -torch.ones(count)

    monkeypatch.setattr(script, "load_split", load)
    monkeypatch.setattr(script, "train_step", spy)
    monkeypatch.setattr(script, "save", lambda *_: None)
    if script is byol:
        monkeypatch.setattr(byol.BYOL, "update_target", lambda _, rate: rates.append(rate))
    script.main(["--device", "cpu", "--out", str(tmp_path / "run")])

    network, optimizer, _, _ = seen[0]
    steps = 2 * recipe.epochs
    assert len(seen) == steps
    assert {shape for *_, shape in seen} == {(recipe.batch, 3, recipe.size, recipe.size)}
    assert type(optimizer) is torch.optim.SGD
    groups = [group for _, _, group, _ in seen]
    for group in groups:
        assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.9, False, 0)
        assert group["weight_decay"] == pytest.approx(recipe.weight_decay)
    assert len(optimizer.param_groups) == 1
    trained = {p for p in network.parameters() if p.requires_grad}
    assert trained == {p for p in optimizer.param_groups[0]["params"] if p.requires_grad}
    for step in (0, steps // 2, steps - 1):  # half a cosine, without warm-up
        share = math.cos(math.pi / 2 * (step + 0.5) / steps) ** 2
        assert groups[step]["lr"] == pytest.approx(recipe.lr * share)
        if script is byol:
            assert 1 - rates[step] == pytest.approx(1 - (1 - recipe.own["tau"]) * share)
    for name in recipe.own.keys() - {"tau"}:
        assert getattr(network, name) == recipe.own[name]
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def printed_spread(printed):
    """Of the first epoch's line."""
    line = next(x for x in printed.splitlines() if x.startswith("epoch 1 "))
    return float(line.split("spread ")[1].split()[0])


@pytest.mark.parametrize("kind", ["constant", "healthy"])
def test_the_meter_through_the_real_heads(script, kind, folder, tmp_path, monkeypatch, capsys):
    """A constant network must read 0, at the method's own widths."""

    class Backbone(nn.Linear):
        inplanes = 512

        def __init__(self, *_):
            super().__init__(3 * 64, 512)

        def forward(self, x):
            return super().forward(x.flatten(1) * (kind == "healthy"))

    monkeypatch.setattr(script, "build_backbone", Backbone)
    flags = f"--data {folder} --size 8 --epochs 1 --batch-size 24 --lr 0.01 --device cpu".split()
    script.main([*flags, "--out", str(tmp_path / "run")])
    spread = printed_spread(capsys.readouterr().out)
    assert spread < 1e-3 if kind == "constant" else spread > 0.2


def test_the_meter_sees_predictions_that_point_one_way(folder, tmp_path, monkeypatch, capsys):
    """The projections, centered and scaled by their BatchNorm, cannot all do so."""

    class OneWay(simsiam.SimSiam):
        def __init__(self, backbone, **options):
            super().__init__(backbone, **options)
            nn.init.zeros_(self.predictor[-1].weight)

    monkeypatch.setattr(simsiam, "SimSiam", OneWay)
    shrink(monkeypatch, simsiam)
    flags = f"--data {folder} --size 8 --epochs 1 --batch-size 24 --lr 0 --device cpu".split()
    simsiam.main([*flags, "--out", str(tmp_path / "run")])
    assert printed_spread(capsys.readouterr().out) < 1e-3


@pytest.mark.parametrize(("size", "features"), [(16, 512), (64, 512), (96, 512)])
def test_backbone_stem_follows_the_size(script, size, features):
    backbone = script.build_backbone("resnet18", size).eval()
    first = backbone.relu(backbone.bn1(backbone.conv1(torch.rand(1, 3, size, size))))
    assert backbone.maxpool(first).shape[-1] == (size if size <= 64 else size // 4)
    assert backbone(torch.rand(2, 3, size, size)).shape == (2, features)
    assert all(not block.bn2.weight.any() for block in backbone.layer1)  # zero_init_residual


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.1), (7, 1.0), (500, 0.1)])
def test_knn_against_a_brute_force_vote(script, k, temperature):
    torch.manual_seed(0)
    bank, queries = torch.randn(50, 12) + 0.5, torch.randn(20, 12) + 0.5
    labels, truth = torch.randint(0, 4, (50,)), torch.randint(0, 4, (20,))
    hits = sum(
        vote(bank, labels, query, k, temperature) == y for query, y in zip(queries, truth.tolist())
    )
    accuracy = script.knn_accuracy(bank, labels, queries, truth, k, temperature)
    assert accuracy == pytest.approx(100 * hits / 20)
    assert 0 < accuracy < 100


def test_knn_in_parts_is_knn_at_once_to_the_bit(script, monkeypatch):
    """Of 2,500 queries a thousand at a time, against the way that holds all similarities."""
    torch.manual_seed(0)
    bank, queries = torch.randn(900, 16) + 0.5, torch.randn(2500, 16) + 0.5
    labels, truth = torch.randint(0, 7, (900,)), torch.randint(0, 7, (2500,))
    similarity = F.normalize(queries) @ F.normalize(bank).T
    cosine, nearest = similarity.topk(200)
    votes = torch.zeros(2500, 7).scatter_add_(1, labels[nearest], (cosine / 0.1).exp())
    expected = 100 * (votes.argmax(1) == truth).float().mean().item()
    zeros, rows = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda n, m: rows.append(n) or zeros(n, m))
    assert script.knn_accuracy(bank, labels, queries, truth) == expected
    assert rows == [1000, 1000, 500]


def test_features_are_those_of_the_frozen_network(script):
    """In eval mode, batch by batch, of normalized pictures; the network is left as it was."""
    backbone = TinyBackbone()
    images = torch.randint(0, 256, (230, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        backbone(script.normalize(images / 255))  # moves the statistics
    before = copy.deepcopy(backbone.state_dict())
    features = script.compute_features(backbone, images, "cpu")
    assert not features.requires_grad
    assert backbone.training
    assert all(torch.equal(before[name], t) for name, t in backbone.state_dict().items())
    x = TF.normalize(images / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(features, backbone.eval()(x))


@pytest.mark.parametrize("kind", ["constant", "isotropic", "skewed"])
def test_spread(script, kind):
    torch.manual_seed(0)
    p = torch.ones(2048, 64) if kind == "constant" else torch.randn(2048, 64)
    p = p + 2 if kind == "skewed" else p
    unit = p / p.norm(dim=1, keepdim=True)
    expected = sum(unit[:, d].std().item() for d in range(64)) / 64 * 8
    assert script.spread(p) == pytest.approx(expected, abs=1e-5)
    low, high = {"constant": (0, 1e-6), "isotropic": (0.97, 1.03), "skewed": (0.2, 0.6)}[kind]
    assert low <= script.spread(p) <= high
    assert script.spread(3 * p) == pytest.approx(script.spread(p), abs=1e-6)
    assert script.spread(p.bfloat16()) == pytest.approx(expected, abs=1e-2)
