"""Full attention that a student keeps from its teacher: which heads, and how they attend."""
