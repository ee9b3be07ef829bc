"""Decoder and loss with all gradients, against its peers: `pytest bench/bench_decoder_loss.py`."""

from bench.cases_steps import PRECISIONS, decoder_loss
from bench.peers import EAGER
from bench.problems import FULL
from bench.suite import DEVICE, given

SMALL = ["mnist2", "tanh"]


@given(
    [
        *decoder_loss(DEVICE, ["celeba16"], 16),
        *decoder_loss(DEVICE, SMALL, implementations=EAGER),
    ],
    full=decoder_loss(DEVICE, FULL, dtypes=PRECISIONS if DEVICE == "cuda" else ["float32"]),
)
def test_decoder_loss(timed, case):
    timed(case)
