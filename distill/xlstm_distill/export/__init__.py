"""Students for others: a directory that plain transformers loads, and its model card."""
