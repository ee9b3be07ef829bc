"""Which layers run on the fused kernels on a device: what its rows in the ledger say.

    python -m bench.choices

`python -m bench.gpu --merge` does it too. The library reads the result, its `ops/measured.json`,
where it would otherwise ask a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fastsfvae.ops
from bench import cases_last_layer, cases_layers, ledger
from bench.cases_last_layer import LAST
from bench.cases_layers import DTYPES, FUSED, LAYERS, label
from fastsfvae.ground.atomic import write_text

MEASURED = Path(fastsfvae.ops.__file__).with_name("measured.json")
EXACT = ("ieee", "tf32x3")
# What decides: of the other modes each is a part of the backward.
DECIDING = {"forward", "backward"}
# Milliseconds of forward and backward by (operation, implementation, label, dtype).
Times = Mapping[tuple[str, str, str, str], float]


def choose(rows: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """By device: the faster exact product of float32 numbers, and the faster side of each layer.

    A last layer has a second entry, of how it is taken with its Gram. Only what was timed forward
    and backward counts, and of a case its latest row.

    Args:
        rows: of the ledger.
    """
    halves: dict[str, dict[tuple[str, str, str, str], dict[str, float]]] = {}
    for row in rows:
        # How it was launched stands behind the comma.
        mode = row["mode"].partition(",")[0]
        operations = cases_layers.OPERATION, cases_last_layer.OPERATION
        if row["op"] in operations and mode in DECIDING and row["p50_ms"]:
            case = row["op"], row["implementation"], row["shape"], row["dtype"]
            timed = halves.setdefault(row["device"], {}).setdefault(case, {})
            timed[mode] = float(row["p50_ms"])
    both = {
        device: {case: sum(t.values()) for case, t in timed.items() if t.keys() == DECIDING}
        for device, timed in halves.items()
    }
    return {device: found for device, times in both.items() if (found := _of_device(times))}


def _of_device(times: Times) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    alone = cases_layers.OPERATION
    exact = [
        [times.get((alone, FUSED[p], label(name), "float32")) for name in LAYERS] for p in EXACT
    ]
    if all(t is not None for of_product in exact for t in of_product):
        totals = [sum(t for t in of_product if t is not None) for of_product in exact]
        chosen["float32"] = EXACT[totals.index(min(totals))]
    products = {"tf32": "tf32", "float32": chosen.get("float32"), "bfloat16": "half"}
    chosen["layers"] = {}
    for dtype in DTYPES:
        product = products[dtype]
        if product is None:
            continue
        for cases, sizes in ((cases_layers, LAYERS), (cases_last_layer, LAST)):
            for name, size in sizes.items():
                pair = cases.FUSED.get(product, cases.HALF), cases.LIBRARY
                fused, library = (times.get((cases.OPERATION, p, label(name), dtype)) for p in pair)
                if fused is not None and library is not None:
                    key = size.key(product, of_gram=cases is cases_last_layer)
                    chosen["layers"][key] = "fused" if fused < library else "library"
    return chosen if chosen["layers"] else {}


def update() -> int:
    """Write the table from the ledger; return how many devices are in it."""
    table = choose(ledger.read_rows(ledger.LEDGER))
    write_text(MEASURED, json.dumps(table, indent=1, sort_keys=True) + "\n")
    return len(table)


if __name__ == "__main__":
    print(f"{update()} devices with measured layers in {MEASURED}")
