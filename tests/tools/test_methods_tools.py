"""Methods by name in the tools: any of them, several at once, in two processes, resumed, and one that is made up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_distributed

ROOT = Path(__file__).parents[2]
SHORT = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=1']
EVERYTHING = 'lora+ssf+ether_plus+vpt_deep+adapter_plus+dyt'

MADE_UP = '''
"""A made-up method."""

import torch
import torch.nn as nn

from mmdyt.core.part import Delta


class Wobble(Delta):
    """Adds a learned multiple of each token's neighbour."""

    word = 'wobble'

    def __init__(self, dim, start=0.0):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.weight, self.start)

    def forward(self, x, state=None):
        return self.weight * x.roll(1, dims=1)
'''
# the file beside those of the package, and then a tool as ever
RUN = """
import runpy, sys
import mmdyt.parts
mmdyt.parts.__path__.append({folder!r})
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def rows(work_dir):
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.slow
def test_a_resumed_method_repeats_the_unbroken_run(tmp_path, tiny_config, run_tool):
    options = ['--method', EVERYTHING, '--cfg-options', *SHORT]
    run_tool('train', tiny_config, '--work-dir', tmp_path / 'whole', *options)
    first = tmp_path / 'whole/iter_1.pth'
    run_tool('train', tiny_config, '--work-dir', tmp_path / 'resumed', '--resume', first, *options)
    whole, resumed = (torch.load(tmp_path / name / 'iter_2.pth')['state_dict'] for name in ('whole', 'resumed'))
    words = {word for name in whole if '.dynamic.' in name for word in name.split('.')}
    assert {'lora', 'ssf', 'ether_plus', 'prompts', 'adapter_plus', 'adapter', 'dispatcher'} <= words
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    started = torch.load(first)['state_dict']
    tuned = [name for name in whole if 'dynamic' in name and 'threshold' not in name]
    assert not any(torch.equal(whole[name], started[name]) for name in tuned)


def test_a_checkpoint_is_tested_with_the_method_that_wrote_it(tmp_path, tiny_config, run_tool, capfd):
    run_tool('train', tiny_config, '--work-dir', tmp_path, '--method', 'lora', '--cfg-options', *SHORT)
    trained = rows(tmp_path)[-1]
    checkpoint = tmp_path / 'iter_2.pth'
    run_tool('test', tiny_config, checkpoint, '--work-dir', tmp_path / 'test', '--method', 'lora')
    (file,) = (tmp_path / 'test').glob('*/*.json')
    tested = json.loads(file.read_text())
    assert {name: tested[name] for name in ('mIoU', 'gmacs')} == pytest.approx(
        {name: trained[name] for name in ('mIoU', 'gmacs')}
    )
    assert 'activation_rate' not in tested
    with pytest.raises(SystemExit):
        run_tool('test', tiny_config, checkpoint, '--work-dir', tmp_path / 'test', '--method', 'ssf')
    assert 'missing, first backbone' in capfd.readouterr().err


def test_two_processes_train_all_parts_at_once(tmp_path, tiny_config):
    """Distributed training ends with an error where a tuned parameter gets no gradient."""
    (tmp_path / 'two.py').write_text(f"_base_ = ['{tiny_config}']\n")
    options = ['--work-dir', tmp_path, '--method', f'{EVERYTHING}+ether', '--cfg-options', *SHORT]
    run_distributed('train', tmp_path / 'two.py', 2, *options)
    assert (tmp_path / 'iter_2.pth').is_file()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--method', 'lor'], '--method must be among'),
        (['--method', ''], '--method must be among'),
        (['--method', 'lora+'], "or several joined by +, got ''"),
        (['--method', 'lora', '--method-options', 'rnk=4'], "got 'rnk'. Did you mean rank?"),
        (['--method', 'lora', '--method-options', 'rank=0'], 'rank must be a positive integer, got 0'),
        (['--method', 'lora', '--method-options', 'on=attn.kqv'], 'on must name some of'),
        (['--method', 'lora', '--method-options', 'on=lins'], 'on must name some of'),
        (
            ['--method', 'lora', '--method-options', 'rows=qx'],
            "such as 'qv', got 'qx'",
        ),
        (
            ['--method', 'lora', '--method-options', 'on=attn.norm', 'rows=None'],
            'linear layers for LoRA, got a LayerNorm',
        ),
        (['--method', 'lora', '--method-options', 'layers=[9]'], 'layers must hold indices below the depth 4, got 9'),
        (['--method', 'lora', '--method-options', 'parts.3.rank=4'], "must stay within the method, got 'parts.3.rank'"),
        (['--method', 'ssf+ssf'], "parts must have words of their own at attn.norm, got two named 'ssf'"),
        (['--method', 'adapter+adapter_plus', '--method-options', 'dispatch=x'], 'dispatch must be one of'),
        (['--method', 'vpt_deep', '--method-options', 'length=-1'], 'length must be a number of prompts, got -1'),
        (['--method', 'ether', '--method-options', 'blocks=5'], 'blocks must divide the widths [32], got 5'),
        (['--method', 'adapter_plus', '--method-options', 'drop_path=1'], 'drop_path must lie in [0, 1), got 1'),
        (
            ['--method', 'adapter_plus', '--method-options', 'site=norm'],
            "site must be one of ['attn', 'mlp']",
        ),
        (['--method-options', 'rank=4'], '--method-options must come with --method'),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, tiny_config, run_tool, capfd, arguments, message):
    with pytest.raises(SystemExit) as error:
        run_tool('train', tiny_config, '--work-dir', tmp_path / 'out', *arguments)
    assert error.value.code == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / 'out').exists()


SLOW_VIDEO = pytest.param('vitti_gmdcsa24', marks=pytest.mark.slow)


@pytest.mark.parametrize('task', ['upernet_vitti_camvid', 'vitti_cifar100_1k', SLOW_VIDEO])
def test_a_new_method_is_one_file_and_one_base(tmp_path, task):
    """A part and its base, no other line: counted in all three tasks."""
    (tmp_path / 'wobble.py').write_text(MADE_UP)
    methods = tmp_path / 'configs/_base_/methods'
    methods.mkdir(parents=True)
    (methods / 'made_up.py').write_text(
        "method = dict(adapter=None, dispatcher=None, parts=[dict(type='mmdyt.Wobble')])\n"
    )
    command = [sys.executable, '-c', RUN.format(folder=str(tmp_path)), ROOT / 'tools/get_flops.py']
    command += [ROOT / f'configs/dyt/{task}.py', '--method', 'made_up+dyt', '--json', 'counts.json']
    env = os.environ | dict(PYTHONPATH=str(ROOT), MMDYT_DATA='data')
    result = subprocess.run(list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads((tmp_path / 'counts.json').read_text())['params']['wobble'] == 12 * 192


@pytest.mark.slow
def test_a_new_method_trains_and_is_tested(tmp_path, tiny_config):
    (tmp_path / 'wobble.py').write_text(MADE_UP)
    methods = tmp_path / 'configs/_base_/methods'
    methods.mkdir(parents=True)
    (methods / 'made_up.py').write_text(
        "method = dict(adapter=None, dispatcher=None, parts=[dict(type='mmdyt.Wobble', site='attn')])\n"
    )
    method = ['--method', 'made_up', '--method-options', 'start=0.1']
    for tool in (
        ['train.py', tiny_config, '--work-dir', 'out', *method, '--cfg-options', *SHORT],
        ['test.py', tiny_config, 'out/iter_2.pth', '--work-dir', 'test', *method],
    ):
        command = [sys.executable, '-c', RUN.format(folder=str(tmp_path)), ROOT / 'tools' / tool[0], *tool[1:]]
        env = os.environ | dict(PYTHONPATH=str(ROOT))
        result = subprocess.run(list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
    weights = torch.load(tmp_path / 'out/iter_2.pth')['state_dict']
    assert 'backbone.layers.3.dynamic.attn.wobble.weight' in weights
