"""Several processes under torchrun: equal parameters, one writer, global negatives, no hang."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Small
from torch import nn

import simclr

FLAGS = "--size 8 --subset 47 --batch-size 16 --device cpu"  # 47: one rank has an image more
# A process of a gloo group may abort as Python takes it apart (one run in some twenty, torch 2.14,
# "terminate called without an active exception"), when its work is done and saved: without that.
LEAVE = """
import os, sys
import torch
def leave():
    torch.distributed.barrier()  # or the launcher would end the other rank with this one
    sys.stdout.flush()
    os._exit(0)
"""
# What each rank runs: the main of the three scripts, then leave its own weights behind.
DRIVER = (
    LEAVE
    + """
import importlib, os, sys
import torch
from conftest import METHODS, Small
begin = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda **o: torch.distributed.is_initialized() or begin(**o)
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
    out, rank = sys.argv[1], os.environ["RANK"]
    script.main([*sys.argv[2:], "--epochs", "2", "--out", f"{out}/{name}"])
    torch.save([models[0].state_dict(), seen, seeds], f"{out}/{name}{rank}.pt")
    script.main([*sys.argv[2:], "--epochs", "3", "--out", f"{out}/{name}", "--resume"])
    torch.save(models[1].state_dict(), f"{out}/{name}{rank}_resumed.pt")
leave()
"""
)
NT_XENT = (
    LEAVE
    + """
import os, sys
import torch
from torch import nn
import simclr
torch.distributed.init_process_group("gloo")
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.manual_seed(0)
network, x1, x2 = nn.Linear(12, 6), torch.randn(8, 12), torch.randn(8, 12)
network = nn.parallel.DistributedDataParallel(network)
part = slice(rank * 8 // world, (rank + 1) * 8 // world)
z1, z2 = network(torch.cat([x1[part], x2[part]])).chunk(2)  # DDP is to see one forward
loss = simclr.nt_xent(z1, z2, 0.5)
loss.backward()
gradients = [p.grad for p in network.parameters()]
torch.save([loss.detach(), *gradients], f"{sys.argv[1]}/rank{rank}.pt")
leave()
"""
)


def torchrun(*command, processes=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, f"--nproc_per_node={processes}", *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def two_ranks(folder, tmp_path_factory):
    """The folder in which two ranks have trained each script for two epochs."""
    out = tmp_path_factory.mktemp("ranks")
    (out / "driver.py").write_text(DRIVER)
    printed = finish(torchrun(out / "driver.py", out, "--data", folder, *FLAGS.split()))
    assert [printed.count(f"epoch {epoch} ") for epoch in (1, 2, 3)] == [3, 3, 3]
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
    saved = torch.load(two_ranks / name / "checkpoint.pt")["model"]
    assert all(torch.equal(saved[key], states[0][key]) for key in saved)


def test_two_ranks_share_each_batch_and_draw_other_views(script, two_ranks):
    (_, seen0, seeds0), (_, seen1, seeds1) = (
        torch.load(two_ranks / f"{script.__name__}{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert len(seen0) == len(seen1) == 2 * 2 * 2  # two views, two epochs of two steps
    of_rank = []
    for seen in (seen0, seen1):
        for epoch in (0, 4):
            images = torch.cat(seen[epoch : epoch + 4 : 2])
            assert images.shape == (16, 3, 8, 8)
            assert len(images.flatten(1).unique(dim=0)) == 16  # each image once an epoch
        of_rank.append({image.numpy().tobytes() for batch in seen for image in batch})
    assert not of_rank[0] & of_rank[1]  # each has images of its own
    assert len(seeds1) == 2
    assert not seeds0 & seeds1


def test_one_process_goes_on_where_two_have_stopped(script, two_ranks, folder, monkeypatch, capsys):
    monkeypatch.setattr(script, "build_backbone", Small)
    flags = f"--data {folder} {FLAGS} --epochs 4 --out {two_ranks / script.__name__}".split()
    script.main([*flags, "--resume"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed if line[:6] == "epoch "] == ["4"]


def test_nt_xent_on_two_ranks_equals_one_process(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(NT_XENT)
    finish(torchrun(driver, tmp_path))
    torch.manual_seed(0)
    network, x1, x2 = nn.Linear(12, 6), torch.randn(8, 12), torch.randn(8, 12)
    loss = simclr.nt_xent(network(x1), network(x2), 0.5)
    loss.backward()
    single = [loss.detach(), *(p.grad for p in network.parameters())]
    for rank in (0, 1):
        for a, b in zip(single, torch.load(tmp_path / f"rank{rank}.pt")):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=0)
    assert single[1].abs().max() > 1e-3  # a gradient that is all zero would prove nothing


def test_an_uneven_split_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **_: None)
    flags = f"--data {folder} --size 8 --device cpu --batch-size 15 --out {tmp_path / 'run'}"
    with pytest.raises(SystemExit, match="48 images; --batch-size: fewer, 2 x n"):
        simclr.main(flags.split())
    assert not (tmp_path / "run").exists()


def processes_of(text):
    """{rank: process id} of the running workers with text in their command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            variables = (folder / "environ").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        ranks = [v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")]
        if ranks and text in words:
            found[int(ranks[0])] = int(folder.name)
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks through /proc")
def test_a_killed_rank_ends_the_run(folder, tmp_path):
    out = str(tmp_path / "run")
    flags = f"--data {folder} {FLAGS} --epochs 1000 --out {out}".split()
    process = torchrun(ROOT / "simsiam.py", *flags)
    line = ""
    while "epoch 1 " not in line:
        line = process.stdout.readline()
        assert line, process.stderr.read()
    os.kill(processes_of(out)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "SIGKILL" in err or "exitcode: -9" in err.replace(" ", "").replace(":", ": ")
    assert processes_of(out) == {}
