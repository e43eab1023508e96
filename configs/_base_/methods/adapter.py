# Plain parallel adapter (AdaptFormer's form; Chen et al., arXiv 2205.13535).
method = dict(adapter=dict(type='mmdyt.Adapter'), dispatcher=None)
