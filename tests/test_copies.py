"""The scripts stay in step: equal functions are equal to the letter, and each stands alone."""

import ast
import difflib
import shutil
import subprocess
import sys

import pytest
from conftest import METHODS, ROOT

SCRIPTS = (*METHODS, "linear_eval")
# These differ, by the lines that test_small_diff allows
OWN = {"main", "parse_args", "augment", "train_step"}
SHARED = {
    "random_resized_crop",
    "rotate_hue",
    "normalize",
    "build_backbone",
    "list_images",
    "load_split",
    "track",
    "compute_features",
    "knn_accuracy",
    "spread",
    "save",
}


def source(name):
    return (ROOT / f"{name}.py").read_text()


def functions(name):
    """{name: source} of what is defined at module level."""
    text = source(name)
    kinds = (ast.FunctionDef, ast.ClassDef)
    defined = [node for node in ast.parse(text).body if isinstance(node, kinds)]
    return {node.name: ast.get_source_segment(text, node) for node in defined}


@pytest.mark.parametrize("other", ["byol", "simclr"])
def test_equal_functions_are_equal_to_the_letter(other):
    a, b = functions("simsiam"), functions(other)
    same = (a.keys() & b.keys()) - OWN
    assert same >= SHARED
    assert [name for name in same if a[name] != b[name]] == []


@pytest.mark.parametrize("name", ["list_images", "knn_accuracy"])
def test_the_probe_reads_and_votes_as_the_scripts_do(name):
    """But for STL-10, of which it takes the labeled images alone."""
    differ = changes(functions("simsiam")[name], functions("linear_eval")[name])
    if name == "list_images":
        assert all("STL10" in line or "unlabeled" in line for line in differ)
        assert len(differ) == 3
    else:
        assert differ == []


def changes(a, b):
    lines = difflib.ndiff(a.split("\n"), b.split("\n"))
    return [line for line in lines if line[0] in "+-"]


@pytest.mark.parametrize("other", ["byol", "simclr"])
def test_small_diff(other):
    assert len(changes(source("simsiam"), source(other))) <= 100
    a, b = functions("simsiam"), functions(other)
    limits = {"main": 10, "parse_args": 10, "augment": 7, "train_step": 10}
    assert {name for name in OWN if len(changes(a[name], b[name])) > limits[name]} == set()


@pytest.mark.parametrize("name", SCRIPTS)
def test_length(name):
    limits = {"simsiam": 378, "byol": 388, "simclr": 378, "linear_eval": 507}
    assert len(source(name).splitlines()) <= limits[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports(name):
    modules = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    wanted = {"torch", "torchvision", "PIL"}
    if name == "linear_eval":
        wanted |= {"safetensors", "pillow_heif"}  # where they are installed
    assert modules - set(sys.stdlib_module_names) <= wanted


def test_a_lone_copy_runs(folder, tmp_path):
    """In a folder of its own; test_imports holds for all of them that nothing else is needed."""
    shutil.copy(ROOT / "simsiam.py", tmp_path)
    flags = f"--data {folder} --size 8 --device cpu --epochs 1 --batch-size 48".split()
    command = [sys.executable, "simsiam.py", *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\r" not in result.stdout  # which is no terminal
    assert (tmp_path / "runs" / "simsiam" / "checkpoint.pt").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_only_definitions_at_module_level(name):
    allowed = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.If)
    body = ast.parse(source(name)).body
    assert isinstance(body[0], ast.Expr)  # the docstring
    assert all(isinstance(node, allowed) for node in body[1:])
