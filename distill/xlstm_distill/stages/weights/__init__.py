"""Merge weights that are found: searched on validation items, or learned without labels."""
