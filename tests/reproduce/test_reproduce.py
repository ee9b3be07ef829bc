import csv
import io
import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastsfvae import training
from fastsfvae.cli import main as cli
from fastsfvae.data import files
from fastsfvae.elbo import sampling_free_elbo
from fastsfvae.reproduce import (
    EXPERIMENTS,
    Options,
    choose,
    figures,
    reproduce,
    runner,
    sizes,
    tables,
)
from fastsfvae.reproduce.cells import Cell, Experiment, Published, Result
from fastsfvae.reproduce.measures import (
    Collapse,
    Likelihoods,
    LikelihoodsAndObjective,
    Quality,
    images_of,
)
from fastsfvae.reproduce.runner import run_cells, stored_results
from fastsfvae.reproduce.sizes import step_ratios
from fastsfvae.training import loop
from fastsfvae.training.config import TrainConfig

CONFIG = TrainConfig(
    method="sampling", model="linear", latent_dim=2, train_images=32, batch_size=32
)


@dataclass(frozen=True)
class Weights:
    """The steps and a number that every step of training changes."""

    conventions = {"weight": "sum of the decoder's"}

    def __call__(self, run):
        total = sum(float(p.detach().double().sum()) for p in run.decoder.parameters())
        return {"step": run.step, "weight": total, "gamma seen": _gamma(run)}


def _gamma(run):
    return float(run.scheduled["gamma"][1]) if run.scheduled else math.nan


def test_labels_of_points_do_not_overlap():
    pytest.importorskip("matplotlib")
    figure, (axes,) = figures.row_of_panels(1, 4.6, 3.6)
    places = [(10 * 1.03**i, 31 + 0.02 * (i % 3), "C0") for i in range(30)] + [(100, 40, "C1")]
    axes.plot(*zip(*(place[:2] for place in places), strict=True), ".")
    figures.log_seconds(axes)
    figures.label_points(axes, places, [str(3**i % 1000) for i in range(len(places))])
    figure.savefig(io.BytesIO(), format="png")
    boxes = [text.get_window_extent() for text in axes.texts]
    # Some have no place; who stands alone has one.
    assert 2 < len(boxes) < len(places) and axes.texts[-1].get_color() == "C1"
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def _cell(at=(3, 7), **settings):
    paper = {"weight": {7: Published(1.5, 0.25)}}
    return Cell("a, b=1", replace(CONFIG, **settings), Weights(), at, 2, paper)


def test_stored_cells_are_not_run_again_and_longer_ones_go_on(tmp_path, monkeypatch):
    lines = []
    run_cells([_cell(at=(3,))], tmp_path, lines.append)
    assert len(lines) == 2
    first = stored_results([_cell(at=(3,))], tmp_path)
    assert [result.seed for result in first] == [0, 1]
    assert first[0].measured(3)["weight"] != first[1].measured(3)["weight"]

    run_cells([_cell()], tmp_path, lines.append)
    longer = stored_results([_cell()], tmp_path)
    # Straight to the end, in another folder: the same weights, bit for bit.
    run_cells([_cell(at=(7,))], tmp_path / "straight", lines.append)
    straight = stored_results([_cell(at=(7,))], tmp_path / "straight")
    for seed in (0, 1):
        assert longer[seed].measured(3) == first[seed].measured(3)
        assert longer[seed].measured(7)["step"] == 7
        assert longer[seed].measured(7)["weight"] == straight[seed].measured(7)["weight"]
        assert training.resume(longer[seed].folder).finished

    def refuse(*_):
        raise AssertionError("a finished cell was trained")

    monkeypatch.setattr(training, "train", refuse)
    del lines[:]
    run_cells([_cell()], tmp_path, lines.append)
    assert lines == []


@dataclass(frozen=True)
class OtherWeights(Weights):
    """What another table measures of the same run."""


def test_a_run_that_another_table_took_past_a_step_is_made_anew(tmp_path):
    lines = []
    run_cells([_cell(at=(7,))], tmp_path, lines.append)
    for at in ((3, 7), (2,), (9,)):
        run_cells([replace(_cell(at=at), measure=OtherWeights())], tmp_path, lines.append)
    assert not any("failed" in line for line in lines)
    (first, _), (other, _) = (
        stored_results([replace(_cell(at=(2, 3, 7, 9)), measure=m)], tmp_path)
        for m in (Weights(), OtherWeights())
    )
    assert [first.steps, other.steps] == [[7], [2, 3, 7, 9]]
    assert other.measured(7)["weight"] == first.measured(7)["weight"]
    # 2 and 3 were past in the first folder, and 2 in the second; the first goes on to 9.
    runs = sorted(path.name for path in (tmp_path / "runs").glob("*seed0*"))
    assert [name.removeprefix(first.folder.name) for name in runs] == ["", "-2", "-3"]
    assert other.trained_steps == 9


def test_a_killed_cell_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    save = loop.save

    def die(run, *arguments):
        save(run, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save", die)
    with pytest.raises(KeyboardInterrupt):
        run_cells([_cell()], tmp_path, print)
    assert stored_results([_cell()], tmp_path) == []
    monkeypatch.setattr(loop, "save", save)
    run_cells([_cell()], tmp_path, print)
    run_cells([_cell()], tmp_path / "whole", print)
    killed, whole = (stored_results([_cell()], out) for out in (tmp_path, tmp_path / "whole"))
    assert killed[0].measured(7)["weight"] == whole[0].measured(7)["weight"]


def test_a_schedule_lasts_until_the_last_measurement(tmp_path):
    cell = Cell(
        "scheduled",
        replace(CONFIG, method="sampling-free", gamma_schedule="steps:0.9,0.7"),
        Weights(),
        (2, 4, 6),
    )
    run_cells([cell], tmp_path, print)
    (result,) = stored_results([cell], tmp_path)
    seen = [result.measured(step)["gamma seen"] for step in (2, 4, 6)]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor([0.9, 0.7, 0.5]))
    # Of another length it is another run.
    assert stored_results([replace(cell, at=(2, 4))], tmp_path) == []


def test_missing_data_leaves_out_its_cells_alone(tmp_path):
    lines = []
    missing = replace(CONFIG, data="mnist", data_dir=str(tmp_path / "nowhere"))
    cells = [replace(_cell(), name="lost", config=missing), _cell(at=(1,))]
    run_cells(cells, tmp_path / "out", lines.append)
    assert lines[0].startswith("lost: left out, ") and "nowhere" in lines[0]
    assert [result.cell.name for result in stored_results(cells, tmp_path / "out")] == [
        "a, b=1"
    ] * 2


def _result(seed, values):
    record = {"measured": {str(step): {"weight": v} for step, v in values.items()}}
    record |= {"config": {"seed": seed, "steps": 7}, "commit": "abc"}
    return Result(_cell(), seed, None, record)


def test_tables_hold_the_mean_the_spread_and_the_paper():
    results = [_result(0, {3: 1.0, 7: 2.0}), _result(1, {3: 4.0})]
    rows = list(csv.DictReader(io.StringIO(tables.summary_csv(results))))
    assert [(r["steps"], r["mean"], r["seeds"], r["paper"]) for r in rows] == [
        ("3", "2.5", "2", ""),
        ("7", "2", "1", "1.5"),
    ]
    # sd of 1 and 4 with n - 1: 3 / sqrt 2.
    assert rows[0]["standard deviation over seeds"] == "2.1213"
    assert rows[1]["standard deviation over seeds"] == ""

    runs = list(csv.DictReader(io.StringIO(tables.runs_csv(results))))
    assert [(r["seed"], r["steps"], r["weight"]) for r in runs] == [
        ("0", "3", "1"),
        ("0", "7", "2"),
        ("1", "3", "4"),
    ]
    experiment = Experiment("Title", lambda _: [], lambda _: None, ("we assume",))
    text = tables.markdown("table9", experiment, results, [replace(_cell(), seeds=5)])
    assert "| a, b=1 | 3 | 2 | 2.5 ± 2.1 |" in text
    assert "| a, b=1 | 7 | 1 | 2 (paper 1.5 ± 0.25) |" in text
    assert "2 runs; 1 of the protocol's 5 are finished." in text and "- we assume" in text


def test_collapse_of_a_decoder_that_ignores_z(tmp_path):
    run = training.start(replace(CONFIG, method="sampling-free", steps=1), tmp_path / "run")
    x = run.images[:32].double() / 255
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
        # q(z|x) = N(0, 1) in the first dimension, N(1, 1) in the second: 0 and 1/2 nats.
        run.encoder.trunk[-1].bias[1] = 1.0
        run.decoder[0].bias.fill_(0.25)
    error = float((x - 0.25).square().flatten(1).sum(1).mean())
    expected = {
        "collapse %": 50.0,
        "error at the mean": error,
        "error, sampled": error,
        "error at the mean / c": 2 * error,
        "error, sampled / c": 2 * error,
        "KL": 0.5,
    }
    measured = Collapse()(run)
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        # A float32 sum of 784 squares.
        assert measured[name] == pytest.approx(value, rel=784 * 2**-24), name


def test_a_runs_own_objective_is_at_the_gamma_of_its_last_step(tmp_path):
    settings = {"method": "sampling-free", "gamma_schedule": "steps:0.9,0.7"}
    config = replace(CONFIG, **settings, steps=2, schedule_steps=6)
    training.train(training.start(config, tmp_path / "run"))
    run = training.resume(tmp_path / "run")
    measured = LikelihoodsAndObjective(samples=2, images=40)(run)
    x = images_of(run, "test", 40)
    with torch.no_grad():
        terms = sampling_free_elbo(run.decoder, x, *run.encoder(x), noise_var=0.5, gamma=0.9)
    expected = -float(terms.elbo.mean()) - 392 * math.log(math.pi)
    assert measured["NLL, by its own objective"] == pytest.approx(expected, rel=1e-6)
    assert measured.items() >= Likelihoods(samples=2, images=40)(run).items()


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("quick", [False, True])
def test_every_protocol_has_distinct_runs(name, quick):
    cells = choose(name, Options(quick=quick))
    assert len({cell.slug for cell in cells}) == len(cells)
    for cell in cells:
        assert list(cell.at) == sorted(set(cell.at)) and cell.at[0] >= 1
        steps = {step for values in cell.paper.values() for step in values}
        assert quick or steps <= set(cell.at)
        assert cell.measure.conventions


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_printed_value_stands_beside_a_set_that_the_paper_has_not(name):
    cells = choose(name, Options(data="fashion-mnist"))
    assert cells
    assert [cell.name for cell in cells if cell.config.data != "fashion-mnist"] == []
    assert [cell.name for cell in cells if any(cell.paper.values())] == []


def test_the_papers_table4_stands_beside_every_reading():
    cells = {cell.name: cell for cell in choose("table4", Options())}
    assert len(cells) == 21
    assert cells["precision .95, sigmoid, kaiming"].config.gamma == 0.95
    config = cells["precision, sigmoid, kaiming"].config
    assert (config.latent_dim, config.batch_size, config.train_images) == (200, 1000, 1000)
    for name, cell in cells.items():
        values = (172.5, 46.2) if name.startswith("sampling,") else (38.7, 9.8)
        for error in ("error at the mean", "error, sampled", "error, sampled / c"):
            assert tuple(cell.paper[error][step].value for step in (100, 1000)) == values


def test_earlier_results_stay_in_the_table_under_other_options(tmp_path, monkeypatch):
    experiment = Experiment("T", lambda _: [_cell()], lambda _: None, ())
    monkeypatch.setitem(EXPERIMENTS, "table9", experiment)
    assert reproduce("table9", Options(steps=5, seeds=3), tmp_path)
    assert reproduce("table9", Options(steps=7, seeds=1), tmp_path)
    rows = list(csv.DictReader((tmp_path / "table9.csv").open()))
    counts = {(r["steps"], r["quantity"]): r["seeds"] for r in rows}
    # Three seeds at 3 and 5 steps were measured, one at 7.
    assert [counts[step, "weight"] for step in ("3", "5", "7")] == ["3", "3", "1"]
    with pytest.raises(ValueError, match="'c' is no cell of table9: it has a, b=1"):
        choose("table9", Options(), "c")


def test_records_say_where_they_come_from(tmp_path):
    run_cells([_cell(at=(1,))], tmp_path, print)
    for path in (tmp_path / "runs" / "records").iterdir():
        record = json.loads(path.read_text())
        assert record["config"]["train_images"] == 32 and record["measure"] == "Weights()"
        assert record["device"] and record["torch"] == torch.__version__
        assert record["measured"]["1"]["seconds"] >= 0


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cases = {
        ("table9",): "'table9' is none of table1, ",
        ("table4", "--only", "nothing"): "--only 'nothing' is no cell of table4: it has sampling, ",
        ("table4", "--steps", "-1"): "--steps and --seeds must not be negative",
        ("table4", "--data", "unheard"): "unheard",
        ("table4", "--quick", "--data", "mnist"): "leave out --data mnist",
        ("figure1", "--data", "digits", "--steps", "5"): "a curve of 24 points takes at least 24",
    }
    for arguments, message in cases.items():
        assert cli.main(["reproduce", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("fastsfvae reproduce: ") and error.count("\n") == 1
        assert message in error
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_quick_table_with_its_picture(tmp_path, capsys):
    arguments = ["--quick", "--only", "sampling, identity, torch", "--out", str(tmp_path)]
    assert cli.main(["reproduce", "table4", "--list", *arguments[:3]]) == 0
    listed = "sampling, identity, torch: measured after 10, 40 steps, 1 seeds\n"
    assert capsys.readouterr().out == listed
    assert cli.main(["reproduce", "table4", *arguments]) == 0
    assert "| sampling, identity, torch | 40 | 1 |" in capsys.readouterr().out
    assert (tmp_path / "table4-quick.png").read_bytes().startswith(b"\x89PNG")
    # What an earlier call has finished is read, not trained.
    assert cli.main(["reproduce", "table4", *arguments]) == 0
    assert "seed 0" not in capsys.readouterr().err


def _write_celeba(folder, image):
    base = folder / "img_align_celeba"
    base.mkdir()
    parts = [0] * 64 + [1, 1] + [2] * 4
    names = [f"{index:06}.jpg" for index in range(len(parts))]
    for name in names:
        Image.fromarray(image((218, 178, 3))).save(base / name)
    rows = (f"{name} {part}\n" for name, part in zip(names, parts, strict=True))
    (folder / "list_eval_partition.txt").write_text("".join(rows))


def _write_chairs(folder, image):
    for chair in range(10):
        renders = folder / "rendered_chairs" / f"{chair:02}" / "renders"
        renders.mkdir(parents=True)
        for view in range(8):
            Image.fromarray(image((600, 600, 3))).save(renders / f"image_{view}.png")


def _store_step_times(out, data, sampling, sampling_free):
    """Records of `runtime`, as a run of it would leave them."""
    times = {f"{data}, sampling, m=16": sampling, f"{data}, sampling-free, m=16": sampling_free}
    for cell in choose("runtime", Options(data=data)):
        if cell.name in times:
            path, _ = runner._paths(cell, 0, out)
            path.parent.mkdir(parents=True, exist_ok=True)
            ms = times[cell.name]
            measured = {"ms per step": ms, "ratio to a sampling step": ms / sampling}
            record = {"config": {}, "measured": {"1": measured}}
            path.write_text(json.dumps(record))


def test_the_matching_budget_is_the_measured_one(tmp_path):
    assert step_ratios(Options(), tmp_path) == {}
    _store_step_times(tmp_path, "chairs", 20, 25)
    _store_step_times(tmp_path, "celeba", 20, 50)
    ratios = step_ratios(Options(), tmp_path)
    assert ratios == {"celeba": 2.5, "chairs": 1.25}
    # Whatever one call measured, another's --data does not hide it.
    assert step_ratios(Options(data="celeba"), tmp_path) == ratios
    options = Options(step_ratios=ratios | {"chairs": 1_000_000 / 650_000})
    cells = {cell.name: cell for cell in choose("table2", options)}
    ours, theirs = cells["celeba, sampling-free, m=16"], cells["chairs, sampling-free, m=16"]
    assert (ours.at, theirs.at) == ((400_000, 1_000_000), (650_000, 1_000_000))
    assert cells["celeba, sampling, m=16"].at == (1_000_000,)
    # The paper's own budget is named where ours is another.
    assert str(ours.paper["FID"][400_000]) == "98 ± 1.79 at 650,000"
    assert str(theirs.paper["FID"][650_000]) == "54.21 ± 1.63"
    assert str(ours.paper["FID"][1_000_000]) == "95.79 ± 0.33"


@pytest.mark.parametrize("ratio, at", [(0.9, (20,)), (1.01, (20,)), (1.1, (18, 20)), (99, (1, 20))])
def test_a_matching_budget_lies_before_the_end(ratio, at):
    options = Options(step_ratios={"celeba": ratio}, steps=20)
    (cell,) = choose("table2", options, "celeba, sampling-free, m=16")
    assert options.apply(cell).at == at


def test_a_call_for_one_data_set_keeps_the_rows_of_others(tmp_path, monkeypatch):
    _store_step_times(tmp_path, "celeba", 20, 50)
    monkeypatch.setattr(runner, "_run", lambda *_: None)
    assert not reproduce("runtime", Options(data="chairs"), tmp_path)
    assert (
        '"celeba, sampling-free, m=16",1,ms per step,50' in (tmp_path / "runtime.csv").read_text()
    )


def test_a_run_keeps_the_budget_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(Quality, "__call__", lambda self, run: {"log ML": -float(run.step)})

    def call():
        options = Options(quick=True, steps=20, seeds=1)
        options = replace(options, step_ratios=step_ratios(options, tmp_path))
        done = reproduce("table2", options, tmp_path, "digits, sampling-free, m=16")
        return done, (tmp_path / "table2-quick.md").read_text()

    done, table = call()
    assert done and "| digits, sampling-free, m=16 | 13 | 1 | -13 |" in table
    assert "13 of 20 sampling-free steps" in table and "the paper's, none was measured" in table
    # Another ratio, measured when the run is past the budget that follows from it.
    monkeypatch.setattr(sizes, "measured_ratios", lambda *_: {"digits": 4.0})
    assert call() == (done, table)
    # A run that was begun and not measured keeps its own as well.
    (record,) = (tmp_path / "runs" / "records").iterdir()
    stored = json.loads(record.read_text()) | {"measured": {}}
    record.write_text(json.dumps(stored))
    assert step_ratios(Options(quick=True), tmp_path) == {"digits": 1_000_000 / 650_000}


@pytest.mark.slow
@pytest.mark.parametrize("data", ["celeba", "chairs"])
def test_table2_runs_on_a_small_set_in_the_true_format(data, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSFVAE_CACHE", str(tmp_path / "cache"))
    # The published numbers of chairs and views, whose lack is refused.
    monkeypatch.setattr(files, "_CHAIRS", 10)
    monkeypatch.setattr(files, "_VIEWS", 8)
    rng = np.random.default_rng(0)
    write = {"celeba": _write_celeba, "chairs": _write_chairs}[data]
    write(tmp_path, lambda shape: np.full(shape, rng.integers(256), np.uint8))
    options = Options(data=data, data_dir=str(tmp_path))
    (cell,) = choose("table2", options, f"{data}, sampling-free, m=16")
    config = cell.config
    assert (config.model, config.latent_dim, config.lr, config.gamma) == ("conv", 16, 1e-4, 0.5)
    assert (config.noise_var, config.batch_size, cell.seeds) == (0.5, 64, 3)
    assert cell.at == (650_000, 1_000_000)
    assert cell.paper["FID"][650_000].value == {"celeba": 98.00, "chairs": 54.21}[data]

    # All of the protocol but its length.
    small = replace(cell, at=(1, 2), seeds=1, measure=Quality(Likelihoods(samples=20, images=4)))
    lines = []
    run_cells([small], tmp_path / "out", lines.append)
    assert lines == [f"{data}, sampling-free, m=16, seed 0: 2 steps"]
    (result,) = stored_results([small], tmp_path / "out")
    measured = result.measured(2)
    constant = 0.5 * 12288 * math.log(2 * math.pi * 0.5)
    assert measured["NLL"] == pytest.approx(-measured["log ML"] - constant, abs=1e-6)
    # Pixels in [0, 1] and a decoder near 0: |x - f|^2 / (2c) is at most n.
    assert 0 < measured["NLL"] < 1.01 * 12288
