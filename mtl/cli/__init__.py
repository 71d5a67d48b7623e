"""The command line: one run, a grid of runs, its plan, and the launchers."""
