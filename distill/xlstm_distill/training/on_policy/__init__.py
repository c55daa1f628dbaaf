"""On-policy training: prompts from rows, continuations sampled by the student that trains."""
