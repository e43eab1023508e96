# A-ViT (Yin et al., arXiv 2112.07658): tokens halt for good. Its network is tuned whole; here frozen, with adapters.
method_halt = dict(type='mmdyt.HaltingDispatcher')
method = dict(dispatch='layer', adapter=dict(type='mmdyt.Adapter'), dispatcher=method_halt)
method_model = dict(rate_weight=0.0, complete_weight=0.0, distill_weight=0.0)
