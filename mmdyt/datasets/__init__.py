"""Data sets and transforms that the hosts lack; a config that uses one names its module in ``custom_imports``."""
