default_scope = 'mmpretrain'
custom_imports = dict(imports=['mmdyt.models.classifier', 'mmdyt.engine'])

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=10),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    finite=dict(type='mmdyt.FiniteHook'),
    visualization=dict(type='VisualizationHook', enable=False))
custom_hooks = [
    dict(type='mmdyt.ParameterReportHook'),
    dict(type='mmdyt.FLOPsHook'),
    dict(type='mmdyt.RNGStateHook'),
]

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
randomness = dict(seed=0, diff_rank_seed=True)  # ranks draw different noise
visualizer = dict(
    type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
log_level = 'INFO'
load_from = None
resume = False
