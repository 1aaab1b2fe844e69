"""The probe: which checkpoints it opens, what it saves, and how good its linear layer is."""

import argparse
import collections
import csv
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import sys
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Small, vote
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.models import resnet

import linear_eval

SHAPES = {}


@pytest.fixture(autouse=True)
def _shapes_once(monkeypatch):
    """The networks that every checkpoint is compared with are made once, not in every test."""
    build = linear_eval.build_backbone

    def cached(arch, small_stem, max_pool):
        if torch.get_default_device().type != "meta":
            return build(arch, small_stem, max_pool)
        if (arch, small_stem) not in SHAPES:
            SHAPES[arch, small_stem] = build(arch, small_stem, max_pool)
        return SHAPES[arch, small_stem]

    monkeypatch.setattr(linear_eval, "build_backbone", cached)


@pytest.fixture(autouse=True)
def _endings_as_they_were(monkeypatch):
    """Where pillow_heif is installed, the probe has torchvision take .heic for images, too."""
    folder = linear_eval.datasets.folder
    monkeypatch.setattr(folder, "IMG_EXTENSIONS", folder.IMG_EXTENSIONS)


def build(arch, small_stem=False):
    """A torchvision network in which all tensors differ, in eval mode, and features of images."""
    torch.manual_seed(0)
    network = models.get_model(arch, num_classes=7)
    if small_stem:
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    network.eval()
    x = torch.rand(2, 3, 32, 32)
    features = nn.Sequential(*list(network.children())[:-1])(x).flatten(1)
    return network, x, features


def prefixed(state, prefix):
    return {prefix + name: t for name, t in state.items()}


def momentum(state):
    """The same network a few steps later."""
    return {name: 1.1 * t if t.is_floating_point() else t for name, t in state.items()}


def numbered(network):
    return nn.Sequential(*list(network.children())[:-1]).state_dict()


def renamed(state, *changes):
    """The state with (pattern, replacement) after one another in its names."""
    for pattern, replacement in changes:
        state = {re.sub(pattern, replacement, name): t for name, t in state.items()}
    return state


def save_padded(content, path):
    """As large as a network, though content is small."""
    torch.save([content, torch.ones(2**18)], path)


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
    "a tuple": lambda n, s: (3, s),
    "a list in a dictionary": lambda n, s: {"models": [s]},
    "shortcut": lambda n, s: renamed(s, ("downsample", "shortcut")),
    "shortcut in a numbered list": lambda n, s: {
        "net": renamed(numbered(n), ("downsample", "shortcut"), (r"^(\d)", r"encoder.0.\1"))
    },
    "a stem of its own": lambda n, s: prefixed(
        renamed(s, (r"^(conv1|bn1)", r"stem.\1"), ("^layer(.)", r"stages.\1.blocks")), "module."
    ),
    "layer0": lambda n, s: renamed(s, (r"^conv1", "layer0.0"), (r"^bn1", "layer0.1")),
    "no torchvision name but weight and bias": lambda n, s: {
        "a": {"b": renamed(s, (r"conv", "c"), ("bn", "norm"), ("layer", "res"))}
    },
    "a head in front": lambda n, s: {"net": {"prototypes.weight": s["fc.weight"], **s}},
    "profiled": lambda n, s: profiled(s),
    "old, no batch counters": lambda n, s: {k: t for k, t in s.items() if "num_batches" not in k},
    "sorted": lambda n, s: dict(sorted(s.items())),
    "backwards, in a wrapper": lambda n, s: {
        "state_dict": dict(reversed(prefixed(s, "module.").items())) | {"queue": s["fc.weight"]}
    },
    "sorted, two networks": lambda n, s: dict(
        sorted((prefixed(momentum(s), "ema_model.") | prefixed(s, "zmodel.backbone.")).items())
    ),
    "by name, though equal layers have changed places": lambda n, s: {
        name: s[name]
        for name in renamed(
            s, (r"1\.0\.conv1", "1.0.x"), (r"1\.0\.conv2", "1.0.conv1"), ("1.0.x", "1.0.conv2")
        )
    },
    "half precision": lambda n, s: {
        k: t.half() if t.is_floating_point() else t for k, t in s.items()
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_key_layouts(layout, tmp_path):
    network, x, features = build("resnet18")
    torch.save(LAYOUTS[layout](network, network.state_dict()), tmp_path / "saved.pth")
    backbone, _, trained = linear_eval.load_backbone(tmp_path / "saved.pth")
    tolerance = 0.02 if layout == "half precision" else 1e-5
    torch.testing.assert_close(backbone.eval()(x), features, rtol=tolerance, atol=tolerance)
    assert trained == {}


@pytest.mark.parametrize(
    ("arch", "small_stem"),
    [("resnet18", True), ("resnet34", False), ("resnet50", False), ("resnet50", True)]
    + [("wide_resnet50_2", False), ("resnext50_32x4d", False)],
)
def test_architectures(arch, small_stem, tmp_path):
    network, x, features = build(arch, small_stem)
    torch.save(network.state_dict(), tmp_path / "saved.pth")
    backbone, _, _ = linear_eval.load_backbone(tmp_path / "saved.pth")
    torch.testing.assert_close(backbone.eval()(x), features)


NO_RESNETS = {
    "no tensor": {"epoch": 3},
    "list": [torch.ones(3)],
    "ViT": models.VisionTransformer(32, 16, 1, 2, 16, 32).state_dict(),
    "SqueezeNet": models.squeezenet1_1().state_dict(),
    "no norms": models.resnet18(norm_layer=nn.Identity).state_dict(),
    "depths": resnet.ResNet(resnet.BasicBlock, [1, 3, 2, 1]).state_dict(),
    "deeper": resnet.ResNet(resnet.BasicBlock, [2, 2, 2, 3]).state_dict(),
    "gray": {"conv1.weight": torch.ones(64, 1, 7, 7)},
    "5x5": {"conv1.weight": torch.ones(64, 3, 5, 5)},
}


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("kind", NO_RESNETS)
def test_what_is_no_resnet_is_refused(kind, in_order, tmp_path):
    """By the names and shapes that it begins with; how it was saved is not doubted."""
    state = NO_RESNETS[kind]
    if not in_order and isinstance(state, dict):
        state = dict(sorted(state.items()))
    torch.save(state, tmp_path / "saved.pth")
    with pytest.raises(SystemExit) as end:
        linear_eval.load_backbone(tmp_path / "saved.pth")
    tensors = linear_eval.find_tensors(state)
    sentence = f"saved.pth: no torchvision ResNet in {len(tensors)} tensors "
    first = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()]
    assert str(end.value).endswith(f"{sentence}[{', '.join(first[:3])}]")
    if kind == "ViT" and in_order:
        assert "tensors [class_token (1, 1, 16), conv_proj.weight (16, 3, 16, 16), " in str(
            end.value
        )


@pytest.mark.parametrize(
    ("where", "sentence"), [("", "is a folder: name a file in it"), ("none.pt", "there is no file")]
)
def test_a_folder_and_no_file_are_called_so(where, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence) as end:
        linear_eval.load_backbone(tmp_path / where)
    assert str(tmp_path / where) in str(end.value)


def foreign(kind, path):
    """What other software writes."""
    starts = {
        "HDF5": b"\x89HDF\r\n",
        "ONNX": b"\x08\x07\x12\x07pytorch",
        "web page": b"<!DOCTYPE html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1",
        "nothing": b"",
    }
    if kind in starts:
        path.write_bytes(starts[kind] + bytes(0 if kind == "nothing" else 9000))
    elif kind == "npz":
        np.savez(path, **{"conv1.weight": np.ones((64, 3, 7, 7))})
        path.with_name("saved.pth.npz").rename(path)
    else:
        path.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": np.ones((64, 3, 7, 7))}}))


FOREIGN = ["HDF5", "ONNX", "web page", "pointer", "nothing", "npz", "detectron2"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_torch_did_not_write_is_not_its_file(kind, tmp_path):
    path = tmp_path / "saved.pth"
    foreign(kind, path)
    start = re.escape(str(path.read_bytes()[:30]))
    sentence = rf"saved\.pth: nothing that torch\.save wrote; it begins with {start}$"
    with pytest.raises(SystemExit, match=sentence):
        linear_eval.load_backbone(path)


def test_an_old_torch_is_not_the_files_fault(tmp_path, monkeypatch):
    torch.save(build("resnet18")[0].state_dict(), tmp_path / "saved.pth")
    monkeypatch.delattr(torch.serialization, "get_unsafe_globals_in_checkpoint")
    with pytest.raises(AttributeError, match="get_unsafe_globals_in_checkpoint"):
        linear_eval.load_backbone(tmp_path / "saved.pth")


def write_safetensors(state, path):
    """By hand: the length of a header, the header in JSON, the numbers."""
    header, chunks, end = {}, [], 0
    for name, tensor in sorted(state.items()):
        chunk = tensor.numpy().tobytes()
        kind = "F32" if tensor.is_floating_point() else "I64"
        place = [end, end + len(chunk)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": place}
        chunks.append(chunk)
        end += len(chunk)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def test_safetensors_are_opened_or_the_package_is_named(tmp_path, monkeypatch):
    network, x, features = build("resnet18")
    path = tmp_path / "model.safetensors"
    write_safetensors(network.state_dict(), path)
    if importlib.util.find_spec("safetensors"):
        backbone, place, _ = linear_eval.load_backbone(path)
        assert place == "conv1.weight"
        torch.testing.assert_close(backbone.eval()(x), features)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(
            SystemExit, match="model.safetensors does not open: .*not fully covered"
        ):
            linear_eval.load_backbone(path)
    monkeypatch.setattr(linear_eval, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"model\.safetensors: .*pip install safetensors"):
        linear_eval.load_backbone(path)


def unopened(name, tmp_path):
    """What torch or Python cannot open in the safe way, and what torch says of it."""
    path = tmp_path / "saved.pth"
    network, _, _ = build("resnet18")
    state = network.state_dict()
    if name == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5_000_000])
        return "."
    if name == "truncated, of an older torch":
        torch.save(state, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:5_000_000])
        return "."
    if name == "TorchScript":
        torch.jit.save(torch.jit.script(network), path)
        return "torchscript"
    if name == "protocol 4":
        torch.save(state, path, pickle_protocol=4)
        return "Unsupported operand 149"
    if name == "a defaultdict":
        torch.save({"counts": collections.defaultdict(int, a=1), "state_dict": state}, path)
        return r"StandIn.*unsafe: .*'collections.defaultdict'"
    torch.save({"args": argparse.Namespace(), "state_dict": state}, path, **OLD)
    return "argparse.Namespace"


OLD = {"_use_new_zipfile_serialization": False}
UNOPENED = ["truncated", "truncated, of an older torch", "TorchScript"]
UNOPENED += ["protocol 4", "a defaultdict", "an object, of an older torch"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*torch.jit")
@pytest.mark.parametrize("name", UNOPENED)
def test_what_does_not_open_is_said_in_one_true_sentence(name, tmp_path):
    """With torch's own reason and the way out, and without advice to open it unsafely."""
    reason = unopened(name, tmp_path)
    path = tmp_path / "saved.pth"
    with pytest.raises(SystemExit) as end:
        linear_eval.load_backbone(path)
    sentence = end.value.code
    assert re.match(rf"{path} does not open: .*{reason}.*Save a state_dict\(\) alone$", sentence)
    assert "weights_only" not in sentence or "Cannot use" in sentence
    assert "weights_only=False" not in sentence
    assert "add_safe_globals" not in sentence
    assert len(sentence) < 400


@pytest.mark.parametrize(
    ("kind", "hidden"),
    [
        ("a whole module", "torch.nn.modules.activation.ReLU"),
        ("NumPy arrays", "numpy.dtype"),
        ("a module beside tensors", "torch.nn.modules.activation.ReLU"),
    ],
)
def test_what_a_stand_in_hides_is_told_the_way_out(kind, hidden, tmp_path):
    network, _, _ = build("resnet18")
    saved = {
        "a whole module": network,
        "NumPy arrays": {name: t.numpy() for name, t in network.state_dict().items()},
        "a module beside tensors": {"model": network, "momentum": torch.ones(3)},
    }[kind]
    torch.save(saved, tmp_path / "saved.pth")
    with pytest.raises(SystemExit) as end:
        linear_eval.load_backbone(tmp_path / "saved.pth")
    sentence = str(end.value)
    assert "if it is in what torch does not read, [" in sentence
    assert hidden in sentence
    assert sentence.endswith("save a state_dict()")
    assert len(sentence) < 500


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(number, tmp_path):
    state = build("resnet18")[0].state_dict()
    state["layer3.0.conv1.weight"][0, 0] = number
    torch.save(state, tmp_path / "saved.pth")
    with pytest.raises(SystemExit, match=r"not all the numbers from conv1\.weight on are finite"):
        linear_eval.load_backbone(tmp_path / "saved.pth")


def without(network, *kinds):
    """Numbered, after these modules between bn1 and layer1 were taken out; their features."""
    keep = [m for m in network.children() if not isinstance(m, (*kinds, nn.Linear))]
    return nn.Sequential(*keep)


@pytest.mark.parametrize("small_stem", [True, False])
@pytest.mark.parametrize(
    ("kinds", "line"),
    [
        ((), "ReLU True, max-pool {}"),
        ((nn.MaxPool2d, nn.Identity), "ReLU True, max-pool False"),
        ((nn.ReLU, nn.MaxPool2d, nn.Identity), "ReLU False, max-pool False"),
    ],
    ids=["both", "no pool", "none"],
)
def test_the_numbers_of_a_sequential_tell_what_stands_between(
    kinds, line, small_stem, tmp_path, capsys
):
    network, x, _ = build("resnet18", small_stem)
    numbered_network = without(network, *kinds)
    save_padded({"backbone": prefixed(numbered_network.state_dict(), "f.")}, tmp_path / "saved.pth")
    backbone, _, _ = linear_eval.load_backbone(tmp_path / "saved.pth")
    assert line.format(not small_stem) in capsys.readouterr().out
    features = numbered_network.eval()(x).flatten(1)
    torch.testing.assert_close(backbone.eval()(x), features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["layer2.1.conv2.weight", "bn1.running_var", "layer3.0.bn1.bias"])
@pytest.mark.parametrize("missing", [True, False])
def test_a_missing_or_misshapen_tensor_is_no_resnet(name, missing, tmp_path):
    state = build("resnet18")[0].state_dict()
    if missing:
        del state[name]
    else:
        state[name] = state[name][:5]
    torch.save(prefixed(state, "encoder."), tmp_path / "saved.pth")
    with pytest.raises(SystemExit, match=r"saved\.pth: no torchvision ResNet"):
        linear_eval.load_backbone(tmp_path / "saved.pth")


class PreActivation(nn.Module):
    """A block of He et al. 2016b: BatchNorm and ReLU before each convolution."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))


@pytest.mark.parametrize("own_stem", [False, True])
def test_a_pre_activation_resnet_is_refused(own_stem, tmp_path):
    """Up to its second stage it has the very shapes of a ResNet-18."""
    layers = {"conv1": nn.Conv2d(3, 64, 3, 1, 1, bias=False)}
    if own_stem:
        layers["bn1"] = nn.BatchNorm2d(64)
    width = 64
    for i, outputs in enumerate((64, 128, 256, 512), 1):
        blocks = PreActivation(width, outputs, 2), PreActivation(outputs, outputs, 1)
        layers[f"layer{i}"], width = nn.Sequential(*blocks), outputs
    layers["bn"] = nn.BatchNorm2d(512)
    torch.save(nn.ModuleDict(layers).state_dict(), tmp_path / "saved.pth")
    with pytest.raises(SystemExit, match="no torchvision ResNet"):
        linear_eval.load_backbone(tmp_path / "saved.pth")


def test_weights_beside_those_of_swa_and_of_the_start(tmp_path, capsys):
    state = build("resnet18")[0].state_dict()
    for copy in ("swa_model", "init", "ema"):
        both = {copy: momentum(state), "model": prefixed(state, "module.")}
        torch.save(both, tmp_path / "saved.pth")
        linear_eval.load_backbone(tmp_path / "saved.pth")
        assert "resnet18: model.module.conv1.weight and on, " in capsys.readouterr().out


def test_foreign_names_in_another_order_are_refused(tmp_path):
    """A bias has the shape of its weight: by shapes alone the two would change places."""
    state = renamed(build("resnet18")[0].state_dict(), ("downsample", "shortcut"))
    order = list(state)
    for i, name in enumerate(order):
        if name.endswith("bias") and name != "fc.bias":
            order[i - 1], order[i] = order[i], order[i - 1]
    torch.save({name: state[name] for name in order}, tmp_path / "saved.pth")
    with pytest.raises(SystemExit, match="no torchvision ResNet"):
        linear_eval.load_backbone(tmp_path / "saved.pth")


Unknown = type("Unknown", (), {"__module__": "library_of_theirs"})  # not installed


def extras():
    unknown = Unknown()
    unknown.state = {"a": [1, 2]}
    return {
        "numpy scalar": np.float64(0.9),
        "numpy array": np.ones(3),
        "Path": Path("runs"),
        "Namespace": argparse.Namespace(lr=0.1, out=Path("x")),
        "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)]), 3),
        "enum": {"state": signal.SIGTERM},
        "unknown": unknown,
    }


@pytest.mark.parametrize("extra", extras())
def test_objects_beside_the_weights_do_no_harm(extra, tmp_path, monkeypatch):
    library = types.SimpleNamespace(Unknown=Unknown)
    monkeypatch.setitem(sys.modules, "library_of_theirs", library)
    network, x, features = build("resnet18")
    saved = {"args": extras()[extra], "state_dict": network.state_dict()}
    torch.save(saved, tmp_path / "saved.pth")
    monkeypatch.delitem(sys.modules, "library_of_theirs")
    backbone, _, trained = linear_eval.load_backbone(tmp_path / "saved.pth")
    torch.testing.assert_close(backbone.eval()(x), features, rtol=1e-5, atol=1e-5)
    assert trained == {}


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, exec, open])
def test_what_runs_code_never_runs(function, zipped, tmp_path):
    """It is refused, or a stand-in takes its place."""
    harm = tmp_path / "harm"
    argument = {os.system: f"touch {harm}", os.mkdir: str(harm), open: str(harm)}
    code = f"__import__('os').mkdir({str(harm)!r})"
    extra = Call(function, argument.get(function, code), *(["w"] if function is open else []))
    state = {"extra": extra, "state_dict": build("resnet18")[0].state_dict()}
    torch.save(state, tmp_path / "saved.pth", _use_new_zipfile_serialization=zipped)
    if not zipped or function in (os.system, os.mkdir):
        with pytest.raises(SystemExit, match=rf"{function.__name__}.*Save a state"):
            linear_eval.load_backbone(tmp_path / "saved.pth")
    else:
        linear_eval.load_backbone(tmp_path / "saved.pth")
    assert not harm.exists()


def test_what_is_taken_is_said_and_prefix_takes_another(folder, tmp_path, capsys):
    network, x, features = build("resnet18", small_stem=True)
    state = network.state_dict()
    both = {
        "teacher": prefixed(momentum(state), "module.backbone."),
        "student": prefixed(state, "module.backbone."),
    }
    torch.save(both, tmp_path / "saved.pth")
    backbone, _, _ = linear_eval.load_backbone(tmp_path / "saved.pth")
    torch.testing.assert_close(backbone.eval()(x), features)
    place = "student.module.backbone.conv1.weight"
    line = f"resnet18: {place} and on, run with ReLU True, max-pool False\n"
    printed = capsys.readouterr().out
    assert printed.startswith(line + "beside it, not run: fc\n")
    other = "teacher.module.backbone.conv1.weight"
    assert printed.endswith(f"networks there, to choose by --prefix: {other}, {place}\n")
    place = "teacher"
    teacher, _, _ = linear_eval.load_backbone(tmp_path / "saved.pth", place)
    assert torch.equal(teacher.bn1.bias, 1.1 * state["bn1.bias"])
    capsys.readouterr()
    probe(tmp_path / "saved.pth", "--prefix", place, "--data", folder, "--size", 8)
    assert capsys.readouterr().out.startswith("resnet18: teacher.module.backbone.conv1.weight")
    has = r"teacher\.module\.backbone\.conv1\.weight, student\.module\.backbone\.conv1\.weight"
    with pytest.raises(SystemExit, match=rf"--prefix ema: .* has {has}"):
        probe(tmp_path / "saved.pth", "--prefix", "ema", "--data", folder)


def test_a_network_at_the_top_is_named_so(tmp_path, capsys):
    torch.save(build("resnet50")[0].state_dict(), tmp_path / "saved.pth")
    linear_eval.load_backbone(tmp_path / "saved.pth")
    line = "resnet50: conv1.weight and on, run with ReLU True, max-pool True\n"
    assert capsys.readouterr().out.startswith(line)


@pytest.mark.parametrize(("small_stem", "flag"), [(True, "--max-pool"), (False, "--no-max-pool")])
def test_max_pool_other_than_usual(small_stem, flag, folder, tmp_path, capsys):
    network, x, usual = build("resnet18", small_stem)
    network.maxpool = nn.MaxPool2d(3, 2, 1) if small_stem else nn.Identity()
    torch.save(network.state_dict(), tmp_path / "saved.pth")
    network.fc = nn.Identity()
    backbone, _, _ = linear_eval.load_backbone(tmp_path / "saved.pth", max_pool=small_stem)
    torch.testing.assert_close(backbone.eval()(x), network(x))
    assert not torch.allclose(backbone(x), usual, rtol=0.1)
    capsys.readouterr()
    probe(tmp_path / "saved.pth", "--data", folder, "--size", 8, flag)
    line = f"ReLU True, max-pool {small_stem}"
    assert line in capsys.readouterr().out


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


def test_the_features_of_a_collapsed_network_are_fitted_too():
    """All on one line, where rounding makes a covariance in float32 indefinite."""
    torch.manual_seed(0)
    h = 5 * torch.rand(512) + 0.01 * torch.randn(1000, 1)
    y = torch.arange(1000) % 2
    layer, _ = linear_eval.linear_probe(h, y)
    assert layer.weight.isfinite().all()
    chosen = layer(h).argmax(1)
    assert (chosen == y).float().mean() < 0.6  # nothing to be found


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


def test_the_units_save_steps_and_do_not_move_the_minimum(monkeypatch):
    """As against those of uncorrelated features."""
    torch.manual_seed(0)
    y = torch.arange(3000) % 5
    h = 0.3 * torch.randn(5, 64)[y] + torch.randn(3000, 64)
    rotation, _ = torch.linalg.qr(torch.randn(64, 64))
    h = h * torch.logspace(0, -2, 64) @ rotation
    h = (h - h.mean(0)) / h.std(0)
    losses, steps = [], []
    entropy = F.cross_entropy

    def counted(*args):
        steps[-1] += 1
        return entropy(*args)

    monkeypatch.setattr(F, "cross_entropy", counted)
    for covariance in (h.T @ h / len(h), torch.eye(64)):
        steps.append(0)
        layer = nn.Linear(64, 5)
        linear_eval.fit(layer, h, y, 1e-4, covariance.double())
        losses.append(entropy(layer(h), y) + 1e-4 / 2 * layer.weight.square().sum())
    torch.testing.assert_close(*losses, rtol=0, atol=1e-3)
    assert steps[0] < steps[1] / 2


def test_weight_decay_is_chosen_on_what_is_held_out():
    """Labels that have nothing to do with the features: the strongest is the best."""
    torch.manual_seed(0)
    h, y = torch.randn(600, 200), torch.arange(600) % 2
    h[:, 0] += 2 * y  # but for one
    assert linear_eval.linear_probe(h, y)[1] >= 1e-2


def probe(*flags):
    linear_eval.main([*map(str, flags), "--device", "cpu"])


@pytest.mark.parametrize("size", [8, 72])
def test_untrained_floor(size, folder, tmp_path, capsys):
    """As torchvision builds it: with zero_init_residual its blocks would add nothing."""
    probe("--data", folder, "--size", size, "--seed", 3, "--features", tmp_path / "f.pt")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"no checkpoint: an untrained ResNet-18 for images of {size} px"
    assert "mean=(0.485, 0.456, 0.406)" in lines[1]
    sizes = f"resized to {size} px, cut to {size} px"  # as the scripts do
    assert lines[2] == f"train: 48 images, {sizes}, 512 features"
    assert lines[3] == f"test: 24 images, {sizes}, 512 features"
    expected = ["kNN top-1"] * 2 + ["linear top-1"]
    assert [line.split(":")[0] for line in lines[4:]] == expected
    assert lines[4].endswith("(k=48, temperature 0.1)")
    assert lines[5].endswith("(k=10, temperature inf)")
    torch.manual_seed(3)
    network = models.resnet18()
    network.fc = nn.Identity()
    if size <= 64:
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    saved = torch.load(tmp_path / "f.pt")["test"]
    x = torch.stack([linear_eval.load_picture(Path(path), size, size) for path in saved["paths"]])
    x = linear_eval.TF.normalize(x / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), saved["features"], rtol=1e-4, atol=1e-4)


def test_printed_accuracy_is_that_of_the_saved_features(mislabeled, tmp_path, monkeypatch, capsys):
    """They are the network's; a layer fitted to them is as good as it is said to be."""
    asked, knn_accuracy = [], linear_eval.knn_accuracy
    spy = lambda *args: asked.append(args[4:]) or knn_accuracy(*args)  # noqa: E731
    monkeypatch.setattr(linear_eval, "knn_accuracy", spy)
    network, _, _ = build("resnet18", small_stem=True)
    torch.save(network.state_dict(), tmp_path / "network.pth")
    out = tmp_path / "new" / "features.pt"
    inputs = ["--mean", 0.1, 0.2, 0.3, "--std", 0.9, 1, 1.1]
    probe(tmp_path / "network.pth", "--data", mislabeled, "--size", 8, "--features", out, *inputs)
    printed = capsys.readouterr().out
    assert "mean=[0.1, 0.2, 0.3], std=[0.9, 1.0, 1.1]" in printed
    saved = torch.load(out)
    network.fc = nn.Identity()
    for split, count in (("train", 48), ("test", 24)):
        assert [*saved[split]] == ["features", "labels", "paths"]
        assert len(saved[split]["features"]) == len(saved[split]["paths"]) == count
        for _, y, path in zip(*saved[split].values()):
            assert Path(path).parent == mislabeled / split / ["blue", "green", "red"][y]
        x = [linear_eval.load_picture(Path(path), 8, 8) / 255 for path in saved[split]["paths"]]
        mean = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
        x = (torch.stack(x) - mean) / torch.tensor([0.9, 1, 1.1])[:, None, None]
        with torch.no_grad():
            torch.testing.assert_close(network(x), saved[split]["features"], rtol=1e-4, atol=1e-4)
    assert asked == [(200, 0.1), (10, torch.inf)]  # as lightly and MoCo; as dkobak
    h, y, _ = saved["train"].values()
    test_h, test_y, _ = saved["test"].values()
    torch.manual_seed(0)
    linear_eval.build_backbone("resnet18", True, False)  # no draws but its weights' come before
    layer, _ = linear_eval.linear_probe(h, y)
    top1 = (layer(test_h).argmax(1) == test_y).float().mean()
    for k, temperature in ((200, 0.1), (10, torch.inf)):
        chosen = torch.tensor([vote(h, y, query, k, temperature) for query in test_h])
        knn = 100 * (chosen == test_y).float().mean()
        assert f"kNN top-1: {knn:.2f}% (k={min(k, 48)}, temperature {temperature})" in printed
    assert f"linear top-1: {100 * top1:.2f}% (weight decay " in printed
    before = out.read_bytes()
    with pytest.raises(SystemExit, match=r"features\.pt exists: choose another name"):
        probe(tmp_path / "network.pth", "--data", mislabeled, "--features", out)
    assert out.read_bytes() == before


def test_without_labels_there_are_features_and_no_accuracy(folder, tmp_path, capsys):
    flat = tmp_path / "photos"
    shutil.copytree(folder / "train" / "red", flat / "summer" / "red")
    shutil.copy(folder / "train" / "blue" / "0.png", flat)
    shutil.copy(folder / "train" / "blue" / "0.png", flat / "again.png")
    probe("--data", flat, "--size", 8, "--features", tmp_path / "f.pt")
    printed = capsys.readouterr().out
    assert "train: 18 images, resized to 8 px, cut to 8 px, 512 features\n" in printed
    end = f"features of 18 images in {tmp_path / 'f.pt'}; no labels, so no accuracy\n"
    assert printed.endswith(end)
    saved = torch.load(tmp_path / "f.pt")["train"]
    assert saved["labels"].tolist() == [-1] * 18
    assert sorted(saved["paths"]) == sorted(str(path) for path in flat.rglob("*.png"))
    h = F.normalize(saved["features"])
    i, j = (saved["paths"].index(str(flat / name)) for name in ("0.png", "again.png"))
    assert (h @ h.T).fill_diagonal_(-1)[i].argmax() == j


@pytest.mark.parametrize(
    ("train", "test", "why"), [("ab", "", "no test images"), ("a", "a", "one class")]
)
def test_without_classes_or_test_images_there_is_no_accuracy(
    train, test, why, folder, tmp_path, capsys
):
    for split, names in (("train", train), ("test", test)):
        for name in names:
            shutil.copytree(folder / "train" / "red", tmp_path / "x" / split / name)
    probe("--data", tmp_path / "x", "--size", 8, "--features", tmp_path / "f.pt")
    assert capsys.readouterr().out.endswith(f"f.pt; {why}, so no accuracy\n")


def test_where_nothing_is_to_be_had_nothing_is_read(folder, capsys):
    """Neither accuracy nor a file: that is said before ten thousand photos are read."""
    with pytest.raises(SystemExit, match="no accuracy without .*--features FILE"):
        probe("--data", folder / "train" / "red", "--size", 8)
    assert "features" not in capsys.readouterr().out.partition("Namespace")[2].partition("\n")[2]


def test_images_are_decoded_a_batch_at_a_time_and_let_go(monkeypatch):
    """Of 350 images at most two batches of 100 are held at any time."""
    alive, most, load = [], [], linear_eval.load_picture

    def watched(source, size, resize):
        image = load(source, size, resize)
        alive.append(weakref.ref(image))
        most.append(sum(x() is not None for x in alive))
        return image

    items = [(Image.new("L", (8, 8), i % 256), -1) for i in range(350)]
    monkeypatch.setattr(linear_eval, "load_picture", watched)
    args = linear_eval.parse_args(["--data", "x", "--size", "8", "--device", "cpu"])
    args.resize = 8
    backbone = Small()
    h = linear_eval.extract_features(backbone, args, "train", items)[0]["features"]
    assert max(most) <= 200
    order = torch.randperm(350, generator=torch.Generator().manual_seed(0)).tolist()
    x = torch.stack([load(items[i][0], 8, 8) for i in order]) / 255
    x = linear_eval.TF.normalize(x, args.mean, args.std)
    torch.testing.assert_close(h, backbone(x), rtol=1e-4, atol=1e-4)


def test_other_tensors_than_torchvisions_are_refused(tmp_path):
    state = build("resnet18")[0].state_dict()
    for block in ("layer2.0", "layer4.1"):
        names = [*state]
        last = max(i for i, name in enumerate(names) if name.startswith(block))
        names.insert(last + 1, f"{block}.se.weight")
        for order in (names, sorted(names)):
            other = {name: state.get(name, torch.ones(4, 4)) for name in order}
            torch.save(other, tmp_path / "saved.pth")
            with pytest.raises(SystemExit, match="no torchvision ResNet"):
                linear_eval.load_backbone(tmp_path / "saved.pth")


def test_data_and_size_are_those_of_the_training(runs, folder, capsys):
    probe(runs / "simclr" / "checkpoint.pt", "--subset", 20)
    assert "train: 20 images, resized to 8 px, cut to 8 px, " in capsys.readouterr().out
    probe(runs / "simclr" / "checkpoint.pt", "--size", 12)
    assert "test: 24 images, resized to 12 px, cut to 12 px, " in capsys.readouterr().out


def test_few_images_are_enough(folder, capsys):
    probe("--data", folder, "--size", 8, "--subset", 2)
    assert "linear top-1" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_are_decoded_as_for_the_training(script, split, folder, tmp_path):
    """The same images in the same order with the same labels, whatever the folder holds."""
    root = tmp_path / "images"
    shutil.copytree(folder / "train", root / "train")
    shutil.copytree(folder / "test", root / "test")
    shutil.rmtree(root / "test" / "blue")  # which would have been number 0
    for part in ("train", "test"):
        gray = Image.new("L", (20, 20), 117)
        gray.save(root / part / "red" / "gray.png")
        Image.new("RGBA", (30, 20), (200, 100, 50, 128)).save(root / part / "red" / "clear.png")
        Image.radial_gradient("L").convert("P").save(root / part / "red" / "palette.png")
        turned = Image.Exif()
        turned[0x0112] = 6
        Image.radial_gradient("L").crop((0, 0, 256, 99)).save(
            root / part / "red" / "turned.jpg", exif=turned
        )
        (root / part / ".ipynb_checkpoints").mkdir()
        gray.save(root / part / ".ipynb_checkpoints" / "x.png")
        gray.save(root / part / "red" / "._x.png")
    flags = ["--data", str(root), "--size", "8", "--seed", "3", "--subset", "45"]
    flags += ["--device", "cpu"]
    args = linear_eval.parse_args(flags)
    args.resize = 8
    listed = linear_eval.list_images(args, split)
    saved, _ = linear_eval.extract_features(Small().eval(), args, split, listed)
    images = torch.stack([linear_eval.load_picture(Path(path), 8, 8) for path in saved["paths"]])
    others, their_labels = script.load_split(script.parse_args(flags), split)
    assert torch.equal(images, others)
    assert torch.equal(saved["labels"], their_labels)
    assert set(their_labels.tolist()) == ({0, 1, 2} if split == "train" else {1, 2})
    assert any((x == 117).all() for x in images)


def test_the_middle_of_the_resized_picture_is_cut_out():
    image = Image.new("RGB", (800, 800))
    image.paste((255, 255, 255), (50, 50, 750, 750))  # 7/8 of each side
    for resize, darkest in ((128, 255), (112, 0)):
        pixels = linear_eval.load_picture(image, 112, resize)
        assert pixels.shape == (3, 112, 112)
        assert pixels[:, 2:-2, 2:-2].min() == darkest


@pytest.mark.parametrize(("size", "resize"), [(64, 64), (112, 128)])
def test_a_network_from_elsewhere_sees_the_middle_of_a_larger_picture(
    size, resize, folder, tmp_path, capsys
):
    """Above 64 px 8/7 of the size, 256 for 224, as in the literature."""
    torch.save(build("resnet18")[0].state_dict(), tmp_path / "saved.pth")
    probe(tmp_path / "saved.pth", "--data", folder, "--size", size, "--subset", 6)
    assert f"resized to {resize} px, cut to {size} px, " in capsys.readouterr().out


@pytest.mark.parametrize("size", [24, 72])
def test_the_scripts_network_sees_what_the_script_has_seen(size, folder, tmp_path, capsys):
    """kNN of the log and of the probe are of the same pictures, above 64 px too."""
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    for path in sorted(data.rglob("*.png"))[::2]:  # large photos, which others decode small
        with Image.open(path) as picture:
            large = picture.resize((480, 400))
        large.save(path.with_suffix(".jpg"))
        path.unlink()
    run = tmp_path / "run"
    flags = f"--data {data} --size {size} --epochs 1 --batch-size 24 --lr 0.1 --device cpu"
    importlib.import_module("simclr").main([*flags.split(), "--out", str(run)])
    [row] = csv.DictReader((run / "log.csv").read_text().splitlines())
    capsys.readouterr()
    probe(run / "checkpoint.pt", "--features", tmp_path / "f.pt")
    assert f"resized to {size} px, cut to {size} px, " in capsys.readouterr().out
    saved = torch.load(tmp_path / "f.pt")
    script = importlib.import_module("simclr")
    args = script.parse_args(["--data", str(data), "--size", str(size)])
    images, labels = script.load_split(args, "train")
    backbone = script.build_backbone("resnet18", size)
    backbone.load_state_dict(torch.load(run / "checkpoint.pt")["backbone"])
    h = script.compute_features(backbone, images, "cpu")
    torch.testing.assert_close(saved["train"]["features"], h, rtol=1e-4, atol=1e-5)
    assert torch.equal(saved["train"]["labels"], labels)
    bank, queries = saved["train"], saved["test"]
    knn = linear_eval.knn_accuracy(
        bank["features"], bank["labels"], queries["features"], queries["labels"]
    )
    assert f"{knn:.2f}" == row["kNN"]


@pytest.mark.parametrize("turn", [1, 6])
def test_large_jpegs_are_decoded_small(turn, tmp_path, monkeypatch):
    """For networks from elsewhere; the picture is nearly the same, upright as well."""
    x = torch.linspace(0, 6, 1500)
    waves = (x[:, None] * x[None, :1000]).sin() * torch.tensor([1, 0.5, -1])[:, None, None]
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / "x.jpg"
    Image.fromarray((127 + 120 * waves).byte().permute(1, 2, 0).numpy()).save(
        path, quality=95, exif=exif
    )
    decoded, resize = [], linear_eval.TF.resize

    def spy(picture, side):
        decoded.append(picture.size)
        return resize(picture, side)

    monkeypatch.setattr(linear_eval.TF, "resize", spy)
    small = linear_eval.load_picture(path, 112, 128).float()
    exact = linear_eval.load_picture(Path(path), 128, 128).float()
    assert decoded == ([(500, 750), (1000, 1500)] if turn == 1 else [(750, 500), (1500, 1000)])
    assert (small - exact[:, 8:-8, 8:-8]).abs().mean() < 0.5


def test_a_class_that_train_lacks_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    shutil.copytree(folder / "test" / "red", tmp_path / "images" / "test" / "zebra")
    with pytest.raises(SystemExit, match=r"zebra/.*\.png: there is no class zebra in train$"):
        probe("--data", tmp_path / "images", "--size", 8)


def test_arguments_of_other_software_are_not_taken(folder, tmp_path, capsys):
    network, _, _ = build("resnet18", small_stem=True)
    foreign = {"data": "/nowhere", "size": 224}
    torch.save({"model": network.state_dict(), "args": foreign}, tmp_path / "saved.pth")
    assert linear_eval.load_backbone(tmp_path / "saved.pth")[2] == {}
    probe(tmp_path / "saved.pth", "--data", folder)
    assert "test: 24 images, resized to 32 px, cut to 32 px, " in capsys.readouterr().out


FEATURES = {  # (N, 8) and their classes
    "two images": lambda: (torch.randn(2, 8), torch.tensor([0, 1])),
    "equal images": lambda: (torch.ones(20, 8), torch.arange(20) % 3),
    "one class": lambda: (torch.randn(20, 8), torch.zeros(20, dtype=torch.int64)),
    "a class missing in what is fitted": lambda: (
        torch.randn(20, 8),
        (torch.arange(20) == 7).long() * 2 + (torch.arange(20) % 2),
    ),
    "a feature that never changes": lambda: (
        torch.randn(20, 8) * (torch.arange(8) > 0) + 3,
        torch.arange(20) % 3,
    ),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_the_fit_is_finite_whatever_the_features(kind):
    for seed in range(5):  # of which some hold the lone image out
        torch.manual_seed(seed)
        h, y = FEATURES[kind]()
        layer, decay = linear_eval.linear_probe(h, y)
        assert all(torch.isfinite(p).all() for p in layer.parameters())
        assert torch.isfinite(layer(h)).all()
        assert decay > 0


@pytest.fixture
def album(folder, tmp_path, monkeypatch):
    """Twelve photos and what lies between them: five that are broken, each in another way."""
    endings = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
    monkeypatch.setattr(linear_eval.datasets.folder, "IMG_EXTENSIONS", endings)
    monkeypatch.setattr(linear_eval, "find_spec", lambda name: None)  # without pillow_heif
    root = tmp_path / "my photos [1]"
    (root / "trip").mkdir(parents=True)
    for i in range(12):
        shutil.copy(folder / "train" / "red" / f"{i}.png", root / "trip" / f"ä {i}.png")
    whole = (root / "trip" / "ä 0.png").read_bytes()
    (root / "cut.png").write_bytes(whole[:500])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("hello")
    (root / "a folder.png").mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(root / "deep.png")
    for name in ("a.HEIC", "b.heic", "c.gif", "notes", ".hidden.heic"):
        (root / name).write_bytes(b"x")
    return root


BROKEN = {"cut.png", "empty.jpg", "text.jpg", "a folder.png", "deep.png"}


def test_what_cannot_be_read_is_passed_over_and_named(album, tmp_path, capsys):
    out = tmp_path / "f.pt"
    probe("--data", album, "--size", 8, "--features", out)
    lines = capsys.readouterr().out.splitlines()
    [counted] = [line for line in lines if line.startswith("passed over: ")]
    assert counted.startswith("passed over: 2 .heic, ")  # the most frequent first
    assert sorted(counted[13:].split(", ")) == ["1 .gif", "1 without an ending", "2 .heic"]
    assert "to read .heic: pip install pillow_heif" in lines
    assert "train: 12 images, resized to 8 px, cut to 8 px, 512 features" in lines
    at = lines.index("passed over 5 pictures:")
    named = lines[at + 1 : at + 6]
    assert {Path(line.strip().partition(": ")[0]).name for line in named} == BROKEN
    assert any(line.endswith("deep.png: more than 8 bits a channel") for line in named)
    assert lines[at + 6] == f"all of these are in {out}.passed-over.txt"
    assert lines[-1] == f"features of 12 images in {out}; no labels, so no accuracy"
    saved = torch.load(out)
    assert [f"  {reason}" for reason in saved["passed_over"]] == named
    assert Path(f"{out}.passed-over.txt").read_text().splitlines() == saved["passed_over"]
    assert {Path(path).parent.name for path in saved["train"]["paths"]} == {"trip"}
    x = [linear_eval.load_picture(Path(path), 8, 8) for path in saved["train"]["paths"]]
    torch.manual_seed(0)
    network = linear_eval.build_backbone("resnet18", True, False).eval()
    normal = linear_eval.TF.normalize(torch.stack(x) / 255, saved["args"]["mean"], (1, 1, 1))
    with torch.no_grad():
        h = network(normal / torch.tensor(saved["args"]["std"])[:, None, None])
    torch.testing.assert_close(saved["train"]["features"], h, rtol=1e-4, atol=1e-4)


def test_ten_reasons_are_printed_and_all_are_kept(album, tmp_path, capsys):
    for i in range(250):  # more than two batches, of which one has nothing else
        (album / f"broken {i}.png").write_bytes(b"x")
    probe("--data", album, "--size", 8, "--features", tmp_path / "f.pt")
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("passed over 255 pictures:")
    assert [line.startswith("  ") for line in lines[at + 1 : at + 12]] == [True] * 10 + [False]
    assert len(Path(f"{tmp_path / 'f.pt'}.passed-over.txt").read_text().splitlines()) == 255
    assert len(torch.load(tmp_path / "f.pt")["train"]["features"]) == 12


def test_broken_test_images_leave_the_others_labels(mislabeled, tmp_path, capsys):
    """What is passed over moves no label and no path to another picture."""
    shutil.copytree(mislabeled, tmp_path / "data")
    for path in sorted((tmp_path / "data").rglob("*[13].png")):
        path.write_bytes(b"x")
    probe("--data", tmp_path / "data", "--size", 8, "--features", tmp_path / "f.pt")
    assert "linear top-1" in capsys.readouterr().out
    saved = torch.load(tmp_path / "f.pt")
    assert saved["classes"] == ["blue", "green", "red"]
    for split in ("train", "test"):
        part = saved[split]
        assert len(part["features"]) == len(part["labels"]) == len(part["paths"]) > 0
        names = [saved["classes"][y] for y in part["labels"]]
        assert names == [Path(path).parent.name for path in part["paths"]]
        assert not any(re.search(r"[13]\.png", path) for path in part["paths"])


def test_if_no_picture_can_be_read_that_is_said(tmp_path):
    (tmp_path / "x").mkdir()
    for i in range(3):
        (tmp_path / "x" / f"{i}.jpg").write_bytes(b"x")
    with pytest.raises(SystemExit, match=r"no picture can be read, for example .*x/\d\.jpg: "):
        probe("--data", tmp_path / "x", "--size", 8, "--features", tmp_path / "f.pt")
    assert not (tmp_path / "f.pt").exists()


def test_test_images_that_are_all_broken_cost_no_features(folder, tmp_path, capsys):
    shutil.copytree(folder / "train", tmp_path / "x" / "train")
    (tmp_path / "x" / "test" / "red").mkdir(parents=True)
    (tmp_path / "x" / "test" / "red" / "0.png").write_bytes(b"x")
    probe("--data", tmp_path / "x", "--size", 8, "--features", tmp_path / "f.pt")
    end = f"features of 48 images in {tmp_path / 'f.pt'}; no test images, so no accuracy\n"
    assert capsys.readouterr().out.endswith(end)
    assert len(torch.load(tmp_path / "f.pt")["train"]["features"]) == 48


def test_pictures_outside_of_the_layout_are_counted(folder, tmp_path, capsys):
    """A folder train/X somewhere in a collection makes the rest of it vanish."""
    shutil.copytree(folder / "train" / "red", tmp_path / "x" / "train" / "steam engines")
    shutil.copytree(folder / "train" / "blue", tmp_path / "x" / "summer")
    probe("--data", tmp_path / "x", "--size", 8, "--features", tmp_path / "f.pt")
    line = f"passed over: 16 pictures not in {tmp_path / 'x'}/train, or not in a class\n"
    assert line in capsys.readouterr().out
    probe("--data", folder, "--size", 8, "--subset", 12)
    assert "passed over" not in capsys.readouterr().out


def test_heic_is_read_where_its_package_is_installed(album, tmp_path, capsys, monkeypatch):
    """A stand-in for pillow_heif teaches Pillow a format with this ending."""

    def register():
        Image.register_open("X", lambda file, name: Image.new("RGB", (9, 9), "red"), lambda b: b"x")

    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN})
    library = types.SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", library)
    monkeypatch.setattr(linear_eval, "find_spec", lambda name: name == "pillow_heif")
    for name in ("empty.jpg", "text.jpg", "cut.png"):
        (album / name).unlink()
    probe("--data", album, "--size", 8, "--features", tmp_path / "f.pt")
    [counted] = re.findall("passed over: (.*)", capsys.readouterr().out)
    assert sorted(counted.split(", ")) == ["1 .gif", "1 without an ending"]
    paths = torch.load(tmp_path / "f.pt")["train"]["paths"]
    assert {Path(path).name for path in paths if "trip" not in path} == {"a.HEIC", "b.heic"}


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_line_that_rewrites_itself_or_one_every_thousand(
    terminal, monkeypatch, capsys
):
    clock = iter(range(0, 100_000, 60))  # a minute for each batch
    monkeypatch.setattr(linear_eval.time, "time", lambda: next(clock))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    batches = list(linear_eval.track(list(range(2150)), "train"))
    assert sum(batches, []) == list(range(2150))
    assert [len(batch) for batch in batches] == [100] * 21 + [50]
    printed = capsys.readouterr().out
    if terminal:
        assert "\n" not in printed
        lines = [line.strip() for line in printed.split("\r")]
        assert lines[0] == "train: 0 of 2150 images"
        assert lines[1] == "train: 100 of 2150 images, 20.5 minutes left"
        assert len(lines) == 22 + 1
        assert len({len(line) for line in printed.split("\r")[:-1]}) == 1  # nothing remains
    else:
        first = "train: 1000 of 2150 images, 11.5 minutes left"
        assert printed.splitlines() == [first, "train: 2000 of 2150 images, 1.5 minutes left"]


def test_labels_are_drawn_evenly_from_the_training_images(folder, tmp_path, capsys):
    drawn = {}
    for seed in (0, 1):
        out = tmp_path / f"{seed}.pt"
        probe("--data", folder, "--size", 8, "--labels", 13, "--seed", seed, "--features", out)
        printed = capsys.readouterr().out
        assert "train: 12 images, " in printed
        assert "test: 24 images, " in printed
        assert "(k=12, temperature 0.1)" in printed
        saved = torch.load(out)
        assert saved["train"]["labels"].bincount().tolist() == [4, 4, 4]
        drawn[seed] = set(saved["train"]["paths"])
    assert drawn[0] != drawn[1]
    probe("--data", folder, "--size", 8, "--labels", 1000)
    assert "train: 48 images, " in capsys.readouterr().out


@pytest.mark.parametrize(("count", "data"), [(2, "."), (0, "."), (9, "train/red")])
def test_each_class_needs_a_label(count, data, folder, tmp_path):
    flags = ["--size", 8, "--labels", count, "--features", tmp_path / "f.pt"]
    classes = 3 if data == "." else 0
    with pytest.raises(SystemExit, match=rf"--labels {count}: each of {classes} classes needs one"):
        probe("--data", folder / data, *flags)


def test_the_features_file_describes_itself(folder, runs, tmp_path):
    """Its pictures can be found again, and what the network has seen of them."""
    out = tmp_path / "f.pt"
    checkpoint = runs / "byol" / "checkpoint.pt"
    probe(checkpoint, "--prefix", "network.target", "--subset", 5, "--features", out)
    saved = torch.load(out)
    assert saved["classes"] == ["blue", "green", "red"]
    assert saved["place"] == "network.target.0.conv1.weight"
    assert saved["passed_over"] == []
    assert not Path(f"{out}.passed-over.txt").exists()
    about = {"checkpoint": str(checkpoint), "data": str(folder), "size": 8, "resize": 8}
    assert about.items() <= saved["args"].items()
    assert [*saved["args"]["mean"]] == [0.485, 0.456, 0.406]
    assert [*saved["args"]["std"]] == [0.229, 0.224, 0.225]


@pytest.mark.parametrize("count", [9, 10])
def test_below_ten_images_no_decay_is_chosen(count, folder, capsys):
    probe("--data", folder, "--size", 8, "--subset", count)
    end = "not chosen: under 10 images" if count == 9 else "best on a tenth held out"
    assert capsys.readouterr().out.endswith(f", {end})\n")


def test_the_nearest_are_sought_a_thousand_queries_at_a_time(monkeypatch):
    """All cosines of ImageNet's images at once would take 256 GB."""
    sizes, topk = [], torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda x, k: sizes.append(tuple(x.shape)) or topk(x, k)
    )
    torch.manual_seed(0)
    h, y = torch.randn(300, 8), torch.arange(300) % 3
    linear_eval.knn_accuracy(h, y, torch.randn(2500, 8), torch.arange(2500) % 3)
    assert sizes == [(1000, 300), (1000, 300), (500, 300)]


def test_a_stem_with_more_tensors_is_another_network(tmp_path):
    state = build("resnet18")[0].state_dict() | {"conv1.bias": torch.ones(64)}
    for order in (state, sorted(state)):
        torch.save({name: state[name] for name in order}, tmp_path / "saved.pth")
        with pytest.raises(SystemExit, match="no torchvision ResNet"):
            linear_eval.load_backbone(tmp_path / "saved.pth")


def test_a_class_of_which_nothing_can_be_read_is_none(folder, tmp_path, capsys):
    """Else one class would be told from itself, by 100 %."""
    for split in ("train", "test"):
        shutil.copytree(folder / split / "red", tmp_path / "x" / split / "red")
        (tmp_path / "x" / split / "dog").mkdir()
        (tmp_path / "x" / split / "dog" / "0.png").write_bytes(b"x")
    probe("--data", tmp_path / "x", "--size", 8)
    end = "features of 24 images in no file; one class, so no accuracy\n"
    assert capsys.readouterr().out.endswith(end)


def test_the_features_file_is_there_as_a_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    """Where the disk is full, and though the name ends as a folder's does."""
    flags = ["--data", folder / "train" / "red", "--size", 8, "--features", f"{tmp_path}/new/f/"]
    save = torch.save

    def fail(content, path):
        save([], path)
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        probe(*flags)
    assert not (tmp_path / "new" / "f").exists()
    monkeypatch.setattr(torch, "save", save)
    probe(*flags)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f"]
    assert len(torch.load(tmp_path / "new" / "f")["train"]["features"]) == 16


def test_no_list_is_written_over(folder, tmp_path):
    (tmp_path / "f.pt.passed-over.txt").write_text("of another run")
    with pytest.raises(SystemExit, match=r"f\.pt\.passed-over\.txt exists: choose another name"):
        probe("--data", folder, "--size", 8, "--features", tmp_path / "f.pt")


def test_what_stands_beside_the_network_is_named(tmp_path, capsys):
    """Attention after the stem, say, without which the features are not the network's."""
    state = build("resnet18")[0].state_dict()
    extras = {"fc.weight": torch.ones(3, 3), "ca.fc1.weight": torch.ones(4, 4)}
    saved = {"epoch": torch.ones(3), "net": prefixed(dict(sorted((state | extras).items())), "m.")}
    torch.save(saved, tmp_path / "saved.pth")
    linear_eval.load_backbone(tmp_path / "saved.pth")
    assert "beside it, not run: ca, fc\n" in capsys.readouterr().out
    torch.save({"net": numbered(build("resnet18")[0])}, tmp_path / "saved.pth")
    linear_eval.load_backbone(tmp_path / "saved.pth")
    assert "beside it, not run: nothing\n" in capsys.readouterr().out


@pytest.mark.parametrize("in_order", [True, False])
def test_single_numbers_in_a_block_are_no_counters(in_order, tmp_path):
    """But the slope of a PReLU, say, or the weight of a branch."""
    state = build("resnet18")[0].state_dict()
    names = [*state]
    names.insert(names.index("layer2.0.conv2.weight"), "layer2.0.relu.weight")
    saved = {name: state.get(name, torch.ones(1)) for name in names}
    torch.save(saved if in_order else dict(sorted(saved.items())), tmp_path / "saved.pth")
    with pytest.raises(SystemExit, match="no torchvision ResNet"):
        linear_eval.load_backbone(tmp_path / "saved.pth")


def test_every_resnet_of_torchvision_is_known():
    """By shapes alone, as 500 MB of numbers would take their time."""
    for arch in ("resnet101", "resnet152", "resnext101_32x8d", "resnext101_64x4d"):
        with torch.device("meta"):
            tensors = linear_eval.find_tensors(models.get_model(arch).state_dict())
        assert linear_eval.find_backbones(tensors)["conv1.weight"][0] == arch


COPIES = ["momentum_encoder", "target", "teacher", "key_encoder", "encoder_k", "net_m", "ema"]
COPIES += ["swa", "avg_model", "averaged", "shadow", "loss.net", "init"]


@pytest.mark.parametrize("copy", COPIES)
def test_the_original_comes_before_its_copies(copy):
    assert linear_eval.rank("model.module.backbone.conv1.weight") < linear_eval.rank(copy + ".x")


@pytest.mark.parametrize(("small_stem", "size"), [(False, 224), (True, 32)])
def test_the_size_is_that_of_the_stem(small_stem, size, folder, tmp_path, capsys):
    torch.save(build("resnet18", small_stem)[0].state_dict(), tmp_path / "saved.pth")
    probe(tmp_path / "saved.pth", "--data", folder, "--subset", 6)
    assert capsys.readouterr().out.count(f", cut to {size} px, 512 features\n") == 2


def test_labels_are_of_the_subset(folder, tmp_path):
    """Which cuts the test images, too."""
    for name, flags in (("a", []), ("b", ["--labels", 6])):
        out = tmp_path / name
        probe("--data", folder, "--size", 8, "--subset", 20, *flags, "--features", out)
    whole, part = torch.load(tmp_path / "a"), torch.load(tmp_path / "b")
    assert set(part["train"]["paths"]) < set(whole["train"]["paths"])
    assert part["train"]["labels"].bincount().tolist() == [2, 2, 2]
    assert part["test"]["paths"] == whole["test"]["paths"]
    assert len(whole["test"]["paths"]) == 20


def test_features_are_saved_before_anything_is_made_of_them(folder, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(linear_eval, "knn_accuracy", fail)
    with pytest.raises(MemoryError):
        probe("--data", folder, "--size", 8, "--features", tmp_path / "f.pt")
    assert len(torch.load(tmp_path / "f.pt")["test"]["features"]) == 24


def test_where_nothing_can_be_written_that_is_found_out_first(folder, tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(path)

    monkeypatch.setattr(Path, "touch", fail)
    monkeypatch.setattr(linear_eval, "extract_features", None)
    with pytest.raises(PermissionError, match=r"f\.pt"):
        probe("--data", folder, "--size", 8, "--features", tmp_path / "f.pt")


def test_broken_test_images_are_listed_with_the_others(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x" / "train" / "red" / "bad train.png").write_bytes(b"x")
    (tmp_path / "x" / "test" / "red" / "bad \udce9 test.png").write_bytes(b"x")  # no UTF-8
    probe("--data", tmp_path / "x", "--size", 8, "--features", tmp_path / "f.pt")
    first, second = Path(f"{tmp_path / 'f.pt'}.passed-over.txt").read_text().splitlines()
    assert "bad train.png: " in first
    assert r"bad \udce9 test.png: " in second


def test_floats_are_more_than_8_bits():
    with pytest.raises(ValueError, match="more than 8 bits"):
        linear_eval.load_picture(Image.new("F", (9, 9)), 8, 8)


def test_the_held_out_tenth_and_the_grid(monkeypatch):
    """Of decays that are equally good the strongest is taken, and fitted to all images."""
    fits, fit = [], linear_eval.fit

    def spy(layer, h, y, decay, covariance):
        fits.append((decay, len(h)))
        fit(layer, h, y, decay, covariance)

    monkeypatch.setattr(linear_eval, "fit", spy)
    torch.manual_seed(0)
    y = torch.arange(205) % 2
    h = torch.randn(205, 4) + 50 * y[:, None]  # told apart by every decay
    _, decay = linear_eval.linear_probe(h, y)
    grid = [0.1, 0.01, 1e-3, 1e-4, 1e-5]
    assert fits == [(decay, 205 - 20) for decay in grid] + [(0.1, 205)]
    assert decay == 0.1
