"""How far a run is, read from its directory by another shell. Loads no torch; touches nothing."""
