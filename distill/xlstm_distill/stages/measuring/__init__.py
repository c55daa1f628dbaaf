"""What an evaluation measures beside the tasks of lm-eval, and several runs side by side."""
