"""Paired tests and intervals of a student against its teacher."""
