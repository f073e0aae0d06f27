"""The agents: what one is, what on-policy ones share, and a file for each."""
