"""Sweeps: many runs over a grid of settings and seeds."""
