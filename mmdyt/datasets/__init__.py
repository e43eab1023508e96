"""Data sets that mmpretrain lacks; a config that uses one names its module in ``custom_imports``."""
