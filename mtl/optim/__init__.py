"""Optimizers that torch.optim lacks, and schedules."""
