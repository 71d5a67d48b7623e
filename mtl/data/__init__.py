"""Benchmarks (one module each) and the batches that training draws from them."""
