"""The embedded teacher: generated tasks and conversations, and the training on them.

Importing this package imports no torch: the recipe reads its domains and must load fast.
"""

from xlstm_distill.embedded.conversations import documents
from xlstm_distill.embedded.tasks import DOMAINS

__all__ = ["DOMAINS", "GENERATOR_FILES", "documents"]
GENERATOR_FILES = ("conversations.py", "pools.py", "problems.py", "recall.py", "tasks.py")
"""The files that decide the generators' documents. Their hash is part of the rows' fingerprint."""
