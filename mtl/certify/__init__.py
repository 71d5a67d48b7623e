"""Certificates: what a method is, and what was measured of it, on one generated page.

    python -m mtl.certify                    all methods: docs/methods/*.md and the index
    python -m mtl.certify loss=cagrad        one method, printed
    python -m mtl.certify loss=custom loss.file=my_loss.py       your own module
    python -m mtl.certify loss=mine --config-dir my_configs      your own strategy, or loss._target_=my_package.Mine
    python -m mtl.certify check              compare the pages on disk with new ones; exit code 1 if any differs

`problem` has the small network and the histories on which all is measured, `properties` what is measured there,
`agreement` and `optimality` the comparison with the oracles of the tests and with the problem that a method states
(the oracles are in the repository only: an installed package measures all but them),
`pages` what is written. A method's class may name properties that its paper claims (`claims`); one that does not hold
makes the run fail. What is printed does not depend on the machine.
"""

from mtl.certify.pages import Certificate, certify, main

__all__ = ["Certificate", "certify", "main"]
