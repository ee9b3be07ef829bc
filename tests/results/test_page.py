"""The page of results: what it says, and how it looks in a browser."""

import json
import math
import re
import shutil
import subprocess
from html import unescape

import pytest
import torch

from fastsfvae.evaluate import ImageMean, PosteriorCollapse, TaylorQuality
from fastsfvae.evaluate.taylor import Agreement
from fastsfvae.results import page, pictures, report, verdict
from fastsfvae.results.evaluation import Evaluation, Number

pytest.importorskip("matplotlib")

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
COLLAPSE = PosteriorCollapse(2, 14, 16, torch.zeros(16), torch.zeros(16))
WEIGHTS = "K = 50,000, defensive"


def taylor(correlation=0.98, ratio=1.07):
    agreement = Agreement(correlation, correlation, 0.1, 0.1, ratio, 0)
    return TaylorQuality(agreement, {}, 20.0, 0.1, 100, 0)


def of_evaluation(log_ml=(-482.44, 3.07), unresolved=0, quality=None):
    return verdict.of_evaluation(
        ImageMean(*log_ml), unresolved, 1000, WEIGHTS, COLLAPSE, quality or taylor()
    )


def test_the_verdict_is_one_line_of_the_numbers():
    assert of_evaluation() == (
        "log ML -482.4 ± 3.1 nats on 1,000 test images (K = 50,000, defensive); "
        "14 of 16 latent dimensions active; the linearisation predicts the output variances to "
        "r = 0.980 and their sum to 107%"
    )
    # What was not measured, or is not a number, is not claimed.
    assert "±" not in of_evaluation((-482.4, math.nan))
    assert "linearisation" not in of_evaluation(quality=taylor(math.nan))
    none = verdict.of_evaluation(ImageMean(-1.0, 0.1), 0, 10, WEIGHTS, COLLAPSE, None)
    assert none.endswith("latent dimensions active")


@pytest.mark.parametrize(
    ("log_ml", "unresolved", "says"),
    [
        ((-482.4, 3.1), 7, "(K = 50,000, defensive), 7 of them with fewer than 10 effective"),
        ((-482.4, 3.1), 101, "NOT to be trusted: 101 of them with fewer than 10 effective"),
        ((-math.inf, math.nan), 1, "log ML -inf nats"),
        ((-math.inf, math.nan), 1, "NOT finite: an image decodes to infinity or NaN"),
        ((math.nan, math.nan), 1, "NOT finite"),
    ],
)
def test_the_verdict_claims_no_more_than_the_weights_hold(log_ml, unresolved, says):
    assert says in of_evaluation(log_ml, unresolved)


def test_the_verdict_of_a_comparison():
    found = verdict.of_comparison(
        ["a", "b", "c"], [ImageMean(1.26, 0.3), ImageMean(-0.5, 0.2)], [0, 3, 1], 100, WEIGHTS
    )
    assert found == (
        "log ML of b - a: +1.3 ± 0.3 nats (± over images, not over seeds); log ML of c - a: -0.5 ± "
        "0.2 nats (± over images, not over seeds); 100 test images (K = 50,000, defensive), 3 of "
        "them with fewer than 10 effective weights"
    )


@pytest.mark.parametrize(
    ("over_seeds", "says"),
    [
        (0.4, "+1.3 ± 0.4 nats (± over seeds)"),
        (0.2, "+1.3 ± 0.3 nats (± over images)"),
        (math.nan, "+1.3 ± 0.3 nats (± over images, not over seeds)"),
    ],
)
def test_the_verdict_of_groups_states_the_larger_error(over_seeds, says):
    arguments = (["a", "b"], [ImageMean(1.26, 0.3)], [0, 0], 100, WEIGHTS)
    assert says in verdict.of_comparison(*arguments, seed_errors=[over_seeds])


def test_errors_that_are_too_small_are_called_so():
    found = verdict.of_comparison(
        *(["a", "b"], [ImageMean(1.26, 0.3)], [0, 3], 100, WEIGHTS), understated=8
    )
    assert found.endswith(
        "3 of them with fewer than 10 effective weights, 5 more with fewer than 30 effective "
        "weights, where the error is too small"
    )
    alone = verdict.of_evaluation(ImageMean(-1.0, 0.1), 0, 10, WEIGHTS, COLLAPSE, None, 2)
    assert ", 2 of them with fewer than 30 effective weights, where" in alone
    assert "NOT" not in alone
    assert not verdict.doubt(30.0) and "too small" in verdict.doubt(29.9)
    assert "too small" in verdict.doubt(math.nan)


SECTIONS = {
    "Log-densities (nats)": {
        "log ML, without constant": ["-33.71", "3.07", "0.0012"],
        "objective - sampled ELBO <not a bound>": ["-1,482.40", "123.45", ""],
    },
    "Counts": {"dimensions in all": ["16", "", ""], "dimensions active": ["14", "", ""]},
}
CONVENTIONS = {
    "distance_weights_sha256": "0123456789abcdef" * 4,
    "split": "1,000 test images",
    "likelihood": None,
    "gamma": 0,
}


@pytest.fixture(scope="module")
def text():
    """A page with a long title, a wide picture and a narrow one."""
    torch.manual_seed(0)
    rows = {name: torch.rand(16, 1, 8, 8) for name in ("test image", "f(mean)")}
    figures = {
        "reconstructions": page.png(pictures.rows_of_images(rows)),
        "kl": page.png(pictures.kl_bars([0.4, 0.2, 0.001], epsilon=0.05)),
        "of one's own": page.png(pictures.image_grid(torch.rand(2, 1, 8, 8), 2, "two")),
    }
    title = "Evaluation of /a/rather/long/path/without/any/space/in/it/sampling-free-mlp-16"
    return page.html(title, of_evaluation(), page.COLUMNS, SECTIONS, CONVENTIONS, figures)


def test_verdict_then_pictures_then_tables(text):
    order = [text.index(part) for part in ("<h1", 'class="verdict"', "<img", "<table", "gamma")]
    assert order == sorted(order) and text.rindex("<img") < text.index("<table")
    assert unescape(text).count(of_evaluation()) == 1
    assert text.count('name="viewport" content="width=device-width, initial-scale=1"') == 1
    alts = [unescape(alt) for alt in re.findall(r'<img alt="([^"]*)"', text)]
    assert len(alts) == 3 and all(alts) and "posterior mean" in alts[0]
    assert alts[2] == "of one's own"


def test_columns_that_are_empty_are_left_out_of_their_section(text):
    first, second, conventions = re.findall("<table>.*?</table>", text, re.DOTALL)
    assert re.findall(r'<th class="n">([^<]*)', first) == page.COLUMNS
    assert re.findall(r'<th class="n">([^<]*)', second) == ["value"]
    assert re.findall("<td[^>]*>([^<]*)", second) == [
        *("dimensions in all", "16", "dimensions active", "14")
    ]
    # A cell that is empty stands where its column is not.
    assert re.findall("<td[^>]*>([^<]*)", first)[-1] == ""
    assert "&lt;not a bound&gt;" in first
    assert "gamma" in conventions and "likelihood" not in conventions


def test_what_is_not_finite_is_null_in_json():
    numbers = {"log ML": Number(-math.inf, math.nan, 0.1), "count": Number(3)}
    found = Evaluation("runs/a", "bad", {"gamma": math.nan}, {"title": numbers}, [math.nan, 0.5])
    assert json.loads(report.json_text(found)) == {
        "run": "runs/a",
        "verdict": "bad",
        "conventions": {"gamma": None},
        "sections": {
            "title": {
                "log ML": {"value": None, "standard_error": None, "monte_carlo_error": 0.1},
                "count": {"value": 3, "standard_error": None, "monte_carlo_error": None},
            }
        },
        "kl_per_dimension": [None, 0.5],
    }


# A window may not be as narrow as a telephone: a frame is. It has this page's origin by srcdoc.
FRAME = """<!doctype html><body><iframe style="border:0;width:%dpx;height:900px"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const sizes = [...page.querySelectorAll("h1, h2, p, th, td")].map(
    part => parseFloat(frame.contentWindow.getComputedStyle(part).fontSize));
  const images = [...page.images];
  document.body.dataset.found = JSON.stringify({
    inner: frame.contentWindow.innerWidth, scroll: root.scrollWidth,
    loaded: images.map(image => image.complete && image.naturalWidth > 0),
    shown: images.map(image => image.getBoundingClientRect().width),
    ratios: images.map(image => image.getBoundingClientRect().height * image.naturalWidth
      / image.getBoundingClientRect().width / image.naturalHeight),
    font: Math.min(...sizes),
    labels: Math.min(...[...page.querySelectorAll("td:first-child")].map(
      cell => cell.getBoundingClientRect().width)),
  });
};
frame.srcdoc = %s;
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser(text, tmp_path, width):
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % (width, json.dumps(text).replace("</", "<\\/")))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000"]
    command += ["--window-size=1400,1000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(unescape(found.group(1)))
    assert seen["inner"] == width
    # The page is not scrolled sideways: what is wider is scrolled in a box of its own.
    assert seen["scroll"] <= width
    assert seen["loaded"] == [True] * 3
    assert seen["ratios"] == pytest.approx([1] * 3, abs=0.02)
    assert seen["font"] >= 14 and seen["labels"] >= 100
    if width == 390:
        # Its words can be read.
        assert max(seen["shown"]) >= 640
