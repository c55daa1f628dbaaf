"""One token at a time, few operators each; caches as files."""
