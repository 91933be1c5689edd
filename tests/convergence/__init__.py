"""Peers with documents of their own in several processes, and a network that fails at random."""
