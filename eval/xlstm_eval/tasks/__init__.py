"""What lm-eval's tasks lack: a sandbox for generated code, tasks of our own, and a judge."""
