# Context dispatch: skipping tokens stay as keys and values; dispatchers fitted to evidence. Not the paper's.
_base_ = './evidence.py'

method = dict(dispatch='layer', keys='all')
