"""The benchmark measures the scripts' own loops, and its figures hang together."""

import bench
import pytest
import torch
from conftest import METHODS


def run(capsys, *flags):
    """The lines that a short benchmark prints."""
    usual = "--device cpu --batch-size 4 --size 8 --repeat 1 --images 600 --no-compile"
    bench.main([*usual.split(), *flags])
    return capsys.readouterr().out.splitlines()


def arguments(method):
    return bench.argparse.Namespace(device=torch.device("cpu"), batch_size=4, size=8)


@pytest.mark.parametrize("method", METHODS)
def test_the_real_step_is_the_one_of_the_script(method, monkeypatch):
    training, seen = bench.Training(method, arguments(method)), []
    train_step = training.script.train_step

    def spy(network, optimizer, x, bf16):
        seen.append(x)
        return train_step(network, optimizer, x, bf16)

    monkeypatch.setattr(training.script, "train_step", spy)
    before = [p.clone() for p in training.model.parameters()]
    training.real()
    assert len(seen) == 1
    assert torch.equal(seen[0], training.images[training.order[0]])
    changed = [not torch.equal(a, b) for a, b in zip(before, training.model.parameters())]
    assert any(changed)
    if method == "byol":  # the target follows
        names = [name for name, _ in training.model.named_parameters()]
        assert any(c for name, c in zip(names, changed) if name.startswith("target"))
    assert training.total != 0  # the loss was added
    group = training.optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(training.flags.lr * 4 / 256, rel=1e-3)  # the peak
    assert group["weight_decay"] == training.flags.weight_decay


@pytest.mark.parametrize("method", METHODS)
def test_the_bare_step_does_all_but_the_loss(method):
    training = bench.Training(method, arguments(method))
    loss = training.loss
    training.bare()
    trained = [p for p in training.model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert getattr(training.script, bench.LOSSES[method]) is loss  # put back
    training.together()
    assert training.model.backbone.inplanes == 512  # so is the backbone


def test_times_take_turns():
    calls = []
    args = bench.argparse.Namespace(device=torch.device("cpu"), repeat=2, calls=3)
    times = bench.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, args
    )
    assert "".join(calls) == "baabba"  # there and back
    assert {name: len(of_name) for name, of_name in times.items()} == {"a": 2, "b": 2}


def test_the_tables(capsys):
    lines = run(capsys, "--parts", "steps", "augmentation", "decode", "--methods", "byol")
    row = next(line.split() for line in lines if line.startswith("  byol"))
    ratio, low, high, bare, real, augment, loss, ema, rest = map(float, row[1:10])
    assert low <= ratio <= high
    assert ratio == pytest.approx(real / bare, rel=0.01)
    assert 100 * (ratio - 1) == pytest.approx(augment + loss + ema + rest, abs=1)
    ours, theirs = (
        next(line.split() for line in lines if line.startswith(f"  {start}"))
        for start in ("whole batches", "per image")
    )
    assert float(theirs[-2]) == pytest.approx(float(ours[-3]) / float(theirs[-3]), rel=0.01)
    assert 0 < float(ours[-1]) < 100
    assert 0 < float(theirs[-1]) < 100
    assert sum("decode" in line for line in lines) == 1
