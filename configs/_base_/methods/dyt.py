# Dynamic Tuning (DyT; Zhao et al., arXiv 2403.11808): adapters, and dispatchers trained with sampled masks.
method = dict(adapter=dict(type='mmdyt.Adapter'), dispatcher=dict(type='mmdyt.TokenDispatcher'))
