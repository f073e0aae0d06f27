"""Reports, comparisons, figures and videos of runs."""
