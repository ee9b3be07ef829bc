"""Decoders of public packages, random weights, against reverse mode in float64.

    python -m bench.zoo [--only NAME] [--out FILE]

`make zoo` installs the packages first. Each module beside this one holds the decoders of one field,
through the packages' public interfaces; `entry` says how they are written down and `judge` what is
asked of them. Each package runs in a process of its own.
"""
