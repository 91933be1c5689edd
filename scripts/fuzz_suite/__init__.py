"""Fuzzing and a chaos run, see ``scripts/fuzz --help``."""
