"""Tiny models of every kind give the numbers that they gave in version 0.1.0.

``unchanged.json`` and ``unchanged.pth`` were recorded with the code of version 0.1.0, before parts existed. They are
recorded anew only where a number is meant to change, by ``python tests/test_unchanged.py --record``, and the commit
says which number, and why. A case that is added is recorded alone, by its name behind ``--record``.

All that can runs in double precision, with parameters that are drawn by their name. So the numbers depend neither
on the machine nor on the order in which parts are built, which shows in ``start`` alone: what ``init_weights`` draws.
Noise and dropout of training are drawn in the order in which parts run.
"""

import copy
import json
import logging
import math
import sys
import tempfile
import zlib
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import forget_runs
from mmengine.config import ConfigDict
from mmengine.dataset import InfiniteSampler, default_collate
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import HOOKS, MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from torch.utils.data import DataLoader

import mmdyt.engine
import mmdyt.models.classifier
import mmdyt.models.recognizer
import mmdyt.models.segmentor  # noqa: F401  registers, and repairs the wheels before the hosts are imported

# isort: split
from mmaction.structures import ActionDataSample
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

RECORDED = Path(__file__).with_name('unchanged.json')
CHECKPOINT = Path(__file__).with_name('unchanged.pth')

STEPS, SIZE, FRAMES, CLASSES = 20, 32, 2, 5
ARCH = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)
BN = dict(type='BN', requires_grad=True)
ADAPTER = dict(bottleneck=4, dropout=0.0)
MOE = ADAPTER | dict(type='mmdyt.MoEAdapter', num_experts=3)
NOT_SAMPLED = dict(type='mmdyt.TokenDispatcher', noise=False)
MEAN = dict(type='mmdyt.MeanUpdate')
HOST_LOSSES = dict(rate_weight=0.0, complete_weight=0.0, distill_weight=0.0)


def vit(**options) -> dict:
    arch = ARCH | options.pop('arch', {})
    return dict(type='mmdyt.DyTVisionTransformer', arch=arch, img_size=SIZE, patch_size=8, adapter=ADAPTER) | options


def classifier(host=None, **backbone) -> dict:
    head = dict(type='VisionTransformerClsHead', num_classes=CLASSES, in_channels=32)
    processor = BaseDataPreprocessor()  # keeps double precision
    model = dict(type='mmdyt.DyTImageClassifier', backbone=vit(**backbone), head=head, data_preprocessor=processor)
    return model | (dict(distill_weight=0.0) if host is None else host)  # distillation is in single precision


def segmentor() -> dict:
    backbone = vit(
        arch=dict(num_layers=4), out_indices=(0, 1, 2, 3), out_type='featmap', final_norm=False, drop_path_rate=0.1
    )
    heads = dict(num_classes=CLASSES, channels=16, dropout_ratio=0.0, norm_cfg=BN, align_corners=False)
    return dict(
        type='mmdyt.DyTEncoderDecoder',
        backbone=backbone,
        neck=dict(type='Feature2Pyramid', embed_dim=32, rescales=[4, 2, 1, 0.5], norm_cfg=BN),
        decode_head=heads | dict(type='UPerHead', in_channels=[32] * 4, in_index=[0, 1, 2, 3], pool_scales=(1, 2)),
        auxiliary_head=heads
        | dict(type='FCNHead', in_channels=32, in_index=2, num_convs=1, concat_input=False)
        | dict(loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4)),
        test_cfg=dict(mode='whole'),
    )


def recognizer() -> dict:
    aggregator = dict(type='mmdyt.CrossAttentionAggregator', num_heads=2, temporal_positions=FRAMES)
    return dict(
        type='mmdyt.DyTRecognizer',
        backbone=vit(out_type='raw', adapter=MOE | dict(frames_per_clip=FRAMES)),
        neck=dict(type='mmdyt.ClipNeck', in_channels=32, adapter=MOE, routing='clip', aggregator=aggregator),
        cls_head=dict(type='TimeSformerHead', num_classes=CLASSES, in_channels=32, topk=(1,), average_clips='score'),
        data_preprocessor=dict(type='ActionDataPreprocessor', format_shape='NCTHW'),
    )


CASES = dict(
    mlp=('mmpretrain', classifier(host={}, adapter=dict(bottleneck=4))),  # every loss, and dropout
    attn_mlp=('mmpretrain', classifier(dispatch='attn_mlp')),
    layer=('mmpretrain', classifier(dispatch='layer')),
    attn_all_keys=('mmpretrain', classifier(dispatch='attn', training='masked_all_keys')),
    masked=('mmpretrain', classifier(dispatch='attn_mlp', training='masked', inference='masked')),
    moe=('mmpretrain', classifier(adapter=MOE)),
    moe_outputs=('mmpretrain', classifier(adapter=MOE | dict(mix='outputs', router_activation='sigmoid'))),
    skip_unread=('mmpretrain', classifier(skip_unread=True)),
    per_sample=('mmpretrain', classifier(dispatcher=dict(type='mmdyt.SampleDispatcher'))),
    random=('mmpretrain', classifier(dispatcher=dict(type='mmdyt.RandomDispatcher'))),
    substitute=('mmpretrain', classifier(substitute=MEAN, dispatcher=NOT_SAMPLED)),
    undispatched=('mmpretrain', classifier(dispatcher=None)),
    segmentation=('mmseg', segmentor()),
    video=('mmaction', recognizer()),
    evidence=(
        'mmpretrain',
        classifier(HOST_LOSSES, substitute=MEAN, dispatcher=NOT_SAMPLED, tuned=('adapter', 'substitute')),
    ),
)
ADDED = [f'gmacs_{name}' for name in ('neck', 'head', 'min', 'p5', 'median', 'p95', 'max')]  # since the recording
IN_SINGLE_PRECISION = ('mlp', 'random', 'video', 'evidence')  # distillation of logits or features, or masks
# the model of the checkpoint
SAVED = classifier(arch=dict(num_layers=2, feedforward_channels=32), adapter=MOE, substitute=MEAN)


def batch(scope: str, seed: int) -> tuple[torch.Tensor, list]:
    """Inputs and samples of a host of mmpretrain, mmseg or mmaction2, with labels that inputs show."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if scope == 'mmseg':
        labels = torch.randint(0, CLASSES, (3, 1, SIZE // 8, SIZE // 8), generator=generator)
        labels = labels.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        meta = dict(ori_shape=(SIZE, SIZE), img_shape=(SIZE, SIZE))
        samples = [SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=meta) for label in labels]
        return normal(3, 3, SIZE, SIZE) + labels, samples
    kind, shape = (DataSample, ()) if scope == 'mmpretrain' else (ActionDataSample, (FRAMES,))
    samples = [kind().set_gt_label((seed + i) % CLASSES) for i in range(4)]
    labels = torch.cat([sample.gt_label for sample in samples]).view(-1, *[1] * (3 + len(shape)))
    inputs = normal(4, 3, *shape, SIZE, SIZE) + 0.3 * labels
    return (inputs[:, None] if scope == 'mmaction' else inputs), samples


@torch.no_grad()
def draw(model: torch.nn.Module) -> None:
    """Give every parameter values that depend on its name and shape only, and that tell tokens apart."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1:
            values *= parameter[0].numel() ** -0.5
        else:
            values = 0.1 * values + float(name.endswith('weight'))
        parameter.copy_(values)


def built(config: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(copy.deepcopy(config)))
    model.init_weights()
    return model


def trained(model: torch.nn.Module, scope: str) -> dict[str, list[float]]:
    """Every loss of each training step."""
    losses = defaultdict(list)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    torch.manual_seed(1)
    for step in range(STEPS):
        inputs, samples = batch(scope, step)
        total, parts = model.train().parse_losses(model(inputs, samples, mode='loss'))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        for name, value in dict(parts, total=total).items():
            losses[f'train {name}'].append(value.item())
    return losses


class Losses(Hook):
    """Keeps every loss of each training step of a runner."""

    def __init__(self):
        self.losses = defaultdict(list)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        for name, value in outputs.items():
            self.losses[f'train {name}'].append(value.item())


def staged(model: torch.nn.Module, scope: str) -> dict[str, list[float]]:
    """As :func:`trained`, by a runner, in the three stages of ``mmdyt.EvidenceHook``."""
    pairs = (pair for seed in range(6) for pair in zip(*batch(scope, seed), strict=True))
    images = [dict(inputs=image, data_samples=sample) for image, sample in pairs]
    sampler = InfiniteSampler(images, shuffle=True, seed=0)
    hook = Losses()
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            model=model,
            work_dir=folder,
            train_dataloader=DataLoader(images, batch_size=4, sampler=sampler, collate_fn=default_collate),
            train_cfg=dict(by_epoch=False, max_iters=STEPS),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
            default_hooks=dict(checkpoint=None, logger=None),
            custom_hooks=[
                hook,
                dict(type='mmdyt.EvidenceHook', begin=0.25, end=0.6, num_batches=2, feature_weight=1.0),
                dict(type='mmdyt.CalibrationHook', rule='global', num_batches=3, per_image=True),
            ],
            randomness=dict(seed=0),
            default_scope=scope,
            experiment_name='unchanged',
            log_level='ERROR',
        )
        runner.train()
    return hook.losses


@torch.no_grad()
def evaluated(model: torch.nn.Module, scope: str) -> dict[str, list[float]]:
    """Features, predictions, and what ``mmdyt.FLOPsHook`` says of them: activation rates and costs."""
    inputs, samples = batch(scope, 99)
    hook, costs = HOOKS.build(dict(type='mmdyt.FLOPsHook', lines=False)), {}
    hub = SimpleNamespace(update_scalar=lambda *args: None)
    runner = SimpleNamespace(model=model.eval(), logger=logging.getLogger('unchanged'), message_hub=hub)
    torch.manual_seed(2)
    hook.before_val_epoch(runner)
    outputs = model(inputs, samples, mode='predict')
    hook.after_val_iter(runner, 0, outputs=outputs)
    hook.after_val_epoch(runner, costs)
    scores = torch.stack([out.seg_logits.data if scope == 'mmseg' else out.pred_score for out in outputs])
    torch.manual_seed(2)
    features = model.backbone(inputs[:, 0] if scope == 'mmaction' else inputs)
    found = {f'eval features {i}': some(level) for i, level in enumerate(features)} | {'eval scores': some(scores)}
    return found | {f'eval {name}': [float(value)] for name, value in costs.items() if name not in ADDED}


def some(values: torch.Tensor) -> list[float]:
    """16 of the values, spread over all, their sum and the sum of their sizes."""
    flat = values.double().flatten()
    return [*flat[:: max(1, len(flat) // 16)][:16].tolist(), flat.sum().item(), flat.abs().sum().item()]


def run(name: str) -> dict[str, list]:
    """All that is known of a case."""
    scope, config = CASES[name]
    with DefaultScope.overwrite_default_scope(scope):
        model = built(config)
        parameters = dict(sorted(model.named_parameters()))
        tuned = [key for key, parameter in parameters.items() if parameter.requires_grad]
        start = {'start': [parameter.double().abs().sum().item() for parameter in parameters.values()]}
        draw(model.double())
        losses = (staged if name == 'evidence' else trained)(model, scope)
        results = start | losses | evaluated(model, scope)
    state = dict(sorted(model.state_dict().items()))
    decided = ('threshold', 'capacity')
    results['decided'] = [value.item() for key, value in state.items() if key.endswith(decided)]
    results['tuned'] = tuned
    results['state'] = [f'{key} {tuple(value.shape)}' for key, value in state.items()]
    return results


def written() -> dict[str, torch.Tensor]:
    """A checkpoint in single precision; one threshold and one capacity are set."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = built(SAVED)
    draw(model)
    state = dict(model.state_dict())
    state['backbone.layers.0.dynamic.mlp.dispatcher.threshold'] = torch.tensor(0.25)
    state['backbone.layers.1.dynamic.mlp.dispatcher.capacity'] = torch.tensor(0.375, dtype=torch.float64)
    return state


def loaded() -> dict[str, list]:
    """What a fresh model makes of the checkpoint; it saves the same again."""
    state = torch.load(CHECKPOINT)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = built(SAVED)
        model.load_state_dict(dict(state), strict=True)
        again = model.state_dict()
        assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
        return evaluated(model.double(), 'mmpretrain')


@pytest.fixture(scope='module')
def recorded() -> dict[str, dict[str, list]]:
    return json.loads(RECORDED.read_text())


@pytest.fixture(scope='module')
def found() -> dict[str, dict[str, list]]:
    """Each case runs once; filled by :func:`result`."""
    return {}


@pytest.fixture(params=CASES)
def name(request) -> str:
    return request.param


@pytest.fixture
def result(name, found) -> dict[str, list]:
    if name not in found:
        found[name] = run(name)
    return found[name]


def test_start_values_are_unchanged(name, recorded, result):
    assert result['start'] == pytest.approx(recorded[name]['start'], rel=1e-6)  # drawn in single precision


def test_names_are_unchanged(name, recorded, result):
    for key in ('tuned', 'state'):
        assert result[key] == recorded[name][key]


def test_numbers_are_unchanged(name, recorded, result):
    tolerance = dict(rel=1e-6, abs=5e-7) if name in IN_SINGLE_PRECISION else dict(rel=1e-9, abs=1e-12)
    expected = recorded[name]
    assert result.keys() == expected.keys()
    for key in expected.keys() - {'start', 'tuned', 'state'}:
        assert result[key] == pytest.approx(expected[key], **tolerance), key


def test_a_checkpoint_loads_and_gives_the_same(recorded):
    result, expected = loaded(), recorded['checkpoint']
    assert result.keys() == expected.keys()
    for key in expected:
        assert result[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-12), key


def test_the_cases_decide_something(recorded):
    """Each branch that is dispatched runs some tokens and skips others, and no number has run away."""
    for name, case in recorded.items():
        rates = [values[0] for key, values in case.items() if key == 'eval activation_rate']
        assert all(0 < rate < 1 for rate in rates) and len(rates) == (name != 'undispatched')
        assert all(math.isfinite(value) for key, values in case.items() for value in values if 'eval' in key)


def record(names: list[str]) -> None:
    """Write the numbers of some cases, without names of all and the checkpoint."""
    results = json.loads(RECORDED.read_text()) if names else {}
    for name in names or CASES:
        results[name] = run(name)
        forget_runs()
    if not names:
        torch.save(written(), CHECKPOINT)
        results['checkpoint'] = loaded()
    cases = []
    for name, case in results.items():
        lines = (f'  {json.dumps(key)}: {json.dumps(values)}' for key, values in case.items())
        cases.append(f' {json.dumps(name)}: {{\n' + ',\n'.join(lines) + '\n }')
    RECORDED.write_text('{\n' + ',\n'.join(cases) + '\n}\n')


if __name__ == '__main__':
    if sys.argv[1:2] != ['--record']:
        sys.exit('usage: python tests/test_unchanged.py --record [CASE ...]')
    torch.set_num_threads(1)
    record(sys.argv[2:])
