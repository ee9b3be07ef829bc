"""The examples run as they stand, in a new folder, and say what they found."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
NOTEBOOK = ROOT / "examples/digits.ipynb"
# What else than torch a script cannot do without; the others import it where --out asks for it.
NEEDS = {
    "diffusers_decoder": "diffusers",
    "flow_decoder": "zuko",
    "geodesics": "matplotlib",
    "lightning_module": "lightning",
}
QUICK = ["conv_vae"]
# What a line of their output says, from the last such line, and what it must lie between.
FOUND = {
    "conv_vae": ("held-out digits: sampled ELBO ", -520, -480),
    "learned_noise_var": ("learned c ", 0.05, 0.065),
    "sindy": ("   uv ", -1.05, -0.95),
    "diffusers_decoder": ("step  9: loss ", -100, 50),
    "distributed": ("weights after 50 steps differ by at most ", 0, 2e-3),
}


def test_each_is_short_and_explained():
    assert len(EXAMPLES) >= 12
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    names = [path.name for path in (*EXAMPLES.values(), NOTEBOOK)]
    assert [name for name in names if f"examples/{name}" not in pages] == []
    sources = {name: path.read_text() for name, path in EXAMPLES.items()}
    assert {n: len(s.splitlines()) for n, s in sources.items() if len(s.splitlines()) > 80} == {}
    for name, source in sources.items():
        told = ast.get_docstring(ast.parse(source)) or ""
        assert f"examples/{name}.py" in told, f"{name} does not say how it is run"
        assert "pip install 'fastsfvae[" in told or "the library alone" in told, name


def _run(name, folder):
    pytest.importorskip(NEEDS.get(name, "torch"))
    path = EXAMPLES[name]
    start = [sys.executable]
    if name == "distributed":
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    writes = "--out" in path.read_text()
    if writes:
        pytest.importorskip("matplotlib")
    done = subprocess.run(
        [*start, str(path), *(["--out", str(folder / "written")] if writes else [])],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::UserWarning"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2 and "nan" not in done.stdout
    if name in FOUND:
        said, low, high = FOUND[name]
        *_, line = (line for line in done.stdout.splitlines() if line.startswith(said))
        value = float(line.removeprefix(said).split()[0].rstrip(","))
        assert low <= value <= high, line
    # Nothing is left in the folder that a script was started in.
    assert [path.name for path in folder.iterdir()] == ["written"] * writes
    if writes:
        (written,) = (folder / "written").iterdir()
        assert written.stat().st_size > (10_000 if written.suffix == ".png" else 500)


@pytest.mark.parametrize("name", QUICK)
def test_an_example(name, tmp_path):
    _run(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - set(QUICK)))
def test_a_longer_example(name, tmp_path):
    _run(name, tmp_path)


def test_the_notebook_is_stored_with_its_outputs_and_nothing_of_a_machine():
    nbformat = pytest.importorskip("nbformat")
    assert NOTEBOOK.stat().st_size < 600_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert {key for cell in notebook.cells for key in cell.metadata} == set()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 4
    assert {out.output_type for out in outputs} <= {"stream", "display_data"}
    # What it prints is its own, no warning of a library's: those have paths.
    assert {out.name for out in outputs if out.output_type == "stream"} == {"stdout"}
    assert "".join(out.get("text", "") for out in outputs).count("/") <= 10


# Behind its last cell: the numbers that it draws conclusions from.
TOLD = """
import json
print("TOLD", json.dumps({"judged": judged, "noise": noise, "bias": bias, "ratios": ratios}))
"""


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    for module in ("ipykernel", "matplotlib"):
        pytest.importorskip(module)
    monkeypatch.setenv("FASTSFVAE_NOTEBOOK_SCALE", "0.1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(TOLD))
    place = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=300, resources=place).execute()
    text = notebook.cells[-1].outputs[0].text
    told = json.loads(text.partition("TOLD ")[2])
    for objective, elbo, log_ml in told["judged"].values():
        assert -560 < elbo < log_ml < -470 and abs(objective - elbo) < 60
    assert told["noise"]["expected"] == told["noise"]["precision"] == 0
    assert 0.1 < told["noise"]["10 draws"] < told["noise"]["1 draw"] < 5
    assert 0 < told["bias"]["expected"] < 2
    assert told["ratios"]["expected"] < told["ratios"]["precision"] < 5
