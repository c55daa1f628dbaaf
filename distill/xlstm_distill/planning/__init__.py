"""What a recipe costs before it runs: FLOPs, memory, disk, hours."""
