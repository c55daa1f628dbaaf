"""What an evaluation measures beside the tasks of lm-eval."""
