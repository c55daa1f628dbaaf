"""The run directory: artifacts with manifests, published by rename, found by what made them."""

from xlstm_distill.artifacts.artifact import Artifact, Draft, Request
from xlstm_distill.artifacts.run import Run

__all__ = ["Artifact", "Draft", "Request", "Run"]
