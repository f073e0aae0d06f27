"""All that is written into a run's folder, and read back."""
