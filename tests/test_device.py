"""The CUDA path without a GPU: what runs where, in which precision, and that nothing travels."""

import pytest
import torch
from conftest import METHODS, Small, shrink
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class NoTransfer(TorchDispatchMode):
    """Fails on a copy between devices, for which the host and the GPU would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in COPIES:
            places = {t.device.type for t in (*args[:2], out) if isinstance(t, torch.Tensor)}
            assert len(places) == 1, f"{func} from {places}"
        return out


def fake_draws(monkeypatch):
    """The order of the colors and the blur's width are drawn on the CPU, as plain numbers."""
    empty, randperm = torch.empty, torch.randperm
    numbers = type("Numbers", (), {"uniform_": lambda s, *_: s, "item": lambda s: 1.0})()
    order = type("Order", (), {"tolist": lambda s: [2, 0, 3, 1]})()
    monkeypatch.setattr(torch, "empty", lambda *a, **k: numbers if a == (1,) else empty(*a, **k))
    monkeypatch.setattr(torch, "randperm", lambda n: order if n == 4 else randperm(n))


def pretend_on_gpu(model):
    """Its weights and statistics become fake ones on a GPU: to(), unlike this, needs a real one."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.zeros(p.shape, device="cuda")
                module._parameters[name] = torch.nn.Parameter(fake, p.requires_grad)
        for name, t in module._buffers.items():
            if t is not None:
                module._buffers[name] = torch.zeros(t.shape, dtype=t.dtype, device="cuda")
    return model


@pytest.mark.parametrize("size", [32, 96])
def test_augmentation_and_network_stay_on_the_gpu(script, size, monkeypatch):
    model = getattr(script, METHODS[script.__name__])(script.build_backbone("resnet18", size))
    fake_draws(monkeypatch)
    options = {"solarize": 0.2} if script.__name__ == "byol" else {}
    with FakeTensorMode():
        model = pretend_on_gpu(model)
        images = torch.zeros(4, 3, size, size, dtype=torch.uint8, device="cuda")
        with NoTransfer():
            x1, x2 = script.augment(images), script.augment(images, **options)
            x1, x2 = script.normalize(x1), script.normalize(x2)
            torch.set_autocast_enabled("cuda", True)  # torch.autocast does it with a real GPU only
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            try:
                loss, watched = model(x1, x2)
            finally:
                torch.set_autocast_enabled("cuda", False)
    assert loss.device.type == watched.device.type == "cuda"
    assert (loss.dtype, watched.dtype) == (torch.float32, torch.bfloat16)
    assert len(watched) == 4


def test_a_transfer_is_noticed():
    with FakeTensorMode(), NoTransfer():
        x = torch.empty(3, device="cuda")
        with pytest.raises(AssertionError, match="from"):
            x.cpu()
        with pytest.raises(AssertionError, match="from"):
            torch.empty(3).to("cuda")


def pretend(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)


@pytest.mark.parametrize(("gpus", "expected"), [(0, "cpu"), (2, "cuda")])
def test_the_default_device(script, monkeypatch, gpus, expected):
    pretend(monkeypatch, gpus)
    assert script.parse_args([]).device == expected


class Begun(Exception):
    """The first step."""


@pytest.fixture
def first_step(script, folder, tmp_path, monkeypatch):
    """run(flags, free, gpus): the place of the images, that of the first batch, and its bf16, on a
    machine with GPUs of free bytes. What would travel to one becomes a tensor on "meta"."""
    shrink(monkeypatch, script)
    places, to = [], torch.Tensor.to
    zeros, split = torch.zeros, torch.Tensor.split

    def travel(tensor, place, *args, **options):
        return to(tensor, "meta" if str(place).startswith("cuda") else place, *args, **options)

    def stop(network, optimizer, x, bf16):
        places.extend([x.device.type, bf16])
        raise Begun

    def spy(tensor, *sizes):
        places.append(tensor.device.type)
        return split(tensor, *sizes)

    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device="cpu", **o: zeros(*shape, **o))
    monkeypatch.setattr(torch.Tensor, "to", travel)
    monkeypatch.setattr(torch.Tensor, "split", spy)
    monkeypatch.setattr(script, "train_step", stop)

    def run(flags, free=2**30, gpus=2):
        pretend(monkeypatch, gpus)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 2**40))
        if "--resume" not in flags:
            flags += f" --data {folder} --size 8 --batch-size 16"
        places.clear()
        with pytest.raises(Begun):
            script.main([*flags.split(), "--out", str(tmp_path / "run")])
        return places

    return run


def supported(hardware):
    """torch.cuda.is_bf16_supported of a GPU that has it, or only emulates it."""
    return lambda including_emulation=True: including_emulation or hardware


@pytest.mark.parametrize(
    ("flags", "hardware", "expected"),
    [
        ("--device cuda", True, True),
        ("--device cuda", False, False),  # a T4: it says yes where emulation counts
        ("--device cuda --no-bf16", True, False),
        ("--device cuda --bf16", False, True),
        ("--device cuda:1", True, True),
        ("--device cpu", True, False),
        ("--device cpu --bf16", False, True),
    ],
)
def test_precision_follows_the_hardware(first_step, monkeypatch, flags, hardware, expected):
    """bfloat16 only where it is computed, not emulated, unless it is asked for."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported(hardware))
    assert first_step(flags)[-1] == expected


@pytest.mark.parametrize(("share", "expected"), [(0.34, "cpu"), (0.32, "meta")])
def test_the_images_are_on_the_gpu_if_they_fit(first_step, share, expected):
    """Into a third of its free memory; each batch goes there in any case."""
    images = 48 * 3 * 8 * 8  # bytes
    assert first_step("--device cuda --no-bf16", free=images / share) == [expected, "meta", False]


@pytest.mark.parametrize(("asked", "kept"), [("", None), ("--bf16", True), ("--no-bf16", False)])
def test_a_checkpoint_keeps_no_device_and_bf16_as_asked(
    first_step, tmp_path, monkeypatch, asked, kept
):
    """A run begun on a GPU goes on by what the next machine has, or what is asked of it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported(True))
    assert first_step(f"--device cuda {asked}") == ["meta", "meta", kept is not False]
    args = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["args"]
    assert args["bf16"] is kept
    assert not {"device", "out", "resume"} & set(args)
    assert first_step("--resume", gpus=0) == ["cpu", "cpu", bool(kept)]
    assert first_step("--resume") == ["meta", "meta", kept is not False]
    assert first_step("--resume --device cpu --no-bf16") == ["cpu", "cpu", False]


def test_bf16_reaches_the_network_on_a_cpu(script, folder, tmp_path, monkeypatch, capsys):
    seen = []

    class Backbone(Small):
        def forward(self, x):
            h = super().forward(x)
            seen.append(self[2](torch.zeros(1, 3)).dtype)
            return h

    monkeypatch.setattr(script, "build_backbone", Backbone)
    flags = f"--data {folder} --size 8 --epochs 1 --batch-size 24 --device cpu --lr 0.1".split()
    script.main([*flags, "--bf16", "--out", str(tmp_path / "run")])
    assert "bf16=True" in capsys.readouterr().out.splitlines()[0]
    assert torch.bfloat16 in seen
    saved = torch.load(tmp_path / "run" / "checkpoint.pt")["network"]
    assert all(t.dtype != torch.bfloat16 for t in saved.values())
