"""Real images through the real configs. Needs the data folder that ``MMDYT_DATA`` names."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get('MMDYT_DATA', '/nonexistent'))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason='MMDYT_DATA is not set: no real images')


@pytest.fixture(scope='module')
def vit_tiny(tmp_path_factory):
    """Real weights, converted."""
    source = DATA / 'weights/vit_tiny_patch16_224_augreg_in21k_ft_in1k.pth'
    target = tmp_path_factory.mktemp('weights') / 'vit_tiny.pth'
    subprocess.run([sys.executable, 'tools/convert_vit.py', source, target], check=True, cwd=ROOT)
    return target


@pytest.fixture
def ade20k(request):
    import mmdyt.models.segmentor  # noqa: F401

    init_default_scope('mmseg')
    head = getattr(request, 'param', 'upernet')
    cfg = Config.fromfile(ROOT / f'configs/dyt/{head}_vitb_ade20k.py', import_custom_modules=False)
    cfg.model.backbone.init_cfg = None
    return cfg


def dataset(cfg, pipeline):
    from mmseg.registry import DATASETS

    prefix = dict(img_path='images/validation', seg_map_path='annotations/validation')
    changes = dict(data_root=str(DATA / 'seg/ade20k_sample'), data_prefix=prefix, pipeline=pipeline)
    return DATASETS.build(cfg.train_dataloader.dataset | changes)


def labels_of(sample):
    return sample.gt_sem_seg.data


def test_ade20k_pairs_pass_the_training_pipeline(ade20k):
    from mmseg.registry import MODELS

    pairs = dataset(ade20k, ade20k.train_pipeline)
    assert len(pairs) == 3 and len(pairs.metainfo['classes']) == 150
    preprocess = MODELS.build(ade20k.model.data_preprocessor)
    batch = preprocess(pseudo_collate([pairs[i] for i in range(3)]), training=True)
    assert batch['inputs'].shape == (3, 3, 512, 512)
    assert -1.01 < batch['inputs'].min() < -0.5 and 0.5 < batch['inputs'].max() < 1.01  # mean = std = 127.5
    for sample in batch['data_samples']:
        values = labels_of(sample).unique()
        assert values.numel() > 3
        assert ((values < 150) | (values == 255)).all()


@pytest.mark.parametrize(
    'ade20k', [pytest.param('upernet', marks=pytest.mark.slow), 'linear', 'segmenter'], indirect=True
)
def test_ade20k_pair_is_predicted_by_the_papers_model_and_with_light_heads(ade20k):
    """ViT-B/16, sliding windows of 512; random weights: the shapes and the plumbing are tested."""
    from mmseg.registry import MODELS

    pairs = dataset(ade20k, ade20k.test_pipeline)
    sample = min((pairs[i] for i in range(3)), key=lambda s: s['inputs'].numel())
    assert min(sample['inputs'].shape[1:]) == 512
    torch.manual_seed(0)
    model = MODELS.build(ade20k.model).eval()
    # a processor without bf16 emulates it, which takes this model many minutes
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16, enabled=fast):
        (result,) = model.test_step(pseudo_collate([sample]))
    assert result.seg_logits.data.shape[0] == 150
    assert result.pred_sem_seg.shape == sample['data_samples'].ori_shape == labels_of(result).shape[-2:]
    assert len(labels_of(result).unique()) > 3


@pytest.mark.slow
def test_camvid_trains_a_few_steps_on_real_weights(vit_tiny):
    import mmdyt.models.segmentor  # noqa: F401

    init_default_scope('mmseg')
    from mmseg.registry import DATASETS, MODELS

    source = DATA / 'weights/vit_tiny_patch16_224_augreg_in21k_ft_in1k.pth'
    cfg = Config.fromfile(ROOT / 'configs/dyt/upernet_vitti_camvid.py', import_custom_modules=False)
    cfg.model.backbone.init_cfg.checkpoint = str(vit_tiny)
    images = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(images) == 367 and len(images.metainfo['classes']) == 11
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    weights = torch.load(source, weights_only=True)
    assert torch.equal(model.backbone.layers[3].attn.qkv.weight, weights['blocks.3.attn.qkv.weight'])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = model.data_preprocessor(pseudo_collate([images[i] for i in range(2)]), training=True)
    first, last = None, None
    for _ in range(6):
        loss, _ = model.train().parse_losses(model.loss(**batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = loss.item() if first is None else first, loss.item()
    assert last < first
    assert torch.equal(model.backbone.layers[3].attn.qkv.weight, weights['blocks.3.attn.qkv.weight'])


@pytest.mark.parametrize(
    'head', ['segmenter', *(pytest.param(h, marks=pytest.mark.slow) for h in ('linear', 'upernet256'))]
)
def test_camvid_trains_and_is_tested_with_every_head(vit_tiny, tmp_path, run_tool, head):
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = '{ROOT}/configs/dyt/{head}_vitti_camvid.py'\n"
        f"model = dict(backbone=dict(init_cfg=dict(checkpoint='{vit_tiny}')))\n"
        'loader = dict(num_workers=0, persistent_workers=False)\n'
        'train_dataloader = dict(batch_size=2, dataset=dict(indices=4), **loader)\n'
        'val_dataloader = dict(dataset=dict(indices=2), **loader)\n'
        'test_dataloader = val_dataloader\n'
        'param_scheduler = []\n'
        'train_cfg = dict(max_iters=2, val_interval=2)\n'
        'default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))\n'
    )
    run_tool('train', config, '--work-dir', tmp_path / 'run')
    run_tool('test', config, tmp_path / 'run/iter_2.pth', '--work-dir', tmp_path / 'test')
    (log,) = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    first, second, validation = map(json.loads, log.read_text().splitlines())
    assert all(math.isfinite(step['loss']) for step in (first, second)) and second['loss'] != first['loss']
    (file,) = (tmp_path / 'test').glob('*/*.json')
    tested = json.loads(file.read_text())
    assert 0 < tested['mIoU'] == pytest.approx(validation['mIoU'])
    assert tested['gmacs'] == pytest.approx(validation['gmacs']) and tested['gmacs'] < tested['gmacs_dense'] * 1.05


@pytest.fixture
def cifar100(vit_tiny):
    import mmdyt.models.classifier  # noqa: F401

    init_default_scope('mmpretrain')
    cfg = Config.fromfile(ROOT / 'configs/dyt/vitti_cifar100_1k.py', import_custom_modules=False)
    cfg.model.backbone.init_cfg.checkpoint = str(vit_tiny)
    return cfg


def test_cifar100_images_train_with_every_loss(cifar100):
    from mmpretrain.registry import DATASETS, MODELS

    torch.manual_seed(0)
    images = DATASETS.build(cifar100.train_dataloader.dataset)
    assert len(images) == 1000 and len(DATASETS.build(cifar100.test_dataloader.dataset)) == 2000
    model = MODELS.build(cifar100.model)
    model.init_weights()
    batch = model.data_preprocessor(pseudo_collate([images[i] for i in range(0, 1000, 125)]), training=True)
    assert batch['inputs'].shape == (8, 3, 224, 224) and batch['inputs'].abs().max() <= 1
    losses = model.train().loss(**batch)
    assert {'loss', 'loss_rate', 'complete.loss', 'loss_distill'} < set(losses)
    assert losses['loss'].item() == pytest.approx(torch.tensor(100.0).log().item(), abs=1e-3)  # the head starts at zero


def test_real_logits_are_the_same_without_dead_code(cifar100, vit_tiny):
    """The pre-trained 1000-class head on the class token, and CIFAR-100 images through real weights."""
    from mmpretrain.registry import DATASETS, MODELS

    cifar100.model.head.num_classes = 1000
    images = DATASETS.build(cifar100.test_dataloader.dataset)
    logits = {}
    for parts in (dict(adapter=None, dispatcher=None), dict()):
        for skip in (False, True):
            torch.manual_seed(0)
            backbone = cifar100.model.backbone | parts | dict(skip_unread=skip)
            model = MODELS.build(cifar100.model | dict(backbone=backbone)).eval()
            model.load_state_dict(torch.load(vit_tiny)['state_dict'], strict=False)
            batch = model.data_preprocessor(pseudo_collate([images[i] for i in range(4)]))
            with torch.no_grad():
                logits[skip] = model(batch['inputs'])
        scale = logits[False].abs().max()
        assert scale > 1 and (logits[True] - logits[False]).abs().max() < 1e-5 * scale


@pytest.fixture
def clips(vit_tiny):
    import mmdyt.datasets.clips
    import mmdyt.models.recognizer  # noqa: F401

    init_default_scope('mmaction')
    cfg = Config.fromfile(ROOT / 'configs/dyt/vitti_temporal_gmdcsa24.py', import_custom_modules=False)
    cfg.model.backbone.init_cfg.checkpoint = str(vit_tiny)
    return cfg


def test_real_clips_train_with_every_loss_and_are_told_apart_by_order(clips):
    from mmaction.registry import DATASETS, MODELS

    torch.manual_seed(0)
    train, test = (DATASETS.build(clips[f'{loop}_dataloader'].dataset) for loop in ('train', 'test'))
    assert (len(train), len(test)) == (39, 17)
    model = MODELS.build(clips.model)
    model.init_weights()
    batch = model.data_preprocessor(pseudo_collate([train[0], train[20]]), training=True)
    assert batch['inputs'].shape == (2, 1, 3, 8, 224, 224) and batch['inputs'].abs().max() <= 1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(2):
        parts = model.train().loss(**batch)
        assert {'loss_cls', 'loss_rate', 'complete.loss_cls', 'loss_distill'} < set(parts)
        total, _ = model.parse_losses(parts)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0]
    views = model.data_preprocessor(pseudo_collate([test[3]]))['inputs']
    assert views.shape == (1, 3, 3, 8, 224, 224)
    shuffled = views[:, :, :, [5, 2, 7, 0, 3, 6, 1, 4]]
    model.eval()
    for std in (0.0, 1.0):
        torch.nn.init.normal_(model.neck.aggregator.temporal_positions, std=std)
        with torch.no_grad():
            change = (model(views, stage='head') - model(shuffled, stage='head')).abs().max()
        assert (change > 1e-4) == bool(std) and (change < 1e-5) == (not std)


@pytest.mark.parametrize(('parts', 'unchanged'), [([dict(type='mmdyt.ToMe', r=13)], 6), ([], 8)], ids=['tome', 'plain'])
def test_merging_without_training_keeps_most_predictions(vit_tiny, parts, unchanged):
    """Eight real images, ViT-Ti's own ImageNet head, half of the multiply-adds."""
    import mmdyt.models.classifier  # noqa: F401

    init_default_scope('mmpretrain')
    from mmpretrain.registry import MODELS

    vit = dict(arch='deit-tiny', img_size=224, patch_size=16, norm_cfg=dict(type='LN', eps=1e-6), parts=parts)
    head = dict(type='VisionTransformerClsHead', num_classes=1000, in_channels=192)
    backbone = dict(type='mmdyt.DyTVisionTransformer', adapter=None, dispatcher=None, **vit)
    model = MODELS.build(dict(type='mmdyt.DyTImageClassifier', backbone=backbone, head=head)).eval()
    model.load_state_dict(torch.load(vit_tiny, weights_only=True)['state_dict'])
    reference = np.load(DATA / 'weights/reference_outputs.npz')
    with torch.no_grad():
        scores = model.head((model.backbone(torch.from_numpy(reference['inputs']).float())[-1],))
    same = scores.argmax(1) == torch.from_numpy(reference['logits']).float().argmax(1)
    assert same.sum() >= unchanged
