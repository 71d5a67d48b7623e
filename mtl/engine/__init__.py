"""One run: the backward pass, the step, the loop over epochs, its directory and its checkpoints."""
