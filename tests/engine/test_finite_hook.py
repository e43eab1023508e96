"""FiniteHook in mmengine's own runner on a model of one weight whose losses the test writes."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from mmengine.evaluator import BaseMetric
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, PixelData

from mmdyt import compat
from mmdyt.engine import FiniteHook
from mmdyt.engine.finite import EXIT_CODE, NotFiniteError, listed, sample_name, watched

NAN, INF = float('nan'), float('inf')


class Toy(BaseModel):
    """Its losses are those of ``script``, one an iteration; its predictions its input times its weight."""

    def __init__(self, script=()):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer('mask', torch.full((2,), -INF))
        self.script = list(script)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if mode == 'loss':
            value = self.script.pop(0)
            return dict(loss_a=self.weight.sum() * 0 + value, loss_b=self.weight.sum(), accuracy=self.weight[0] * NAN)
        return [
            BaseDataElement(pred_score=x * self.weight, metainfo=dict(img_path=f'{x.item():g}.png')) for x in inputs
        ]


class Count(BaseMetric):
    """How many predictions there were."""

    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(number=len(results))


class Spoil(Hook):
    """Writes a value into a tensor of the model or the optimizer after an iteration, or before a validation."""

    def __init__(self, name, value, at):
        self.name, self.value, self.at = name, value, at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.at:
            model = runner.model
            state = model.state_dict() | {f'optimizer.{k}': v for k, v in _state(runner).items()}
            state[self.name].view(-1)[-1] = self.value


def _state(runner) -> dict:
    states = list(runner.optim_wrapper.optimizer.state.values())
    return states[0] if states else {}


def make_runner(folder, script=(), images=(1.0, 2.0), by_epoch=False, hooks=(), **options) -> Runner:
    loader = dict(batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False), dataset=_data(images))
    if not by_epoch:
        loader['sampler'] = dict(type='InfiniteSampler', shuffle=False)
    val = dict(batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False), dataset=_data(images))
    steps = dict(by_epoch=True, max_epochs=2) if by_epoch else dict(by_epoch=False, max_iters=len(script))
    checkpoint = dict(type='CheckpointHook', interval=1, by_epoch=by_epoch) | options.pop('checkpoint', {})
    return Runner(
        model=Toy(script),
        work_dir=str(folder),
        train_dataloader=loader,
        train_cfg=steps | dict(val_interval=options.pop('val_interval', 100)),
        val_dataloader=val,
        val_cfg={},
        val_evaluator=dict(type=Count),
        test_dataloader=val,
        test_cfg={},
        test_evaluator=dict(type=Count),
        optim_wrapper=dict(optimizer=dict(type='Adam', lr=0.0)),
        default_hooks=dict(checkpoint=checkpoint, finite=dict(type='mmdyt.FiniteHook', **options.pop('finite', {}))),
        custom_hooks=list(hooks),
        log_level='WARNING',
        default_scope='mmengine',
        experiment_name=folder.name,
    )


def _data(images) -> list[dict]:
    return [dict(inputs=torch.tensor(x)) for x in images]


@pytest.mark.parametrize('tolerate', [-1, 1.0, True, None, '1'])
def test_tolerate_is_refused(tolerate):
    with pytest.raises(
        ValueError, match=f'^tolerate must be an integer of at least 0, got {re.escape(repr(tolerate))}'
    ):
        FiniteHook(tolerate)


@pytest.mark.parametrize(
    ('script', 'tolerate', 'expected', 'good'),
    [
        ([1, 1, NAN, 1], 0, 'got loss=nan, loss_a=nan in iteration 3. ', ('iter_2', 'iter_1')),
        ([1, INF, 1], 0, 'got loss=inf, loss_a=inf in iteration 2. ', ('iter_1', 'start anew')),
        ([1, -INF, 1], 0, 'got loss=-inf, loss_a=-inf in iteration 2. ', ('iter_1', 'start anew')),
        ([NAN, 1], 0, 'got loss=nan, loss_a=nan in iteration 1. There is no checkpoint yet. ', ()),
        ([1, NAN], 0, 'in iteration 2. ', ('iter_1', 'start anew')),  # the last one
        ([1, 1, NAN, NAN, NAN, 1], 2, 'in iteration 5, 3 in a row. ', ('iter_4', 'iter_1')),
        ([NAN, NAN, 1, NAN, NAN, 1], 2, None, ()),
        ([1, 2, 3], 0, None, ()),
    ],
)
def test_training_stops_in_the_iteration_that_is_not_finite(tmp_path, script, tolerate, expected, good):
    runner = make_runner(tmp_path, script, finite=dict(tolerate=tolerate))
    if expected is None:
        runner.train()
        assert (tmp_path / f'iter_{len(script)}.pth').exists()
        return
    with pytest.raises(NotFiniteError, match='^loss must be finite, got ') as stop:
        runner.train()
    message = str(stop.value)
    assert expected in message and 'Lower optim_wrapper.optimizer.lr' in message and '\n' not in message
    if good:
        last, other = good
        assert f'The last good checkpoint is {tmp_path}/{last}.pth; if that diverges too, ' in message
        assert f'{other}.pth.' in message or f'too, {other}.' in message
    at = int(re.search(r'iteration (\d+)', message)[1])
    assert not list(tmp_path.glob(f'iter_{at}.pth')) and not list(tmp_path.glob(f'iter_{at + 1}.pth'))


def test_a_checkpoint_that_a_finite_loss_followed_is_good_as_it_is(tmp_path):
    runner = make_runner(tmp_path, [1, 1, 1, NAN], checkpoint=dict(interval=2))
    with pytest.raises(NotFiniteError, match=rf'is {tmp_path}/iter_2\.pth\. Lower'):
        runner.train()


def test_a_good_checkpoint_that_is_gone_is_not_named(tmp_path):
    runner = make_runner(tmp_path, [1, 1, NAN], checkpoint=dict(max_keep_ckpts=1))
    with pytest.raises(NotFiniteError, match=rf'is {tmp_path}/iter_2\.pth; if that diverges too, start anew\.'):
        runner.train()


def test_epochs_are_named_too(tmp_path):
    runner = make_runner(tmp_path, [1, 1, 1, NAN], by_epoch=True)
    with pytest.raises(
        NotFiniteError, match=r'in iteration 4 \(epoch 2\)\. The last good checkpoint is \S+/epoch_1\.pth\.'
    ):
        runner.train()


@pytest.mark.parametrize(
    ('name', 'value', 'stops'),
    [
        ('unused', NAN, True),
        ('unused', INF, True),
        ('weight', -INF, True),
        ('mask', NAN, True),
        ('mask', -INF, False),
        ('optimizer.exp_avg_sq', INF, True),  # an update of 0 for ever
        ('optimizer.exp_avg', NAN, True),
    ],
)
@pytest.mark.parametrize('how', ['iterations', 'epochs', 'validation', 'end'])
def test_weights_that_are_not_finite_are_neither_saved_nor_tested(tmp_path, name, value, stops, how):
    """The loss may stay finite: it need not depend on them, or comes one step later."""
    options = dict(
        iterations={},
        epochs=dict(by_epoch=True),
        validation=dict(val_interval=2),
        end=dict(checkpoint=dict(interval=9)),
    )[how]
    if how == 'validation':
        options['checkpoint'] = dict(interval=9, save_last=False)
    spoil = Spoil(name, value, 2)
    spoil.priority = 'NORMAL'
    runner = make_runner(tmp_path, [1, 1] if how != 'epochs' else [1] * 4, hooks=[spoil], **options)
    if not stops:
        runner.train()
        return
    found = (
        rf'^weights must be finite, got NaN or infinity in 1 of them, first .*{name.rpartition(".")[2]}, in iteration '
    )
    with pytest.raises(NotFiniteError, match=found):
        runner.train()
    assert not {'iter_2.pth', 'epoch_1.pth'} & {path.name for path in tmp_path.iterdir()}


def test_whoever_saves_nothing_is_saved_that_is_not_finite(tmp_path):
    runner = make_runner(tmp_path, [1])
    runner.train()
    runner.model.unused.data[0] = NAN
    with pytest.raises(NotFiniteError, match='first unused, in iteration 1'):
        runner.save_checkpoint(str(tmp_path), 'mine.pth', by_epoch=False)
    assert not (tmp_path / 'mine.pth').exists()


def test_a_refused_checkpoint_costs_no_earlier_one(tmp_path):
    """CheckpointHook makes room before it saves."""
    spoil = Spoil('unused', NAN, 2)
    spoil.priority = 'NORMAL'
    runner = make_runner(tmp_path, [1, 1, 1], hooks=[spoil], checkpoint=dict(max_keep_ckpts=1))
    with pytest.raises(
        NotFiniteError, match=r'first unused, in iteration 2\. The last good checkpoint is \S+/iter_1\.pth'
    ):
        runner.train()
    compat.install()
    assert torch.load(tmp_path / 'iter_1.pth')['state_dict']['unused'].isfinite().all()


@pytest.mark.parametrize('how', ['test', 'val', 'train'])
def test_nan_predictions_are_named_and_end_the_run_once_its_work_is_done(tmp_path, caplog, how):
    runner = make_runner(tmp_path, [1], images=(1.0, NAN, 3.0), val_interval=1)
    logging.getLogger(runner.logger.name).propagate = True
    expected = 'predictions must be numbers, got NaN for 1 sample, nan.png. Training diverged, or'
    with pytest.raises(NotFiniteError, match=f'^{re.escape(expected)}'):
        getattr(runner, how)()
    assert (tmp_path / 'iter_1.pth').exists() == (how == 'train')


def test_sound_predictions_are_nothing_to_talk_about(tmp_path):
    runner = make_runner(tmp_path, [1], val_interval=1)
    runner.train()
    assert runner.test()['number'] == 2


@pytest.mark.parametrize(
    ('sample', 'found'),
    [
        (BaseDataElement(pred_score=torch.tensor([NAN])), True),
        (BaseDataElement(pred_score=torch.tensor([INF])), False),  # may be a rank
        (BaseDataElement(gt_depth=torch.tensor([NAN])), False),
        (BaseDataElement(pred_label=torch.tensor([1])), False),
        (BaseDataElement(seg_logits=PixelData(data=torch.full((2, 3, 3), NAN))), True),
        (BaseDataElement(pred_sem_seg=PixelData(data=torch.zeros(1, 3, 3).long())), False),
        (dict(pred_score=[torch.tensor([NAN])]), True),
        (dict(pred_scores=dict(rgb=torch.tensor([NAN]))), True),
        (torch.tensor([NAN]), False),  # of no known host
    ],
)
def test_predictions_are_found_in_what_the_hosts_return(sample, found):
    hook = FiniteHook()
    hook.before_val_epoch(None)
    hook.after_val_iter(None, 2, outputs=[sample])
    assert hook._nan == ['sample 0 of batch 2'] * found


def test_samples_are_named_by_their_file():
    assert sample_name(BaseDataElement(metainfo=dict(filename='a.mp4')), 0, 1) == 'a.mp4'
    assert sample_name(BaseDataElement(metainfo=dict(img_path=None)), 3, 1) == 'sample 1 of batch 3'
    assert listed(['a']) == '1 sample, a' and listed(list('abcd')) == '4 samples, a, b, c and 1 more'


def test_tools_watch_any_run_and_end_with_one_line(capsys, monkeypatch):
    monkeypatch.delenv('MMDYT_TRACEBACK', raising=False)
    runner = SimpleNamespace(hooks=[])
    runner.register_hook = runner.hooks.append
    with pytest.raises(SystemExit) as stop, watched(runner), watched(runner):
        raise NotFiniteError('loss must be finite, got nan.')
    assert stop.value.code == EXIT_CODE and [type(hook) for hook in runner.hooks] == [FiniteHook]
    assert capsys.readouterr().err == 'error: loss must be finite, got nan.\n'
    monkeypatch.setenv('MMDYT_TRACEBACK', '1')
    with pytest.raises(NotFiniteError), watched(runner):
        raise NotFiniteError


@pytest.mark.parametrize(
    ('broken', 'message'),
    [
        (1, '^loss must be finite, got another in another process in iteration 1. '),
        (2, '^weights must be finite, got NaN or infinity in some of another process in iteration 1. '),
    ],
)
def test_a_process_stops_where_another_one_has_no_numbers(tmp_path, monkeypatch, broken, message):
    asked = []

    def stand_in(flag, op):
        asked.append(op)
        flag += len(asked) == broken

    monkeypatch.setattr('mmdyt.engine.finite.all_reduce', stand_in)
    with pytest.raises(NotFiniteError, match=message):
        make_runner(tmp_path, [1, 1]).train()
    assert asked == ['max'] * broken and not list(tmp_path.glob('*.pth'))


def test_a_host_without_checkpoints_or_losses_trains(tmp_path):
    hook = FiniteHook()
    runner = make_runner(tmp_path, [1, 1])
    runner._hooks = [hook for hook in runner.hooks if not isinstance(hook, CheckpointHook)]
    runner.train()
    hook.after_train_iter(runner, 0, outputs=None)
    hook.after_train_iter(runner, 0, outputs=dict(loss=1.0, note=NAN))
