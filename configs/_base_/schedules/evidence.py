# Stages of training whose dispatchers are fitted to evidence; a leaf sets model = _base_.evidence_model
evidence_model = dict(
    rate_weight=0.0,
    complete_weight=0.0,
    distill_weight=0.0,
    backbone=dict(
        dispatcher=dict(noise=False),
        substitute=dict(type='mmdyt.MeanUpdate'),
        tuned=('adapter', 'substitute')))
evidence_hooks = [
    dict(type='mmdyt.EvidenceHook', begin=0.4, end=0.6, feature_weight=1.0),
    dict(type='mmdyt.CalibrationHook', rule='global', per_image=True),
]
