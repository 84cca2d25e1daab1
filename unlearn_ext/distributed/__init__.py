"""Several ranks: wrappers of models, shards of tensors, batches, hashes and modes over ranks."""
