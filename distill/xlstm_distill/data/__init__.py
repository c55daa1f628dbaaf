"""Text to batches: sources, tokens, packed rows, the order in which training reads them."""
