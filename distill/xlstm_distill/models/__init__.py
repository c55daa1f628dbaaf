"""The teacher's and the student's networks."""
