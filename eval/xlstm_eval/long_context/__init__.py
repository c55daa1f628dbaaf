"""Long context: needles in long texts, and loss by position, for any tokenizer and offline."""
