"""Claims about speed and memory, each measured here: `python -m bench.claims NAME...`.

    speed        celeba16, B = 16: at least 3 times as fast as the faster torch.func peer
    small        mnist2, tanh and collapse200: no slower than vmap(jacfwd)
    memory       celeba64: at most 1/8 of vmap(jacfwd)'s; celeba16: B = 512 within 10% of B = 64;
                 collapse200: a full-batch step in under 2 GB
    latents      celeba16, B = 16: time per sample and tangent within 35% from m = 8 to 128
    batch        celeba16: time per sample within 20% from B = 16 to 1024
    images       celeba16, B = 16: 64x64 against 32x32 images (no claim)
    autocast     celeba16: a training step gains by bfloat16 at least what the sampling VAE's does

Every candidate is checked against float64 first. Times are medians of rounds in which all take
turns; memory is measured in a process each. Rows go to the ledger. A claim that does not hold is
printed as it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bench import memory
from bench.cases_steps import training_step
from bench.command import make_parser
from bench.ledger import LEDGER, Recorder
from bench.measure import Wrong, check, why
from bench.peers import DECODER_LOSSES, OURS, SAMPLING, exact_gradients, loss_and_gradients
from bench.problems import TOLERANCE, build_problem, relative_error
from bench.timing import quantiles, take_turns

JACFWD, JVP = "vmap(jacfwd)", "vmap(jvp)"
COMPILED = (f"{JACFWD} compiled", f"{JVP} compiled")
# Name, batch and m of a problem; None where the workload's own holds.
Key = tuple[str, int | None, int | None]


class Lab:
    """Measures, prints and records."""

    def __init__(self, recorder: Recorder, rounds: int):
        self.recorder, self.rounds = recorder, rounds

    def times(self, keys: Sequence[Key], implementations: Sequence[str]) -> dict:
        """Milliseconds ``{(key, implementation): [one a round]}`` of what is right."""
        runs, sizes = {}, {}
        for key in keys:
            name, batch, m = key
            problem = build_problem(name, batch, m)
            sizes[key] = f"{name} {problem.size}"
            few = problem.head()
            exact = exact_gradients(few)
            for implementation in implementations:
                label = key, implementation
                try:
                    loss = DECODER_LOSSES[implementation](problem.decoder)
                    error = relative_error(loss_and_gradients(loss, few, "float32"), exact)
                    if not error <= TOLERANCE["float32"]:
                        raise Wrong(f"not timed: wrong against float64 by {error:.2e}")
                except Exception as reason:
                    print(f"{sizes[key]}: {implementation}: {why(reason)}")
                    continue
                runs[label] = partial(loss_and_gradients, loss, problem, "float32")
        samples = take_turns(runs, self.rounds, warmup=1)
        for (key, implementation), values in samples.items():
            self._record(sizes[key], implementation, values, samples.get((key, OURS)))
        return samples

    def _record(self, size: str, implementation: str, values, ours) -> None:
        timing, compared = quantiles(values), {}
        if ours is not None and ours is not values:
            compared = {"ratio": f"{paired(values, ours):.3f}", "ratio_to": OURS}
        self.recorder.write(timing, **_labels(implementation, size), **compared)
        ratio = f"{compared['ratio']}x" if compared else ""
        spread = f"({timing.p20:.1f} to {timing.p80:.1f})"
        print(f"{size:52s} {implementation:22s} {timing.p50:9.1f} ms {spread:20s} {ratio}")

    def memory(self, name: str, implementation: str, batch: int | None = None) -> float:
        """Peak extra bytes, in a process of its own."""
        size = f"{name} {build_problem(name, batch).size}"
        peak = memory.peak_extra(name, implementation, str(batch) if batch else None)
        self.recorder.write(**_labels(implementation, size), peak_mib=f"{peak / 2**20:.1f}")
        print(f"{size:52s} {implementation:22s} {peak / 2**20:9.1f} MiB")
        return peak


def _labels(implementation: str, size: str) -> dict[str, str]:
    labels = dict(op="decoder+loss", implementation=implementation, mode="both", dtype="float32")
    return labels | {"shape": size}


def paired(values: Sequence[float], ours: Sequence[float]) -> float:
    """The median ratio of two candidates that took turns."""
    return statistics.median(a / b for a, b in zip(values, ours, strict=True))


def verdict(claim: str, holds: bool, measured: str) -> None:
    print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}: {measured}\n")


def speed(lab: Lab) -> None:
    key = ("celeba16", 16, None)
    found = lab.times([key], [OURS, JACFWD, JVP, *COMPILED])
    ratio = {name: paired(values, found[key, OURS]) for (_, name), values in found.items()}
    eager = min(ratio[JACFWD], ratio[JVP])
    verdict("3 times as fast as the faster eager peer", eager >= 3, f"{eager:.2f}x")
    others = [ratio[name] for name in COMPILED if name in ratio]
    if others:
        best = min(others)
        verdict("faster than their compiled forms", best > 1, f"{best:.2f}x")


def small(lab: Lab) -> None:
    keys: list[Key] = [("mnist2", None, None), ("tanh", None, None), ("collapse200", 100, None)]
    found = lab.times(keys, [OURS, JACFWD])
    for key in keys:
        ratio = paired(found[key, JACFWD], found[key, OURS])
        verdict(f"{key[0]}: no slower than {JACFWD}", ratio >= 1, f"{ratio:.2f}x")


def peak_memory(lab: Lab) -> None:
    ours, peer = lab.memory("celeba64", OURS), lab.memory("celeba64", JACFWD)
    verdict(f"at most 1/8 of {JACFWD}'s memory", ours <= peer / 8, f"1/{peer / ours:.1f}")
    less, more = (lab.memory("celeba16", OURS, batch) for batch in (64, 512))
    verdict("B = 512 within 10% of B = 64", more <= 1.1 * less, f"{more / less:.2f} times")
    full = lab.memory("collapse200", OURS)
    verdict("a full-batch step in under 2 GB", full < 2e9, f"{full / 1e9:.2f} GB")


def latents(lab: Lab) -> None:
    _scaling(lab, [("celeba16", 16, m) for m in (8, 16, 32, 64, 128)], per="m", aim=1.35)


def batch(lab: Lab) -> None:
    _scaling(lab, [("celeba16", B, None) for B in (16, 64, 256, 1024)], per="B", aim=1.2)


def images(lab: Lab) -> None:
    lab.times([("celeba16-32px", 16, None), ("celeba16", 16, None)], [OURS])


def autocast(lab: Lab, name: str = "celeba16") -> None:
    cases = {
        (case.implementation, case.dtype): case
        for case in training_step("cpu", [name], dtypes=("float32", "bfloat16"))
        if case.implementation in (SAMPLING, OURS)
    }
    runs = {key: check(case, "cpu")[0][0] for key, case in cases.items()}
    samples = take_turns(runs, lab.rounds, warmup=1)
    for key, values in samples.items():
        timing = quantiles(values)
        lab.recorder.write(timing, **cases[key].labels)
        print(f"{cases[key].shape:52s} {key[0]:22s} {timing.p50:9.1f} ms {key[1]}")
    theirs, ours = (
        paired(samples[who, "float32"], samples[who, "bfloat16"]) for who in (SAMPLING, OURS)
    )
    measured = f"{ours:.2f}x, the sampling VAE {theirs:.2f}x"
    verdict("gains by bfloat16 at least what the sampling VAE does", ours >= theirs, measured)


def _scaling(lab: Lab, keys: list[Key], per: str, aim: float) -> None:
    found = lab.times(keys, [OURS])
    rates = []
    for key in keys:
        _, B, m = key
        rates.append(statistics.median(found[key, OURS]) / (m if per == "m" else B))
    spread = max(rates) / min(rates)
    verdict(f"time by {per} within {aim - 1:.0%}", spread <= aim, f"{spread - 1:.0%}")


CLAIMS = {
    "speed": speed,
    "small": small,
    "memory": peak_memory,
    "latents": latents,
    "batch": batch,
    "images": images,
    "autocast": autocast,
}


def main() -> None:
    """Check the claims named on the command line."""
    parser = make_parser("claims", __doc__)
    parser.add_argument("names", nargs="+", choices=[*CLAIMS, "all"])
    parser.add_argument("--rounds", type=int, default=9, help="at least 2")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="where the rows go")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, forward and backward, float32 but where it is said")
    lab = Lab(Recorder(options.ledger, "cpu"), max(2, options.rounds))
    for name in CLAIMS if "all" in options.names else options.names:
        CLAIMS[name](lab)


if __name__ == "__main__":
    main()
