"""Scripts that hurt runs many times and count what held; `frame` says how a script is written.

`python -m tests.endurance` runs all of them.
"""
