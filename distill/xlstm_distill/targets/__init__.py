"""The teacher's answers: stored or computed online."""
