"""Metrics of single tasks, computed on the device. Metrics over several tasks are in `mtl.report`."""
