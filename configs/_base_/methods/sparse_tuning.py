# Sparse-Tuning (Liu et al., arXiv 2405.14700): fewer tokens after three layers, and a Dense Adapter.
method = dict(adapter=None, dispatcher=None, parts=[dict(type='mmdyt.SparseTokens'), dict(type='mmdyt.DenseAdapter')])
