# Dynamic Tuning (DyT) with dispatchers fitted to evidence (docs/rate.md); not the paper's.
method_gate = dict(type='mmdyt.TokenDispatcher', noise=False, fitted=True)
method = dict(adapter=dict(type='mmdyt.Adapter'), dispatcher=method_gate, substitute=dict(type='mmdyt.MeanUpdate'))
method_model = dict(rate_weight=0.0, complete_weight=0.0, distill_weight=0.0)
method_fit = dict(type='mmdyt.EvidenceHook', begin=0.4, end=0.6, feature_weight=1.0)
method_hooks = [method_fit, dict(type='mmdyt.CalibrationHook', rule='global', per_image=True)]
