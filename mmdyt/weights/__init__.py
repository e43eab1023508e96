"""Weights that people have, under mmpretrain's names; on torch alone. ``families`` has a table for each layout."""
