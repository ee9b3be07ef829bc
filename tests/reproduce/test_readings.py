"""What is read off finished runs: equal seconds, break-even ratios, fits, biases, hours."""

import math

import pytest
import torch

from fastsfvae import training
from fastsfvae.cli import main as cli
from fastsfvae.elbo import sampling_free_elbo
from fastsfvae.likelihoods import gaussian_kl
from fastsfvae.reproduce import EXPERIMENTS, Options, choose, recipes, runtime, tables
from fastsfvae.reproduce.bias import _OBJECTIVES, ObjectiveBias
from fastsfvae.reproduce.cells import Published, Result
from fastsfvae.reproduce.measures import Likelihoods
from fastsfvae.reproduce.seconds import doublings, steps_to_reach, value_at
from fastsfvae.training.config import TrainConfig


def _result(cell, measured, seed=0):
    """A run whose measurements are given: step -> quantity -> number."""
    stored = {str(step): values for step, values in measured.items()}
    return Result(cell, seed, None, {"measured": stored})


def _cells(name, **options):
    return {cell.name: cell for cell in choose(name, Options(**options))}


def _timed(cells, beside=5.0, **milliseconds):
    """Step times of cells, by name, each beside a sampling step of so many milliseconds."""
    return [
        _result(
            cells[f"{name}, step time"],
            {1: {"ms per step": value, "ratio to a sampling step": value / beside}},
        )
        for name, value in milliseconds.items()
    ]


def test_curves_are_interpolated_over_log_steps():
    curve = {400: -6.0, 100: -10.0, 200: -6.0, 800: -2.0}
    assert steps_to_reach(curve, -8.0) == pytest.approx(100 * 2**0.5, rel=1e-12)
    assert steps_to_reach(curve, -6.0) == 200
    assert steps_to_reach(curve, -2.0) == 800
    assert steps_to_reach(curve, -1.0) == math.inf
    assert steps_to_reach(curve, -10.0) == steps_to_reach(curve, -12.0) == 0
    assert value_at(curve, 150) == pytest.approx(-10 + 4 * math.log2(1.5), rel=1e-12)
    assert value_at(curve, 800) == -2.0
    assert math.isnan(value_at(curve, 99)) and math.isnan(value_at(curve, 801))
    assert doublings(1000, 4) == (125, 250, 500, 1000)


def _powers(cell, gain, seed=0):
    """A run that gains `gain` nats a doubling in log ML, and as many in the sampled ELBO."""
    curve = {s: {"log ML": gain(s), "sampled ELBO": gain(s)} for s in cell.at}
    return _result(cell, curve, seed)


def test_the_break_even_ratio_is_against_the_best_baseline():
    cells = _cells("wallclock")
    times = {"sampling": 5.0, "antithetic": 6.0, "precision .5": 15.0}
    results = _timed(cells, **times)
    for seed, ahead in enumerate((1, 2)):
        # At equal steps antithetic draws are half a doubling ahead, sampling-free one or two.
        results += [
            _powers(cells["sampling"], math.log2, seed),
            _powers(cells["antithetic"], lambda s: math.log2(s) + 0.5, seed),
            _powers(cells["precision .5"], lambda s, ahead=ahead: math.log2(s) + ahead, seed),
            # 100 steps by precision count for 300 at first, and as much later.
            _powers(cells["precision 100, antithetic"], lambda s: math.log2(s + 200) + 0.5, seed),
        ]
    reading = EXPERIMENTS["wallclock"].reading(results)
    assert cells["precision .5"].at == (250, 500, 1000, 1500, 2000)
    assert cells["sampling"].at[-1] == 16_000 and cells["precision 100, antithetic"].at[-1] == 8000
    # Against sampling alone it would be 2 to 4: of antithetic draws 2^(ahead - 1/2) steps of 1.2.
    factors = [2 ** (ahead - 0.5) * 1.2 for ahead in (1, 2)]
    assert "| precision .5 | 1,000 | {:.2f} to {:.2f} |".format(*factors) in reading
    # The baseline takes 1,200 antithetic steps, of which 900 are taken here too: 300 for 100.
    ratio = 300 * 1.2 / 100
    row = next(
        x for x in reading.splitlines() if x.startswith("| precision 100, antithetic | 1,000")
    )
    found = float(row.split("|")[3])
    # Interpolated over log steps between its points, which bends the curve.
    assert found == pytest.approx(ratio, rel=0.15)
    assert "Time of a step (over that of sampling): sampling 5.00 ms (1.00), antithetic" in reading
    figure = EXPERIMENTS["wallclock"].draw(results)
    first = {line.get_label(): float(line.get_xdata()[0]) for line in figure.axes[0].lines}
    assert first == pytest.approx(
        {
            "sampling": 1.25,
            "antithetic": 1.5,
            "precision .5": 3.75,
            "precision 100, antithetic": 0.1 * 15 + 0.15 * 6,
        }
    )
    # Without sampling's step time there are no seconds.
    assert EXPERIMENTS["wallclock"].draw(results[1:]) is None


def test_a_curve_beyond_the_baselines_is_bounded():
    cells = _cells("wallclock")
    results = _timed(cells, **{"sampling": 5.0, "expected": 20.0})
    results += [
        _result(cells["sampling"], {s: {"log ML": 0.0, "sampled ELBO": 0.0} for s in (250, 500)}),
        _result(cells["expected"], {500: {"log ML": -1.0, "sampled ELBO": 1.0}}),
    ]
    reading = EXPERIMENTS["wallclock"].reading(results)
    assert "| expected | 500 | < 0.50 | > 1.00 |" in reading
    assert "Break-even" not in EXPERIMENTS["wallclock"].reading(results[2:])


def test_equal_seconds_are_read_off_the_curves():
    cells = _cells("wallclock")
    results = _timed(cells, **{"sampling": 5.0, "antithetic": 5.0})
    # The machine was half as fast for a while: its sampling steps tell.
    results += _timed(cells, beside=10.0, **{"precision .5": 30.0})
    results += [
        _powers(cells["sampling"], math.log2),
        _powers(cells["precision .5"], math.log2),
        _powers(cells["precision 100, antithetic"], math.log2),
    ]
    reading = EXPERIMENTS["wallclock"].reading(results)
    lines = reading.split("At equal seconds")[1].split("Break-even")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if "|" in line]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["trained by"][:2] == ["5 s", "7.5 s"]
    # 333 1/3 steps of 15 ms.
    assert by_name["precision .5"][0].startswith(f"{math.log2(1000 / 3):.2f}")
    # 100 of 15 ms and 700 of 5.
    seen = float(by_name["precision 100, antithetic"][0].split(" / ")[0])
    assert seen == pytest.approx(math.log2(800), abs=0.03)


@pytest.mark.parametrize("name", recipes.RECIPES | recipes.WEIGHTS | recipes.LENGTHS)
def test_a_recipe_can_be_shortened(name):
    recipe = (recipes.RECIPES | recipes.WEIGHTS | recipes.LENGTHS)[name]
    config = TrainConfig(**recipes.scaled(recipe, 0.1).settings)
    whole = TrainConfig(**recipe.settings)
    assert config.method == whole.method and config.draws == whole.draws
    assert config.start.steps == pytest.approx(0.1 * whole.start.steps, abs=0.5)
    before, after = (c.schedules["kl_weight"] for c in (whole, config))
    for share in (0, 0.2, 0.4, 0.6, 0.9):
        at = [s.at(round(share * s.length)) for s in (before, after)]
        assert before.constant or at[0] == at[1]


def test_table3_reads_the_sampling_free_run_where_it_took_as_long():
    cells = _cells("table3")
    free, vanilla = cells["digits, sampling-free, precision"], cells["digits, vanilla, K=5"]
    nll = (44, 42, 40, 38, 36)
    assert free.at == (843, 1687, 3375, 6750, 13_500) and vanilla.at == (13_500,)
    own = "NLL, by its own objective"
    results = [
        _result(
            free,
            {s: {"NLL": v, "log ML": -v, own: v - 9} for s, v in zip(free.at, nll, strict=True)},
        ),
        _result(vanilla, {13_500: {"NLL": 38.5, "log ML": -38.5, own: 39.0}}),
    ]
    reading = EXPERIMENTS["table3"].reading(results)
    # The sampling-free run ends at 36, and at 27 by its own objective.
    assert "| digits, vanilla, K=5 | +2.50 | - | +12.00 | - | - | - |" in reading
    # 13,500 steps of 4 ms are 3,375 of 16 ms.
    results += _timed(cells, **{free.name: 16.0, vanilla.name: 4.0})
    reading = EXPERIMENTS["table3"].reading(results)
    assert "| digits, vanilla, K=5 | +2.50 | - | +12.00 | - | 54 | -1.50 |" in reading
    timed = EXPERIMENTS["table3"].draw(results).axes[2].lines
    assert {line.get_label(): list(line.get_xdata())[-1] for line in timed} == pytest.approx(
        {"sampling-free, precision": 216.0, "vanilla": 54.0}
    )


@pytest.mark.parametrize("mean, fits", [(38.9, True), (39.1, False), (29.1, True), (28.9, False)])
def test_a_value_fits_within_both_spreads_together(mean, fits):
    # sqrt(3^2 + 4^2) = 5.
    row = tables.Summary("cell", 1, "KL", mean, 3.0, 10, Published(34.0, 4.0))
    assert row.fits is fits
    assert not row._replace(paper=None).fits
    # A single run has no spread.
    single = row._replace(spread=math.nan)
    assert single.fits is (abs(mean - 34.0) <= 4.0)


def test_table4_claims_no_reading_that_fits_one_row_alone():
    cells = _cells("table4")
    sampling = {"collapse %": 99.0, "error at the mean": 172.0, "error, sampled": 54.0, "KL": 0.1}
    results = [_result(cells["sampling, sigmoid, kaiming"], {100: sampling})]
    reading = EXPERIMENTS["table4"].reading(results)
    assert "| sampling, sigmoid, kaiming | 100 | x | x |  |  |  | x |" in reading
    assert "and its sampling-free one: none." in reading
    free = {"collapse %": 30.0, "error at the mean": 38.6, "error, sampled": 50.0, "KL": 2.9}
    results.append(_result(cells["expected, identity, kaiming"], {100: free}))
    assert "and its sampling-free one: none." in EXPERIMENTS["table4"].reading(results)
    results.append(_result(cells["expected, sigmoid, kaiming"], {100: free}))
    reading = EXPERIMENTS["table4"].reading(results)
    assert "sampling-free one: sigmoid, kaiming, error at the mean after 100 steps." in reading


def test_table4_reads_nothing_into_another_set():
    cell = _cells("table4", data="fashion-mnist")["sampling, sigmoid, kaiming"]
    values = {"collapse %": 99.0, "error at the mean": 172.0, "error, sampled": 54.0, "KL": 0.1}
    assert EXPERIMENTS["table4"].reading([_result(cell, {100: values})]) == ""


def test_the_biases_of_a_linear_decoder_are_the_exact_ones(tmp_path):
    config = TrainConfig(method="sampling", model="linear", latent_dim=2, steps=1)
    run = training.start(config, tmp_path / "run")
    with torch.no_grad():
        # Weights of a size at which the objectives differ by nats.
        run.decoder[0].weight.mul_(3)
    likelihoods = Likelihoods(samples=20, proposal="posterior", images=40)
    measured = ObjectiveBias(likelihoods, repeats=100, batch=16, pairs=2)(run)
    x = run.config.load_images("test")[:40].double() / 255
    encoder, decoder = run.encoder.double(), run.decoder.double()
    with torch.no_grad():
        mean, log_var = encoder(x)
        variance = log_var.exp() @ decoder[0].weight.square().T
        residual = (x - decoder(mean)).flatten(1)
        error = residual.square().sum(1) + variance.sum(1)
        n, c = 784, 0.5
        elbo = -n / 2 * math.log(2 * math.pi * c) - error / (2 * c) - gaussian_kl(mean, log_var)
        # sd of |x - f(z)|^2 / (2c): r^T W s/c and, of second order, |W s|^2 / (2c).
        first = (residual @ decoder[0].weight * (0.5 * log_var).exp() / c).square().sum(1)
        second = variance.sum(1).square() / (2 * c**2)
        noise = float(((first + second) / 10).sum().sqrt()) / len(x)
    for name, objective in _OBJECTIVES.items():
        exact = sampling_free_elbo(decoder, x, mean, log_var, noise_var=0.5, **objective).elbo
        expected = float((exact - elbo).mean().detach())
        if name == "expected":
            assert abs(expected) < 1e-9
        else:
            assert expected > 5 * noise
        assert abs(measured[f"gap, {name}"] - expected) < 5 * noise, name
    # The deviation falls as 1 / sqrt(K); 100 repeats know each to 1 / sqrt(198).
    for one in ("loss deviation", "relative deviation, decoder", "relative deviation, encoder"):
        ratio = measured[f"{one}, K=1"] / measured[f"{one}, K=64"]
        assert ratio == pytest.approx(8, rel=5 * (2 / 198) ** 0.5)
    assert measured["loss bias, expected"] < measured["loss bias, precision .95"]
    for part in ("decoder", "encoder"):
        kinds = ("K=1", "antithetic pair", "2 orthogonal pairs")
        one, pair, two = (measured[f"relative deviation, {part}, {kind}"] for kind in kinds)
        # Two pairs are better than two independent ones.
        assert pair < one and two < pair / 2**0.5


def test_hours_are_listed_where_the_step_was_timed(tmp_path, monkeypatch, capsys):
    def stored(cells, out):
        assert out == tmp_path
        times = {"celeba, sampling, m=16": 36.0, "celeba, vmap(jacfwd), m=16": 1000.0}
        return [
            _result(cell, {1: {"ms per step": times[cell.name]}})
            for cell in cells
            if cell.name in times
        ]

    monkeypatch.setattr(runtime, "stored_results", stored)
    assert cli.main(["reproduce", "table2", "--list", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    # 36 ms, 10^6 steps, 3 runs.
    assert (
        "celeba, sampling, m=16: measured after 1,000,000 steps, 3 seeds, about 30 hours" in lines
    )
    assert lines[-1] == f"hours: of training, by the step times of `runtime` in {tmp_path}"
    assert sum("hours" in line for line in lines) == 2


def test_step_times_are_not_stretched_by_steps():
    cells = {c.name: Options(steps=64).apply(c) for c in choose("wallclock", Options(steps=64))}
    assert cells["sampling, step time"].at == (1,)
    assert cells["precision .5"].at == (8, 16, 32, 48, 64) and cells["sampling"].at[-1] == 512
    # What a start takes of a training keeps its share.
    assert cells["precision 100, antithetic"].config.warm_start == "precision:3"
    with pytest.raises(ValueError, match="--steps 15: the curves take at least 16"):
        choose("wallclock", Options(steps=15))


def test_a_method_has_one_colour_in_the_panels_of_all_sets():
    cells = _cells("table3")
    measured = {"NLL": 30.0, "NLL, by its own objective": 31.0}
    names = "digits, vanilla, K=1", "digits, IWAE, K=1", "mnist, IWAE, K=1"
    results = [_result(cells[name], {cells[name].at[-1]: measured}) for name in names]
    figure = EXPERIMENTS["table3"].draw(results)
    colors = [
        {curve.get_label(): curve.lines[0].get_color() for curve in axes.containers}
        for axes in figure.axes
    ]
    digits, _, mnist, _ = colors
    assert len({*digits.values()}) == 2 and mnist == {"IWAE": digits["IWAE"]}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["vanilla", "IWAE"]
