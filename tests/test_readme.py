"""The README's commands and code do what it says."""

import importlib
import re
import shlex
import subprocess
import sys

import bench
import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [
    part.strip()
    for line in re.findall(r"^    ((?:python|pip|torchrun) .*)$", README, flags=re.MULTILINE)
    for part in line.split("&&")
]


def test_commands_are_found():
    assert len(COMMANDS) > 10
    assert {"python simsiam.py", "python tests/toy.py data/toy"} <= set(COMMANDS)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_the_flags_of_each_command(command):
    words = shlex.split(command)
    if words[0] == "pip":
        assert (ROOT / words[-1]).exists()
        return
    words = [word for word in words[1:] if not word.startswith("--nproc_per_node")]
    if words == ["-m", "pytest"] or words[0] == "tests/toy.py":  # toy.py: below
        return
    if words[0] == "tests/bench.py":
        assert bench.parse_args(words[1:]).batch_size == 256
        return
    script = importlib.import_module(words[0].removesuffix(".py"))
    args = script.parse_args(words[1:])
    assert args.size is None or args.size >= 8


def test_the_toy_set_as_the_readme_makes_it(tmp_path, capsys):
    """Drawn once, trained on for an epoch of a subset, measured and drawn by the README's flags."""
    data, out, pictures = tmp_path / "toy", tmp_path / "run", tmp_path / "pictures"
    make = [sys.executable, str(ROOT / "tests" / "toy.py"), str(data)]
    assert subprocess.run(make, capture_output=True, timeout=100).returncode == 0
    assert len(list(data.rglob("*.png"))) == 2500
    again = subprocess.run(make, capture_output=True, text=True, timeout=100)
    assert (again.returncode, len(again.stderr.splitlines())) == (2, 1)
    train = next(command for command in COMMANDS if "simclr.py --data data/toy" in command)
    flags = shlex.split(train)[2:] + ["--data", str(data), "--out", str(out), "--device", "cpu"]
    importlib.import_module("simclr").main([*flags, "--epochs", "1", "--subset", "64"])
    probe = next(command for command in COMMANDS if "--pictures" in command)
    flags = shlex.split(probe)[3:] + ["--pictures", str(pictures), "--subset", "100"]
    importlib.import_module("linear_eval").main([str(out / "checkpoint.pt"), *flags])
    assert len(list(pictures.iterdir())) == 3
    assert "linear top-1: " in capsys.readouterr().out


def test_the_snippet_for_plain_torchvision(runs, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "simsiam").symlink_to(runs / "simsiam")
    monkeypatch.chdir(tmp_path)
    snippet = next(
        code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "torchvision" in code
    )
    names = {}
    exec(snippet, names)
    backbone = names["backbone"].eval()
    assert backbone(names["torch"].zeros(2, 3, 32, 32)).shape == (2, 512)


def test_the_forward_that_the_readme_shows_is_the_scripts():
    shown = next(
        code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "def forward" in code
    )
    indented = "".join(f"    {line}\n" for line in shown.splitlines())
    assert indented in (ROOT / "simsiam.py").read_text()


def test_the_diff_that_the_readme_shows_is_the_scripts():
    shown = re.search(r"```diff\n(.*?)```", README, re.S)[1].splitlines()
    for sign, name in (("-", "simsiam"), ("+", "byol")):
        source = (ROOT / f"{name}.py").read_text().splitlines()
        assert [line for line in shown if line[0] == sign and line[1:] not in source] == []
