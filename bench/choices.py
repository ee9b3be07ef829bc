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
from bench import ledger
from bench.cases_layers import DTYPES, FUSED, HALF, LAYERS, LIBRARY, OPERATION, label
from fastsfvae.ground.atomic import write_text

MEASURED = Path(fastsfvae.ops.__file__).with_name("measured.json")
EXACT = ("ieee", "tf32x3")
# Milliseconds of a layer's forward and backward by (implementation, label, dtype).
Times = Mapping[tuple[str, str, str], float]


def choose(rows: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """By device: the faster exact product of float32 numbers, and the faster side of each layer.

    Only what was timed forward and backward counts, and of a case its latest row.

    Args:
        rows: of the ledger.
    """
    halves: dict[str, dict[tuple[str, str, str], dict[str, float]]] = {}
    for row in rows:
        if row["op"] == OPERATION and row["p50_ms"]:
            case = row["implementation"], row["shape"], row["dtype"]
            # How it was launched stands behind the comma.
            mode = row["mode"].partition(",")[0]
            timed = halves.setdefault(row["device"], {}).setdefault(case, {})
            timed[mode] = float(row["p50_ms"])
    both = {
        device: {case: sum(t.values()) for case, t in timed.items() if len(t) == 2}
        for device, timed in halves.items()
    }
    return {device: found for device, times in both.items() if (found := _of_device(times))}


def _of_device(times: Times) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    exact = [[times.get((FUSED[p], label(name), "float32")) for name in LAYERS] for p in EXACT]
    if all(t is not None for of_product in exact for t in of_product):
        totals = [sum(t for t in of_product if t is not None) for of_product in exact]
        chosen["float32"] = EXACT[totals.index(min(totals))]
    products = {"tf32": "tf32", "float32": chosen.get("float32"), "bfloat16": "half"}
    chosen["layers"] = {}
    for dtype in DTYPES:
        product = products[dtype]
        if product is None:
            continue
        for name, size in LAYERS.items():
            fused = times.get((FUSED.get(product, HALF), label(name), dtype))
            library = times.get((LIBRARY, label(name), dtype))
            if fused is not None and library is not None:
                chosen["layers"][size.key(product)] = "fused" if fused < library else "library"
    return chosen if chosen["layers"] else {}


def update() -> int:
    """Write the table from the ledger; return how many devices are in it."""
    table = choose(ledger.read_rows(ledger.LEDGER))
    write_text(MEASURED, json.dumps(table, indent=1, sort_keys=True) + "\n")
    return len(table)


if __name__ == "__main__":
    print(f"{update()} devices with measured layers in {MEASURED}")
