"""Experts' weights to one student: pure functions of tensors."""
