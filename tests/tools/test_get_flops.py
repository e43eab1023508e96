import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = 'configs/dyt/upernet_vitb_ade20k.py'
PARTS = 'backbone', 'neck', 'head'
C, LAYERS, BOTTLENECK = 768, 12, 64


def vitb_macs(side: int, rate: float = 1.0, adapted: bool = True) -> int:
    """ViT-B/16 without final norm on ``side`` x ``side`` patches: arXiv 2403.11808's counter."""
    patches = side * side
    n, k = patches + 1, 1 + rate * patches
    added = adapted * (2 * n * C * BOTTLENECK + patches * C)
    return patches * C * 16 * 16 * 3 + LAYERS * round(
        4 * n * C**2 + 2 * n**2 * C + 8 * k * C**2 + 5 * n * C + 5 * k * C + added
    )


@pytest.fixture(scope='module')
def count(run_tool, tmp_path_factory):
    """``count('--rate', 1, ...)`` returns what the tool writes."""

    def run(*args, config=CONFIG) -> dict:
        file = tmp_path_factory.mktemp('flops') / 'counts.json'
        run_tool('get_flops', config, *args, '--json', file)
        return json.loads(file.read_text())

    return run


@pytest.fixture(scope='module')
def counts(count) -> dict:
    return count()


def test_structure(counts):
    assert list(counts) == ['total', *PARTS, 'params']
    assert all(counts[name].keys() == {'macs', 'dense_macs'} for name in ('total', *PARTS))
    assert counts['params'].keys() == {'tuned', 'frozen', 'adapter', 'dispatcher', 'neck', 'head'}
    assert all(type(number) is int for part in counts.values() for number in part.values())


def test_backbone_is_the_closed_form(counts):
    assert counts['backbone'] == dict(macs=vitb_macs(32, 0.5), dense_macs=vitb_macs(32, adapted=False))
    assert counts['backbone']['dense_macs'] / 1e9 == pytest.approx(107.12, abs=0.005)


def test_total_is_the_sum(counts):
    for name in ('macs', 'dense_macs'):
        assert counts['total'][name] == sum(counts[part][name] for part in PARTS)
    for part in ('neck', 'head'):
        assert counts[part]['macs'] == counts[part]['dense_macs'] > 0


def test_neck_by_hand(counts):
    # transposed convolutions of 2 x 2 and stride 2, one MAC per input pixel and weight: x2 at 32, x4 at 32 and 64
    assert counts['neck']['macs'] == 4 * C * C * (32 * 32 + 32 * 32 + 64 * 64)


def test_parameters(counts):
    layer = 4 * C * C + 8 * C * C + (3 + 1 + 4 + 1) * C + 2 * 2 * C  # weights, biases, two norms
    base = LAYERS * layer + (16 * 16 * 3 * C + C) + C + (32 * 32 + 1) * C  # patches, CLS, positions
    params = counts['params']
    assert params['frozen'] == base
    # arXiv 2403.11808's 1.19 M for d = 64; its dispatchers are C + 1 each
    assert params['adapter'] == LAYERS * (2 * C * BOTTLENECK + BOTTLENECK + C) == 1_189_632
    assert params['dispatcher'] == LAYERS * (C + 1) == 9_228
    auxiliary = 9 * C * 256 + 2 * 256 + 256 * 150 + 150  # conv 3 x 3, norm, classes: tuned, but not run at inference
    assert params['tuned'] == sum(params[name] for name in ('adapter', 'dispatcher', 'neck', 'head')) + auxiliary


def test_rate_and_shape(count):
    full = count('--rate', '1', '--shape', 256, 256)
    assert full['backbone'] == dict(macs=vitb_macs(16), dense_macs=vitb_macs(16, adapted=False))
    # no weights are read; 1000 pixels are 62.5 patches, padded to 63
    odd = count('--rate', '0', '--shape', 1008, 1000, '--cfg-options', 'model.backbone.init_cfg.checkpoint=no.pth')
    assert odd['backbone']['macs'] == vitb_macs(63, 0.0)


def test_the_table_names_its_unit(run_tool, capsys):
    run_tool('get_flops', CONFIG)
    table = capsys.readouterr().out
    assert re.search(r'^backbone +\d+\.\d{3} +107\.1\d\d ', table, re.MULTILINE)
    assert 'GMACs are MACs (papers print them as FLOPs).' in table and 'activation rate 0.50' in table


def vitti_macs(adapters: int, read: bool) -> int:
    """ViT-Ti at 224: 196 patches, 12 layers, every token active; optionally only the class token of the last layer."""
    c, n = 192, 197
    attention, mlp, adapter, norm = 4 * c * c, 8 * c * c, adapters * 2 * c * 64, 5 * c
    layer = n * (attention + mlp + adapter + 2 * norm) + 2 * n * n * c
    last = n * (attention // 2 + norm) + attention // 2 + 2 * n * c + mlp + adapter + norm if read else layer
    return 196 * 16 * 16 * 3 * c + 11 * layer + last + (1 if read else n) * norm


@pytest.mark.parametrize('read', [False, True])
@pytest.mark.parametrize(('name', 'adapters'), [('linear', 0), ('adapter', 1)])
def test_baselines_are_counted_with_every_token_active(count, name, adapters, read):
    options = '--method', name, '--cfg-options', f'model.backbone.skip_unread={read}'
    counts = count(*options, config='configs/dyt/vitti_cifar100_1k.py')
    assert counts['backbone'] == dict(macs=vitti_macs(adapters, read), dense_macs=vitti_macs(0, False))
    assert counts['params']['tuned'] == counts['params']['adapter'] + 193 * 100


def segmenter_macs(patches: int, classes: int, width: int) -> int:
    """Segmenter's mask transformer of two layers: arXiv 2105.05633."""
    n, norm = patches + classes, 5 * width
    layer = n * (12 * width**2 + 2 * norm) + 2 * n**2 * width
    projections = (patches + n) * width**2  # into the decoder; of patches and classes out of it
    return projections + 2 * layer + n * norm + patches * classes * width + 5 * patches * classes


@pytest.mark.parametrize(
    ('task', 'patches', 'classes', 'width'),
    [('vitb_ade20k', 32 * 32, 150, 768), ('vitti_camvid', 20 * 20, 11, 192)],
)
@pytest.mark.parametrize('head', ['linear', 'segmenter'])
def test_light_heads_by_hand(count, head, task, patches, classes, width):
    counts = count(config=f'configs/dyt/{head}_{task}.py')
    expected = patches * classes * width if head == 'linear' else segmenter_macs(patches, classes, width)
    assert counts['head'] == dict(macs=expected, dense_macs=expected)
    assert counts['neck'] == dict(macs=0, dense_macs=0) and counts['params']['neck'] == 0
    if width == C:
        assert counts['backbone']['macs'] == vitb_macs(32, 0.5) + 5 * C * (patches + 1)  # its final norm


HEADS_TABLE = re.findall(r'^\| `(\w+)`.*?\| (\d.*) \|$', (ROOT / 'docs/heads.md').read_text(), re.MULTILINE)
assert len(HEADS_TABLE) == 9


@pytest.mark.parametrize(('config', 'row'), HEADS_TABLE, ids=[config for config, _ in HEADS_TABLE])
def test_the_table_of_heads_is_what_the_tool_counts(count, config, row):
    shape = ('--shape', 540, 720) if config.endswith('camvid') else ()
    counts = count(*shape, config=f'configs/dyt/{config}.py')
    (whole, dense), (ours, base) = (
        (counts[part]['macs'], counts[part]['dense_macs']) for part in ('total', 'backbone')
    )
    giga = [base, ours, counts['neck']['macs'], counts['head']['macs'], dense, whole]
    saved, kept = 1 - whole / dense, (1 - whole / dense) / (1 - ours / base)
    percent = [f'{100 * share:.1f} %' for share in (saved, kept)]
    assert row.split(' | ') == [f'{macs / 1e9:.3f}' for macs in giga] + percent


@pytest.mark.parametrize('method', ['adapter', 'evidence', 'lora'])
def test_methods_leave_the_cost_of_a_light_head(count, method):
    config = 'configs/dyt/segmenter_vitti_camvid.py'
    plain, counts = count(config=config), count('--method', method, config=config)
    assert counts['head'] == plain['head'] and counts['backbone']['dense_macs'] == plain['backbone']['dense_macs']
    assert (counts['backbone']['macs'] < plain['backbone']['dense_macs']) == (method == 'evidence')


@pytest.mark.parametrize(
    ('args', 'expected'),
    [
        ((CONFIG, '--rate', '50'), '--rate must lie in [0, 1], got 50.0. Rates are fractions, not percent.'),
        ((CONFIG, '--rate', '-0.1'), '--rate must lie in [0, 1], got -0.1.'),
        ((CONFIG, '--shape', '0', '512'), '--shape must hold two positive sizes in pixels, got [0, 512].'),
        (
            (CONFIG, '--json', 'no_such_folder/x.json'),
            '--json must name a file in an existing folder, got no_such_folder',
        ),
        (('configs/no.py',), 'config must name an existing file, got configs/no.py.'),
        (
            (CONFIG, '--cfg-options', 'model.decode_head.type=UperHead'),
            'model.decode_head.type must be a registered type',
        ),
        ((CONFIG, '--cfg-options', 'model.target_rate=50'), 'target_rate must lie in (0, 1], got 50.'),
        (
            ('configs/dyt/vitti_cifar100_1k.py', '--method', 'linear', '--rate', '0.5'),
            '--rate must be left out for a model without dispatchers, got 0.5.',
        ),
        (('configs/demo/pretrain_shapes.py',), 'model must have a mmdyt.DyTVisionTransformer as its backbone'),
    ],
)
def test_refusals(run_tool, capfd, args, expected):
    with pytest.raises(SystemExit) as exit_info:
        run_tool('get_flops', *args)
    assert exit_info.value.code == 2
    (message,) = capfd.readouterr().err.splitlines()
    assert message.startswith('error: ') and expected in message
    assert not Path('no_such_folder').exists()


def test_a_stock_host_with_a_dispatched_backbone_has_no_target_and_is_counted_whole(tmp_path, count):
    config = tmp_path / 'stock.py'
    config.write_text(
        "default_scope = 'mmpretrain'\ncustom_imports = dict(imports=['mmdyt.models'])\n"
        "backbone = dict(type='mmdyt.DyTVisionTransformer', arch='deit-tiny', img_size=224)\n"
        "head = dict(type='VisionTransformerClsHead', num_classes=100, in_channels=192)\n"
        "model = dict(type='ImageClassifier', backbone=backbone, head=head)\n"
    )
    dispatchers = 12 * 196 * 192
    assert count(config=config)['backbone']['macs'] == vitti_macs(1, False) + dispatchers
