"""One run of one method: loop, checkpoints, history, result."""
