"""What activations take: saved by a forward pass, and worked with by its backward pass."""
