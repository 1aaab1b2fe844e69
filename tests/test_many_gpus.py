"""many_gpus.diff applied: equal weights, one writer, negatives of all processes, no hang."""

import os
import re
import shutil
import socket
import subprocess
import sys
from importlib import util
from types import SimpleNamespace

import pytest
import torch
from conftest import METHODS, ROOT, Small, shrink
from torch import nn

import simclr

DIFF = ROOT / "tests" / "many_gpus.diff"
FLAGS = "--size 8 --subset 47 --batch-size 16 --device cpu"
# What each process runs: the main of the three scripts, then it leaves its own weights behind. They
# share a process group, which ends with the last of them.
TRAIN = """
import importlib, os, sys
import torch
from conftest import METHODS, Small
from torch import distributed
cpu = ["--device", "cpu"]  # even where GPUs are: what is tested are two processes
begin, end = distributed.init_process_group, distributed.destroy_process_group
distributed.init_process_group = lambda *a, **o: distributed.is_initialized() or begin(*a, **o)
distributed.destroy_process_group = lambda: None
for name, kind in METHODS.items():
    script, models = importlib.import_module(name), []
    class Spy(getattr(script, kind)):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            models.append(self)
    setattr(script, kind, Spy)
    script.build_backbone = Small
    augment, seen, seeds = script.augment, [], set()
    def spy(images, *_, **options):
        seen.append(images.clone())
        seeds.add(torch.initial_seed())
        return augment(images, *_, **options)
    script.augment = spy
    train_step, losses = script.train_step, []
    def record(*args):
        loss, watched = train_step(*args)
        losses.append(loss.item())
        return loss, watched
    script.train_step = record
    out, rank = sys.argv[1], os.environ["RANK"]
    script.main([*sys.argv[2:], "--epochs", "2", "--out", f"{out}/{name}"])
    torch.save([models[0].state_dict(), seen, seeds, losses], f"{out}/{name}{rank}.pt")
    script.main(["--epochs", "3", "--out", f"{out}/{name}", "--resume", *cpu])
    torch.save(models[1].state_dict(), f"{out}/{name}{rank}_resumed.pt")
"""
# Process 1 finds an older checkpoint, of another seed, in its --out, which is not shared.
APART = """
script.main(["--epochs", "4", "--out", f"{out}/apart{rank}", "--resume", *cpu])
torch.save(models[2].state_dict(), f"{out}/apart{rank}.pt")
"""
# A step of SimCLR with a linear network, on a half of 8 images in each process.
GRADIENT = """
class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(12, 6)
    def forward(self, x1, x2):
        return script.nt_xent(self.linear(x1), self.linear(x2), 0.5), x1
torch.manual_seed(0)
network, x1, x2 = Linear(), torch.randn(8, 12), torch.randn(8, 12)
part = slice(4 * int(rank), 4 * int(rank) + 4)
views = iter([x1[part], x2[part]])
script.augment = lambda x: next(views)
script.normalize = lambda x: x
sgd = torch.optim.SGD(network.parameters(), lr=0)
loss, _ = script.train_step(torch.nn.parallel.DistributedDataParallel(network), sgd, x1, False)
torch.save([loss, *(p.grad for p in network.parameters())], f"{out}/gradient{rank}.pt")
end()
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A folder with copies of the scripts to which many_gpus.diff is applied."""
    folder = tmp_path_factory.mktemp("patched")
    for name in METHODS:
        shutil.copy(ROOT / f"{name}.py", folder)
    subprocess.run(["git", "apply", str(DIFF)], cwd=folder, check=True, timeout=60)
    return folder


def changes(text, name):
    """What the diff takes away from a script and adds to it, without the lines around."""
    part = re.search(rf"^\+\+\+ b/{name}\.py\n(.*?)(^diff |\Z)", text, re.DOTALL | re.MULTILINE)[1]
    part = part.replace("loss, z1 = ", "loss, p1 = ")  # what the methods' meters look at
    return [line for line in part.splitlines() if line[0] in "+-"]


def test_the_diff_changes_each_script_alike(patched):
    """SimCLR has more: the views of all processes are its negatives."""
    text = DIFF.read_text()
    common = changes(text, "simsiam")
    assert len(common) > 30
    assert changes(text, "byol") == common
    more = [line for line in changes(text, "simclr") if line not in common]
    assert [line for line in common if line not in changes(text, "simclr")] == []
    assert any("def gather" in line for line in more)
    for name in METHODS:
        assert "torch.distributed" not in (ROOT / f"{name}.py").read_text()
        assert "init_process_group" in (patched / f"{name}.py").read_text()


def torchrun(patched, *command, processes=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join([str(patched), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, f"--nproc_per_node={processes}", *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=100)
    finally:
        process.terminate()  # its processes wait for each other, if it has not ended
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def two_ranks(patched, folder, tmp_path_factory):
    """The folder in which two processes have run TRAIN, APART and GRADIENT, one after the other."""
    out = tmp_path_factory.mktemp("ranks")
    flags = ["--data", str(folder), *FLAGS.split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simclr, "build_backbone", Small)
        simclr.main([*flags, "--epochs", "3", "--out", str(out / "apart0")])
        simclr.main([*flags, "--epochs", "1", "--out", str(out / "apart1"), "--seed", "1"])
    (out / "driver.py").write_text(TRAIN + APART + GRADIENT)
    printed = finish(torchrun(patched, out / "driver.py", out, *flags))
    epochs = [line.split()[1] for line in printed.splitlines() if line.startswith("epoch ")]
    assert epochs == ["1", "2", "3"] * 3 + ["4"]
    assert printed.count("47 images, 3 classes, 24 to test ") == 7
    return out


def weights(state):
    return {k: t for k, t in state.items() if not k.endswith(("_mean", "_var", "_tracked"))}


def test_two_ranks_leave_one_run_and_hold_equal_weights(script, two_ranks):
    name = script.__name__
    files = sorted(path.name for path in (two_ranks / name).iterdir())
    assert files == ["checkpoint.pt", "log.csv"]
    for suffix in ("", "_resumed"):
        states = [torch.load(two_ranks / f"{name}{rank}{suffix}.pt") for rank in (0, 1)]
        states = states if suffix else [state[0] for state in states]
        a, b = (weights(state) for state in states)
        assert len(a) >= 7
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    saved = torch.load(two_ranks / name / "checkpoint.pt")["network"]
    assert all(torch.equal(saved[key], states[0][key]) for key in saved)


def test_two_ranks_share_each_batch_and_draw_other_views(script, two_ranks):
    (_, seen0, seeds0, _), (_, seen1, seeds1, _) = (
        torch.load(two_ranks / f"{script.__name__}{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert len(seen0) == len(seen1) == 2 * 2 * 2  # two views, two epochs of two steps
    for epoch in (0, 4):
        images = torch.cat([*seen0[epoch : epoch + 4 : 2], *seen1[epoch : epoch + 4 : 2]])
        assert images.shape == (32, 3, 8, 8)
        assert len(images.flatten(1).unique(dim=0)) == 32  # each image once an epoch
    for seen in (seen0, seen1):  # not a share of its own for ever
        assert len(torch.cat(seen).flatten(1).unique(dim=0)) > 20
    assert not seeds0 & seeds1
    assert len(seeds1) == 2


def test_the_logged_loss_is_that_of_both(script, two_ranks):
    out = two_ranks / script.__name__
    losses = [torch.load(f"{out}{rank}.pt", weights_only=False)[-1][:4] for rank in (0, 1)]
    log = torch.load(out / "checkpoint.pt")["log"]
    for epoch in (1, 2):  # of two steps
        steps = slice(2 * epoch - 2, 2 * epoch)
        mean = sum(losses[0][steps] + losses[1][steps]) / 4
        assert float(log[epoch].split(",")[1]) == pytest.approx(mean, rel=1e-5)


def test_knn_is_measured_with_all_images(script, two_ranks, folder):
    """The figure of one GPU, from the checkpoint, though each process saw a part."""
    out = two_ranks / script.__name__
    saved = torch.load(out / "checkpoint.pt")
    args = script.parse_args(["--data", str(folder), *FLAGS.split()])
    backbone = Small()
    backbone.load_state_dict(saved["backbone"])
    features = []
    for split in ("train", "test"):
        images, labels = script.load_split(args, split)
        features += [script.compute_features(backbone, images, "cpu"), labels]
    assert len(features[0]) == 47
    assert saved["log"][-1].split(",")[-1] == f"{script.knn_accuracy(*features):.2f}"


def test_one_process_goes_on_where_two_have_stopped(script, two_ranks, monkeypatch, capsys):
    """The plain script, by the flags of the run."""
    monkeypatch.setattr(script, "build_backbone", Small)
    script.main(["--epochs", "4", "--out", str(two_ranks / script.__name__), "--resume"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed if line[:6] == "epoch "] == ["4"]


def test_two_processes_go_on_from_the_checkpoint_of_rank_0(two_ranks):
    """By its flags, though the other one has an older one in an --out of its own."""
    a, b = (weights(torch.load(two_ranks / f"apart{rank}.pt")) for rank in (0, 1))
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    saved = [torch.load(two_ranks / f"apart{rank}" / "checkpoint.pt") for rank in (0, 1)]
    assert [state["epoch"] for state in saved] == [4, 1]
    assert [state["args"]["seed"] for state in saved] == [0, 1]


def test_the_gradient_of_simclr_is_that_of_one_process(two_ranks):
    torch.manual_seed(0)
    network, x1, x2 = nn.Linear(12, 6), torch.randn(8, 12), torch.randn(8, 12)
    loss = simclr.nt_xent(network(x1), network(x2), 0.5)
    loss.backward()
    single = [loss.detach(), *(p.grad for p in network.parameters())]
    for rank in (0, 1):
        for a, b in zip(single, torch.load(two_ranks / f"gradient{rank}.pt")):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=0)
    assert single[1].abs().max() > 1e-3  # a gradient that is all zero would prove nothing


@pytest.fixture
def parallel(script, patched, monkeypatch):
    """The patched script in this process, its backbone small."""
    spec = util.spec_from_file_location(script.__name__, patched / f"{script.__name__}.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shrink(monkeypatch, module)
    return module


@pytest.fixture
def second_of_two(parallel, folder, tmp_path, monkeypatch):
    """run(flags): its main as if it were process 1 of two, none of which starts."""
    fake = SimpleNamespace(
        init_process_group=lambda *_, **__: None,
        get_rank=lambda: 1,
        get_world_size=lambda: 2,
        broadcast_object_list=lambda _: None,
        barrier=lambda: None,
        all_gather_object=lambda counts, n: counts.__setitem__(slice(None), [n, n - lost]),
    )
    lost = 0
    monkeypatch.setattr(parallel, "distributed", fake)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which it exchanges
    monkeypatch.setenv("LOCAL_RANK", "1")

    def run(flags, missing=0):
        nonlocal lost
        lost = missing
        usual = f"--data {folder} --size 8 --batch-size 16 --out {tmp_path / 'run'} {flags}"
        parallel.main(usual.split())

    return run


@pytest.mark.parametrize(
    ("flags", "missing", "message"),
    [
        ("--device cpu --batch-size 15", 0, "--batch-size 15 is no multiple of 2 processes"),
        ("--device cuda:1", 0, "--device cuda:1: say cuda, and each process takes a GPU"),
        ("--device cpu", 3, r"\[48, 45\] images, but every process needs the same"),
    ],
)
def test_what_cannot_be_shared_is_refused(second_of_two, flags, missing, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        second_of_two(flags, missing)
    assert not (tmp_path / "run").exists()


def test_without_torchrun_it_says_so(parallel, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit, match="start it with torchrun"):
        parallel.main(["--device", "cpu"])


class Begun(Exception):
    """The first step."""


def test_on_gpus_every_batch_norm_reaches_across_the_processes(
    script, parallel, second_of_two, monkeypatch
):
    """And the gradients of all of it. What would travel to a GPU stays where it is."""
    wrapped, seen = [], []
    to = torch.Tensor.to

    def stay(tensor, place, *args, **options):
        return tensor if str(place).startswith("cuda") else to(tensor, place, *args, **options)

    def stop(network, optimizer, x, bf16):
        seen.extend([network, optimizer, x])
        raise Begun

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device="cpu", **o: zeros(*shape, **o))
    monkeypatch.setattr(torch.Tensor, "to", stay)
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: wrapped.append(i))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**40, 2**40))
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda x: wrapped.append(x) or x)
    monkeypatch.setattr(parallel, "train_step", stop)
    with pytest.raises(Begun):
        second_of_two("--device cuda --bf16")
    place, network = wrapped
    assert place == 1
    assert seen[0] is network
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == {"simsiam": 4, "byol": 5, "simclr": 1}[script.__name__]
    assert {type(m) for m in norms} == {nn.SyncBatchNorm}
    assert {*seen[1].param_groups[0]["params"]} == {*network.parameters()}
    assert len(seen[2]) == 8  # its half of the batch


def test_one_process_trains_as_the_plain_script(script, parallel, folder, tmp_path, monkeypatch):
    """To the bit: order, views, weights, kNN."""
    shrink(monkeypatch, script)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": port}
    for name, value in {**alone, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    states = []
    for module in (script, parallel):
        out = tmp_path / f"run{len(states)}"
        module.main(["--data", str(folder), *FLAGS.split(), "--epochs", "2", "--out", str(out)])
        states.append(torch.load(out / "checkpoint.pt"))
    a, b = states
    assert [
        name for name in a["network"] if not torch.equal(a["network"][name], b["network"][name])
    ] == []
    for x, y in zip(a["log"], b["log"], strict=True):
        assert x.split(",")[:4] + x.split(",")[5:] == y.split(",")[:4] + y.split(",")[5:]
