"""Losses of both training stages: pure functions of tensors."""
