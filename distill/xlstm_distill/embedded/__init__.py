"""The embedded teacher: its tasks, its conversations and its training, from generators that ship with the package.

Importing this package imports no torch: the recipe and the data module name its domains without paying for it.
"""

from xlstm_distill.embedded.conversations import documents
from xlstm_distill.embedded.tasks import DOMAINS

__all__ = ["DOMAINS", "GENERATOR_FILES", "documents"]
GENERATOR_FILES = ("conversations.py", "pools.py", "tasks.py")
"""What decides the generators' documents; rows made of them depend on it."""
