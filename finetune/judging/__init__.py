"""What answers are worth: scores, metrics, intervals."""
