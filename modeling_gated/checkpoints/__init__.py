"""Checkpoints on disk and on the hub: finding, reading and checking them, and writing new ones safely."""
