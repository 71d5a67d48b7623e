"""Metrics of one task (`task`, on the device) and of several (`multitask`, of finished runs; imports no torch)."""
