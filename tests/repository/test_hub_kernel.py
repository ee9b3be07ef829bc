"""The kernel of the Hugging Face hub: what is written, and that `kernels` loads and runs it.

It is loaded in processes of its own that find neither fastsfvae nor the clone: its folder kernels/
has the name of that package.
"""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from fastsfvae.kernels.hub.__main__ import build, main

ROOT = Path(__file__).parents[2]
PACKAGES = ("build/torch-cuda", "build/torch-cpu", "torch-ext/gram_woodbury")
# What kernel-builder writes into torch-ext/ by itself.
GENERATED = {"_ops.py", "gram_woodbury/__init__.py", "metadata.json"}
ALLOWED = {"torch", "triton", *sys.stdlib_module_names}
LOADED = """
import sys
sys.modules["fastsfvae"] = None
import runpy
from pathlib import Path
import torch
from kernels import get_local_kernel
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

here = Path.cwd()
backends = [str(backend).lower() for backend in Build.open(here).general.backends]
assert backends == ["cuda", "cpu"], backends
J, r, h = torch.randn(2, 3, 7).double(), torch.randn(2, 7).double(), torch.rand(2, 3).double()
covariance = 0.5 * torch.eye(7) + torch.einsum("bmi,bm,bmj->bij", J, h, J)
density = torch.distributions.MultivariateNormal(torch.zeros(7).double(), covariance)
for backend in {"cpu", None}:
    kernel = get_local_kernel(here, backend=backend)
    variant = Path(kernel.__file__).parent
    assert variant.parent == here / "build", variant
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert metadata.id == kernel.__name__ and metadata.version == 0, metadata
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    # Where older versions of `kernels` look.
    older = runpy.run_path(str(variant / "gram_woodbury/__init__.py"))
    assert all(older[name] is getattr(kernel, name) for name in kernel.__all__)
    terms = kernel.low_rank_terms(J, r, h, 0.5, backend="torch")
    quadratic = (terms.squared_error - terms.explained) / 0.5
    found = -0.5 * (7 * torch.tensor(torch.pi).double().log() + terms.log_det + quadratic)
    torch.testing.assert_close(found, density.log_prob(r))
    try:
        kernel.low_rank_terms(J.float(), r.float(), h, 0.5)
        raise AssertionError("CPU tensors passed")
    except RuntimeError as error:
        assert "move it to a GPU" in str(error) and chr(10) not in str(error), error
"""
OWN_TESTS = """
import sys
sys.modules["fastsfvae"] = None
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests"]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "gram-woodbury"
    build(folder)
    return folder


def files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def run(code, folder, **environment):
    try:
        version("kernels")
    except PackageNotFoundError:
        pytest.skip("needs the package kernels")
    # Nor a connection: what is not in the folder is not found.
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    } | environment
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_builds_are_of_the_same_sources(folder):
    first, *others = (
        {n: t for n, t in files(folder / p).items() if n not in GENERATED} for p in PACKAGES
    )
    assert first and all(other == first for other in others)


def test_kernels_are_copied_as_they_are(folder):
    copies = files(folder / "torch-ext/gram_woodbury/_fastsfvae/kernels")
    assert {"gram_project.py", "woodbury.py", "woodbury_float64.py", "tiles.json"} < copies.keys()
    # The package's description lists its modules, of which not all are here.
    del copies["__init__.py"]
    assert copies == {name: (ROOT / "kernels" / name).read_text() for name in copies}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_itself_torch_and_triton_alone(folder, package):
    modules = {n: t for n, t in files(folder / package).items() if n.endswith(".py")}
    for name, text in modules.items():
        assert '"fastsfvae::' not in text, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= ALLOWED, name
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.partition(".")[0] in ALLOWED, name
            elif isinstance(node, ast.ImportFrom):
                above = name.split("/")[: -node.level]
                stem = "/".join([*above, *(node.module or "").split(".")]).rstrip("/")
                inside = {f"{stem}.py", f"{stem}/__init__.py".lstrip("/")} & modules.keys()
                assert inside or stem == "_ops", (name, stem)


def test_nothing_is_overwritten(folder, capsys):
    before = files(folder)
    with pytest.raises(FileExistsError, match="remove it, or name another folder"):
        build(folder)
    assert main([str(folder)]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and files(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_kernels_loads_it(folder):
    run(LOADED, folder)


@pytest.mark.slow
def test_its_own_tests_pass(folder):
    run(OWN_TESTS, folder, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_the_cards_example_runs(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "CARD.md").read_text(), re.DOTALL)
    # Where and on what it runs here; a batch of 64 is slow in the interpreter.
    for old, new in {
        '"cuda"': '"cpu"',
        "build/hub/gram-woodbury": ".",
        "= 64, 16": "= 2, 16",
    }.items():
        assert old in code
        code = code.replace(old, new)
    code += "assert J.grad.isfinite().all() and not lost.any()"
    run(f"import sys\nsys.modules['fastsfvae'] = None\n{code}", folder, TRITON_INTERPRET="1")
