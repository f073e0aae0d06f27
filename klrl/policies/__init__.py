"""Policies: from an observation to a distribution over actions."""
