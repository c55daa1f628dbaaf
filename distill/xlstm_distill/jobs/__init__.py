"""A run as jobs of a Slurm cluster: the graph, the scripts, what was submitted, what runs."""
