"""From finished runs to tables and figures: `python -m mtl.report`. Imports no torch."""
