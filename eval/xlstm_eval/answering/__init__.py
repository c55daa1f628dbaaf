"""Answer lm-eval's requests: in fixed batches, on all ranks, with a journal to go on from."""
