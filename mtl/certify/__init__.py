"""Certificates: one generated page per method, with its equation and the properties measured on a small network.

    python -m mtl.certify                    all methods: docs/methods/*.md and the index
    python -m mtl.certify loss=cagrad        one method, printed
    python -m mtl.certify loss=custom loss.file=my_loss.py       your own module
    python -m mtl.certify loss=mine --config-dir my_configs      your own strategy, or loss._target_=my_package.Mine
    python -m mtl.certify problem=dense      the same properties, on segmentation, depth and normals
    python -m mtl.certify check              compare the pages on disk with new ones; exit code 1 if any differs

- `problem`: the small network, and the histories of steps after which a method is measured.
- `dense`: the same with the losses of maps.
- `properties`: the measured properties, such as scale invariance.
- `agreement`: the error against the oracles, independent NumPy implementations in tests/oracles. An installed package
  has no oracles and leaves this part out.
- `optimality`: the distance from the optimum of the problem that the paper states.
- `pages`: the text of the pages.

A method's class may name properties that its paper claims (`claims`). If a claim does not hold, the command fails. The
printed numbers do not depend on the machine.
"""

from mtl.certify.pages import Certificate, certify, main

__all__ = ["Certificate", "certify", "main"]
