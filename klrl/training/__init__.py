"""Training: a run, its loop, its episodes and evaluations."""
