# Sparse-Tuning (Liu et al., arXiv 2405.14700) that keeps tokens by fitted evidence (docs/methods.md); not the paper's.
method = dict(adapter=None, dispatcher=None, parts=[dict(type='mmdyt.EvidenceTokens'), dict(type='mmdyt.DenseAdapter')])
method_hooks = [dict(type='mmdyt.KeepRateHook', begin=0.1, end=0.1)]
