"""Sharing schemes other than one backbone for all tasks: which parameters tasks share, and how they exchange features.

A scheme is a `Model` that is built from a function that makes a backbone, and from the tasks. `sharing=hard` is
`mtl.archs.model.HardSharing`.
"""
