"""Figures: what they show, and their two renderers."""
