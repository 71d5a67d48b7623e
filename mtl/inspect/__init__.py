"""Measurements of a run that do not change it."""
