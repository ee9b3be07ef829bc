"""Everything a GPU can tell, unattended: `python -m bench.gpu`, to be read in this order.

__main__.py      the command
runner.py        each part in a process of its own, within the minutes, and again behind a crash
parts.py         the parts, in the order of their importance, and what each may take
"""
