"""The run directory: artifacts with manifests, published by rename, found again by what they were made from."""

from xlstm_distill.artifacts.run import Artifact, Draft, Request, Run

__all__ = ["Artifact", "Draft", "Request", "Run"]
