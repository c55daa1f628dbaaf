"""One file a stage, from teacher to report; what they are made from, and how far a run is."""
