"""Starting a run in several processes: by a launcher here, or as jobs of a cluster."""
