"""Plugins of others: found, and called where they hold up nobody."""
