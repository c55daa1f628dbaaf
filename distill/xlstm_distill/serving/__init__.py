"""Use a student: generate text, and chat."""
