"""Several processes under torchrun: equal parameters, one writer, global negatives, no hang."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import METHODS, ROOT

FLAGS = "--size 8 --batch-size 16 --device cpu"
# What each rank runs: the script's main, then every rank leaves its own weights behind.
DRIVER = """
import importlib, os, sys
import torch
name, kind, folder = sys.argv[1:4]
script, models = importlib.import_module(name), []
class Spy(getattr(script, kind)):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        models.append(self)
setattr(script, kind, Spy)
script.main(sys.argv[4:])
torch.save(models[0].state_dict(), f"{folder}/rank{os.environ['RANK']}.pt")
"""
NT_XENT = """
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
"""


def torchrun(*command, processes=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
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


@pytest.mark.parametrize(("method", "kind"), METHODS.items())
def test_two_ranks_train_as_one_and_one_process_goes_on(method, kind, folder, tmp_path):
    driver, out = tmp_path / "driver.py", tmp_path / "run"
    driver.write_text(DRIVER)
    flags = f"--data {folder} {FLAGS} --out {out}".split()
    printed = finish(torchrun(driver, method, kind, tmp_path, *flags, "--epochs", "2"))
    assert printed.count("epoch 1 ") == printed.count("epoch 2 ") == 1
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "log.csv", "views.png"]
    states = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    trained = [name for name in states[0] if not name.endswith(("_mean", "_var", "_tracked"))]
    assert [name for name in trained if not torch.equal(states[0][name], states[1][name])] == []
    saved = torch.load(out / "checkpoint.pt")["model"]
    assert all(torch.equal(saved[name], states[0][name]) for name in saved)
    # one process resumes what two have begun
    command = [sys.executable, str(ROOT / f"{method}.py"), *flags, "--epochs", "3", "--resume"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    epochs = [line.split()[1] for line in result.stdout.splitlines() if line[:6] == "epoch "]
    assert epochs == ["3"]


def test_nt_xent_on_two_ranks_equals_one_process(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(NT_XENT)
    results = []
    for processes in (1, 2):
        finish(torchrun(driver, tmp_path, processes=processes))
        results += [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(processes)]
    single, first, second = results
    for a, b, c in zip(single, first, second):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=0)
        torch.testing.assert_close(c, a, atol=1e-5, rtol=0)
    assert single[1].abs().max() > 1e-3  # a gradient that is all zero would prove nothing


def test_an_uneven_split_is_refused(folder, tmp_path):
    flags = f"--data {folder} --size 8 --device cpu --batch-size 15 --out {tmp_path / 'run'}"
    process = torchrun(ROOT / "simsiam.py", *flags.split())
    _, err = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "48 images, 2 ranks: change --batch-size" in err
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
    began = time.time()
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "SIGKILL" in err or "exitcode: -9" in err.replace(" ", "").replace(":", ": ")
    assert time.time() - began < 60
    assert processes_of(out) == {}
