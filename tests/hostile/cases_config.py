"""Settings that cannot be meant."""

from case import options, refused

MODEL = options(
    'model',
    'seg',
    """
    model.type=mmdyt.DyTEncoderDecodr
    model.type=mmdyt.DyTImageClassifier | ImageClassifier
    model.backbone.type=mmdyt.DyTVisionTransformr | DyTVisionTransformr
    model.backbone.arch=bse | bse
    model.backbone.arch.num_layers=0 | layers
    model.backbone.arch.num_heads=3 | heads
    model.backbone.arch.embed_dim=32 | embed_dim
    model.backbone.dispatch=mpl
    model.backbone.dispatch=None
    model.backbone.dispatch=[mlp] | dispatch
    model.backbone.inference=pakced
    model.backbone.training=fast
    model.backbone.skip_unread=maybe
    model.backbone.frozen_stages=1
    model.backbone.adaptr.bottleneck=4 | adaptr
    model.backbone.adapter.bottlneck=4 | bottlneck
    model.backbone.adapter.bottleneck=0
    model.backbone.adapter.bottleneck=-4
    model.backbone.adapter.bottleneck=4.5
    model.backbone.adapter.bottleneck=four
    model.backbone.adapter.bottleneck=True
    model.backbone.adapter.scale=large
    model.backbone.adapter.dropout=1.5
    model.backbone.adapter.dropout=-0.1
    model.backbone.adapter.type=mmdyt.Adaptr | Adaptr
    model.backbone.adapter.type=mmdyt.TokenDispatcher | TokenDispatcher
    model.backbone.adapter=4 | adapter
    model.backbone.dispatcher.tau=0
    model.backbone.dispatcher.tau=-5
    model.backbone.dispatcher.tau=warm
    model.backbone.dispatcher.tau=True
    model.backbone.dispatcher.noise=off
    model.backbone.dispatcher.noise=2
    model.backbone.dispatcher.fitted=yes
    model.backbone.dispatcher.initial_rate=1.5
    model.backbone.dispatcher.initial_rate=0
    model.backbone.dispatcher.initial_rate=True
    model.backbone.dispatcher.type=mmdyt.TokenDispatchr | TokenDispatchr
    model.backbone.dispatcher.type=mmdyt.Adapter | Adapter
    model.backbone.dispatcher.capacity=0.5 | capacity
    model.backbone.substitute.type=mmdyt.Mean | Mean
    model.backbone.out_indices=[0,1,2,9] | out_indices
    model.backbone.out_indices=[] | out_indices
    model.backbone.out_type=map
    model.backbone.patch_size=0
    model.backbone.patch_size=7 | patch
    model.backbone.img_size=-64
    model.backbone.drop_path_rate=2
    model.backbone.tuned=[no_such_name] | no_such_name
    model.backbone.tuned=3
    model.backbone.parts=[3] | parts
    model.backbone.parts=lora
    model.backbone.init_cfg.checkpoint=no/such.pth | such.pth
    model.backbone.init_cfg.prefix=bckbone. | bckbone
    model.backbone.init_cfg.type=Pretraind | Pretraind
    model.neck.embed_dim=33 | embed_dim;33
    model.neck.rescales=[4,2,1] | rescales
    model.neck.type=Feature2Pyramd | Feature2Pyramd
    model.decode_head.type=UPerHed | UPerHed
    model.decode_head.num_classes=2
    model.decode_head.num_classes=0 | num_classes;UPerHead
    model.decode_head.num_classes=1
    model.decode_head.num_classes=three
    model.decode_head.in_channels=[32,32,32] | in_channels
    model.decode_head.in_channels=[32,32,32,31] | 31
    model.decode_head.in_index=[0,1,2,4] | in
    model.decode_head.channels=0 | channels;UPerHead
    model.decode_head.loss_decode.type=CrossEntropyLos | CrossEntropyLos
    model.decode_head.loss_decode.loss_wieght=1.0 | loss_wieght
    model.decode_head.loss_decode.class_weight=[1.0,2.0] | class_weight
    model.auxiliary_head.in_index=7 | in_index
    model.auxiliary_head.in_channels=31 | 31
    model.data_preprocessor.type=SegDataPreProcesor | SegDataPreProcesor
    model.data_preprocessor.mean=[127.5,127.5] | mean
    model.data_preprocessor.size_divisor=16 | size
    model.data_preprocessor.siz=[64,64] | siz
    model.target_rate=0
    model.target_rate=1.5
    model.target_rate=-0.5
    model.target_rate=half
    model.target_rate=True
    model.target_rate=None
    model.rate_weight=-1
    model.rate_weight=much
    model.complete_weight=-1
    model.distill_weight=-1
    model.distil_weight=1.0 | distil_weight
    model.test_cfg.mode=slid
    model.test_cfg.mode=slide | crop_size;stride
    model.test_cfg.mode=slide model.test_cfg.crop_size=[64,64] | stride
    """,
)

RUN = options(
    'run',
    'seg',
    """
    train_cfg.max_iters=0
    train_cfg.max_iters=-6
    train_cfg.max_iters=6.5
    train_cfg.max_iters=many
    train_cfg.val_interval=0
    train_cfg.val_interval=-3
    train_cfg.type=IterBasedTrainLop | IterBasedTrainLop
    train_cfg.max_epoch=3 | max_epoch
    train_cfg=None
    val_cfg.type=ValLop | ValLop
    val_cfg.fp61=True | fp61
    optim_wraper.optimizer.lr=1.0 | optim_wraper optim_wrapper
    optim_wrapper.type=OptimWraper | OptimWraper
    optim_wrapper.optimizer.type=AdamX | AdamX
    optim_wrapper.optimizer.lr=-1.0
    optim_wrapper.optimizer.lr=fast
    optim_wrapper.optimizer.lr=None
    optim_wrapper.optimizer.lrr=0.1 | lrr
    optim_wrapper.optimizer.momentum=0.9 | momentum
    optim_wrapper.optimizer.betas=[0.9,1.9] | beta
    optim_wrapper.optimizer=None
    optim_wrapper.accumulative_counts=0
    optim_wrapper.clip_grad=1.0
    optim_wrapper.clip_grad.max_nrm=1.0 | max_nrm
    optim_wrapper.lr_mul=0.1 | lr_mul
    optim_wrapper.paramwise_cfg.custom_keys.head.lr_mult=-1 | lr
    optim_wrapper.constructor=NoSuchConstructor | NoSuchConstructor
    optim_wrapper=None
    param_scheduler.0.type=PolyL | PolyL
    param_scheduler.0.powr=1.0 | powr
    param_scheduler.0.begin=9 | end
    param_scheduler.0.begin=-1 | begin
    param_scheduler=5 | param_scheduler
    auto_scale_lr.enable=True auto_scale_lr.base_batch_size=0 | auto_scale_lr
    train_dataloader.batch_size=0
    train_dataloader.batch_size=-2
    train_dataloader.batch_size=2.5
    train_dataloader.batch_sise=2 | batch_sise
    train_dataloader.num_workers=-1
    train_dataloader.num_workers=two
    train_dataloader.persistent_workers=True | persistent_workers
    train_dataloader.sampler.type=InfiniteSample | InfiniteSample
    train_dataloader.sampler.shufle=True | shufle
    train_dataloader.dataset=None | dataset;data_source
    train_dataloader.dataset.type=BaseSegDatset | BaseSegDatset
    train_dataloader.dataset.data_root=no/such/folder
    train_dataloader.dataset.data_prefix.img_path=images/trainin | trainin
    train_dataloader.dataset.data_prefix.seg_map_path=annotations/trainin | trainin
    train_dataloader.dataset.img_suffix=.tif | .tif
    train_dataloader.dataset.seg_map_suffix=.tif | .tif
    train_dataloader.dataset.ann_file=no_such_list.txt
    train_dataloader.dataset.indics=3 | indics
    train_dataloader.dataset.pipeline=[] | pipeline;inputs
    train_dataloader.dataset.pipeline.0.type=LoadImageFromFil | LoadImageFromFil
    train_dataloader.dataset.pipeline.2.crop_siz=[64,64] | crop_siz
    train_dataloader.dataset.pipeline.2.crop_size=[0,0] | crop_size
    train_dataloader.dataset.pipeline.3.prob=2.0 | prob
    train_dataloader.collate_fn.type=no_such_collate | no_such_collate
    train_dataloader=None
    val_dataloader.sampler.type=InfiniteSampler | InfiniteSampler
    val_dataloader.batch_size=0
    val_dataloader.dataset.data_root=no/such/folder
    val_dataloader=None | val
    val_evaluator.type=IoUMetri | IoUMetri
    val_evaluator.iou_metrics=[mIuo] | mIuo
    val_evaluator.iou_metric=[mIoU] | iou_metric
    val_evaluator=None | val
    default_hooks.checkpoint.type=CheckpointHok | CheckpointHok
    default_hooks.checkpoint.intervall=3 | intervall
    default_hooks.checkpoint.interval=0
    default_hooks.checkpoint.save_best=mIuo | mIuo
    default_hooks.checkpoint.save_best=mIoU default_hooks.checkpoint.rule=bigger | bigger
    default_hooks.checkpoint.by_epok=False | by_epok
    default_hooks.logger.interval=0
    default_hooks.logger.intervall=5 | intervall
    default_hooks.chekpoint.interval=3 | chekpoint
    default_hooks.visualization.draw=1 default_hooks.visualization.intrval=1 | intrval
    custom_hooks.0.type=mmdyt.ParameterReportHok | ParameterReportHok
    custom_hooks.1.every=3 | every
    custom_hooks=5 | custom_hooks
    visualizer.type=SegLocalVisualizr | SegLocalVisualizr
    visualizer.vis_backends.0.type=LocalVisBacken | LocalVisBacken
    visualizer.nam=visualizer | nam
    log_processor.window_size=0
    log_processor.windw_size=1 | windw_size
    my_own_note=words
    log_level=LOUD
    randomness.seed=one
    randomness.sed=1 | sed
    load_from=no/such.pth | such.pth
    default_scope=mmsgg
    custom_imports.imports=[no_such_module] | no_such_module
    runner_type=NoSuchRunner
    model_wrapper_cfg.type=NoSuchWrapper model_wrapper_cfg.x=1 | NoSuchWrapper
    env_cfg.mp_cfg.mp_start_method=forkk | forkk
    """,
)

CLASSIFICATION = options(
    'classification',
    'cls',
    """
    model.head.num_classes=2 | num_classes;label
    model.head.in_channels=31 | in_channels;31
    model.head.type=VisionTransformerClsHed | VisionTransformerClsHed
    model.head.loss.type=CrossEntropyLos | CrossEntropyLos
    model.head.loss.loss_wieght=1.0 | loss_wieght
    model.train_cfg.augments.type=Mixupp model.train_cfg.augments.alpha=0.8 | Mixupp
    model.train_cfg.augments.type=Mixup model.train_cfg.augments.alfa=0.8 | alfa
    model.data_preprocessor.normalization=third
    model.data_preprocessor.type=mmdyt.ImagePreprocesor | ImagePreprocesor
    model.backbone.out_type=featmap | head
    model.backbone.adapter.type=mmdyt.MoEAdapter model.backbone.adapter.num_experts=0 | num_experts
    model.neck.type=GlobalAveragePoolin | GlobalAveragePoolin
    train_cfg.max_epochs=0
    train_cfg.max_epochs=-1
    train_cfg.max_epochs=True
    train_cfg.val_interval=0
    train_dataloader.sampler.type=InfiniteSampler | sampler
    val_dataloader.sampler.type=InfiniteSampler | InfiniteSampler
    val_evaluator.topk=[50] | top
    val_evaluator.topk=[1,50] | top
    val_evaluator.topk=[0] | topk
    val_evaluator.type=Acuracy | Acuracy
    train_dataloader.dataset.ann_file=trai.txt | trai.txt
    train_dataloader.dataset.type=CustomDatset | CustomDatset
    train_dataloader.dataset.pipeline.1.scale=[0,0] | scale;Resize
    train_dataloader.dataset.pipeline.1.interpolation=cubic | cubic
    train_dataloader.dataset.pipeline.1.backend=pilow | pilow
    train_dataloader.dataset.pipeline.2.type=PackInput | PackInput
    param_scheduler.0.start_factor=0 | start_factor
    param_scheduler.0.end=0 | end
    param_scheduler.0.convert_to_iter_base=True | convert_to_iter_base
    default_hooks.checkpoint.save_best=accuracy/top5 | top5
    custom_hooks.2.type=mmdyt.EvidenceHook custom_hooks.2.begin=0.9 custom_hooks.2.end=0.5 | begin
    custom_hooks.2.type=mmdyt.TauScheduleHook custom_hooks.2.endd=1 | endd
    custom_hooks.2.type=EMAHook custom_hooks.2.momentum=5 | momentum
    """,
)

VIDEO = options(
    'video',
    'video',
    """
    model.cls_head.num_classes=2 | num_classes;label
    model.cls_head.in_channels=31 | in_channels;31
    model.cls_head.topk=[1,9] | topk
    model.cls_head.average_clips=mean
    model.cls_head.type=TimeSformerHed | TimeSformerHed
    model.neck.in_channels=31 | in_channels;31
    model.neck.type=mmdyt.ClipNek | ClipNek
    model.neck.aggregator.num_heads=5
    model.neck.aggregator.temporal_positions=2
    model.neck.aggregator.type=mmdyt.Aggregat | Aggregat
    model.backbone.out_type=cls_token | out_type
    model.data_preprocessor.format_shape=NCTH
    model.test_cfg.max_testing_views=0
    train_dataloader.dataset.ann_file=no.txt | no.txt
    train_dataloader.dataset.data_prefix.video=vidoes | vidoes
    train_dataloader.dataset.pipeline.0.reader=ffmpg | ffmpg
    train_dataloader.dataset.pipeline.1.clip_len=0 | clip_len;UniformSample
    train_dataloader.dataset.pipeline.3.scale=[0,32] | scale
    val_evaluator.metric_list=[top_k_acuracy] | metric_list
    val_evaluator.metric_options.top_k_accuracy.topk=[9] | topk
    train_cfg.max_epochs=0
    train_dataloader.batch_size=0
    """,
)

TESTING = [
    case
    for world, table in dict(
        seg="""
        test_dataloader.batch_size=0
        test_dataloader.sampler.type=InfiniteSampler | InfiniteSampler
        test_dataloader.dataset.data_root=no/such
        test_evaluator.iou_metrics=[mIuo] | mIuo
        test_evaluator.type=IoUMetri | IoUMetri
        test_evaluator=None
        test_dataloader=None
        test_cfg.type=TestLop | TestLop
        model.test_cfg.mode=slid
        model.decode_head.num_classes=4 | decode_head
        model.backbone.adapter.bottleneck=8 | adapter
        model.backbone.arch.embed_dims=64 | 64
        """,
        cls="""
        test_evaluator.topk=[50] | top
        model.head.num_classes=5 | head
        test_dataloader.dataset.ann_file=no.txt | no.txt
        model.backbone.inference=pakced
        """,
        video="""
        model.cls_head.num_classes=5 | cls_head
        test_evaluator.metric_options.top_k_accuracy.topk=[9] | topk
        """,
    ).items()
    for case in options('testing', world, table, 'test')
]

TYPED = [
    refused('typed', 'train - no_such_config.py', 'no_such_config.py'),
    refused('typed', 'train - {root}', 'config'),
    refused('typed', 'train - pretrained.pth', 'pretrained.pth'),
    refused('typed', 'test - no_such_config.py pretrained.pth', 'no_such_config.py'),
    refused('typed', 'train seg --cfg-options model.target_rate', 'target_rate'),
    refused('typed', 'train seg --no-such-option', 'no-such-option'),
    refused('typed', 'train seg --launcher slrm', 'slrm'),
    refused('typed', 'test seg', 'checkpoint'),
    refused('typed', 'test seg {here}/no.pth', 'no.pth'),
    refused('typed', 'test seg {here}', 'checkpoint'),
    refused('typed', 'train seg --resume {here}/no.pth', 'no.pth'),
    refused('typed', 'test seg {ckpt} --target-rate 0', 'target-rate;target_rate'),
    refused('typed', 'test seg {ckpt} --target-rate 1.5', 'target-rate;target_rate'),
    refused('typed', 'test seg {ckpt} --target-rate nan', 'target-rate;target_rate'),
    refused('typed', 'test seg {ckpt} --target-rate 0.5 --target-gmacs 1', 'target-gmacs;target_gmacs'),
    refused('typed', 'test seg {ckpt} --target-gmacs 1000', 'gmacs'),
    refused('typed', 'test seg {ckpt} --target-rate 0.5 --rule best', 'rule'),
    refused('typed', 'test seg {ckpt} --target-rate 0.5 --batches 0', 'batches'),
    refused('typed', 'test seg {ckpt} --batches 3', 'batches'),
    refused('typed', 'train seg', 'WORLD_SIZE', env=(('WORLD_SIZE', '2'), ('RANK', '0'), ('LOCAL_RANK', '0'))),
    refused('typed', 'test seg {ckpt}', 'WORLD_SIZE', env=(('WORLD_SIZE', '2'), ('RANK', '1'), ('LOCAL_RANK', '0'))),
]

CASES = MODEL + RUN + CLASSIFICATION + VIDEO + TESTING + TYPED
