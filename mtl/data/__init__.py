"""Data sets (one module each), and the batches for training and evaluation."""
