"""Everything a GPU can tell, unattended: `python -m bench.gpu`, to be read in this order.

__main__.py         the command
parts.py            the parts, in the order of their importance, and what each may take
runner.py           each in a process of its own, within the minutes, and again behind a crash
compile.py          kernels compiled ahead, on every core
smoke.py            whether loss and gradients are right at full size, and the same twice
launch_check.py     which kernel of a step is wrong; interpreted.py runs some programs of it
kernel_profile.py   where a step's time goes
timings.py          cases: headlines, peers, layers, operations, training curves
sweep.py            tiles; tile_jobs.py says which, and compiles them ahead
correctness.py      the kernels' own tests
page.py             the page that says what was found: sections.py has its tables, pictures.py draws
"""
