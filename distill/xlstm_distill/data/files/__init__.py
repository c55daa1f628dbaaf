"""The files of a source: how each is read, and in which order they are read."""
