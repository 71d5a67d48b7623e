"""Reproductions of papers, and the protocol of tuned learning rates."""
