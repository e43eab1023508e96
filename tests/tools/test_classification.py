"""tools/train.py, tools/test.py and the training benchmark on a tiny classification data set."""

import json
import math

import pytest


@pytest.fixture(scope='module')
def config(tiny_cls_config):
    return tiny_cls_config


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory, config, run_tool):
    folder = tmp_path_factory.mktemp('trained_cls')
    run_tool('train', config, '--work-dir', folder)
    return folder


def rows(work_dir):
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_training_learns_and_logs_every_loss(work_dir):
    *steps, evaluation = rows(work_dir)
    assert {'loss', 'loss_rate', 'complete.loss', 'loss_distill', 'activation_rate'} < set(steps[0])
    assert all(math.isfinite(step['loss']) for step in steps)
    assert evaluation['accuracy/top1'] >= 60  # chance is 33
    assert 0 < evaluation['activation_rate'] <= 1 and evaluation['gmacs'] > 0
    assert {f'activation_rate/layer_{i}' for i in range(4)} < set(evaluation)


def test_testing_repeats_the_result_of_training(tmp_path, config, work_dir, run_tool):
    run_tool('test', config, work_dir / 'epoch_8.pth', '--work-dir', tmp_path)
    (file,) = tmp_path.glob('*/*.json')
    tested, trained = json.loads(file.read_text()), rows(work_dir)[-1]
    for name in ('accuracy/top1', 'activation_rate', 'gmacs', 'gmacs_dense'):
        assert tested[name] == pytest.approx(trained[name]), name


def test_dead_code_is_skipped_and_has_no_rate(tmp_path, config, work_dir, run_tool):
    skip = ['--cfg-options', 'model.backbone.skip_unread=True']
    tested = []
    for name, options in (('short', []), ('complete', ['--complete'])):
        run_tool('test', config, work_dir / 'epoch_8.pth', '--work-dir', tmp_path / name, *options, *skip)
        (file,) = (tmp_path / name).glob('*/*.json')
        tested.append(json.loads(file.read_text()))
    short, complete = tested
    trained = rows(work_dir)[-1]
    assert short['accuracy/top1'] == pytest.approx(trained['accuracy/top1']) and short['gmacs'] < trained['gmacs']
    assert 'activation_rate/layer_2' in short and 'activation_rate/layer_3' not in short
    layers = [trained[f'activation_rate/layer_{i}'] for i in range(3)]
    assert short['activation_rate'] == pytest.approx(sum(layers) / 3) and complete['activation_rate'] == 1


def test_a_model_without_dispatchers_has_no_complete_one(tmp_path, config, run_tool, capfd):
    baseline = ['model.backbone.dispatcher=None', 'train_cfg.max_epochs=1']
    run_tool('train', config, '--work-dir', tmp_path, '--cfg-options', *baseline)
    with pytest.raises(SystemExit):
        run_tool('test', config, tmp_path / 'epoch_1.pth', '--complete', '--cfg-options', *baseline)
    assert '--complete must find dispatchers in the model, got none.' in capfd.readouterr().err


def test_the_complete_model_is_tested_by_name(tmp_path, config, work_dir, run_tool):
    run_tool('test', config, work_dir / 'epoch_8.pth', '--work-dir', tmp_path, '--complete')
    (file,) = tmp_path.glob('*/*.json')
    complete = json.loads(file.read_text())
    assert complete['activation_rate'] == 1 > rows(work_dir)[-1]['activation_rate']
    assert complete['gmacs'] > complete['gmacs_dense']  # adapters and idle dispatchers on top


@pytest.mark.parametrize(
    'options',
    [
        ['model.backbone.dispatcher=None'],
        ['model.backbone.dispatcher=None', 'model.backbone.adapter=None', 'model.backbone.skip_unread=True'],
        ['model.backbone.tuned=all'],
        ['model.backbone.dispatch=attn_mlp', 'model.target_rate=0.7'],
        ['model.backbone.adapter.type=mmdyt.MoEAdapter'],
        ['model.backbone.dispatcher.type=mmdyt.SampleDispatcher'],
        ['model.backbone.training=masked_all_keys', 'model.backbone.dispatch=layer'],
    ],
)
def test_baselines_and_variants_train_and_test(tmp_path, config, run_tool, options):
    short = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
    run_tool('train', config, '--work-dir', tmp_path, '--cfg-options', *short, *options)
    evaluation = rows(tmp_path)[-1]
    dispatched = 'model.backbone.dispatcher=None' not in options
    assert ('activation_rate' in evaluation) == dispatched
    assert ('loss_rate' in rows(tmp_path)[0]) == dispatched


def test_training_benchmark_compares_in_one_run(tmp_path, config, run_tool, capsys):
    file = tmp_path / 'steps.json'
    plain, masked = f'{config},model.backbone.dispatcher=None', f'{config},model.backbone.training=masked'
    run_tool('benchmark_training', plain, config, masked, '--rounds', 3, '--json', file)
    result = json.loads(file.read_text())
    assert [step['config'] for step in result['steps']] == [plain, str(config), masked]
    assert all(len(step['seconds']) == 3 and step['median_s'] > 0 for step in result['steps'])
    assert result['steps'][0]['ratio'] == 1 and result['steps'][0]['batch'] == 6
    assert 'Training step, median of 3' in capsys.readouterr().out


def test_training_benchmark_times_methods(tmp_path, config, run_tool):
    file = tmp_path / 'steps.json'
    words = ['adapter', 'lora,rank=2']
    run_tool('benchmark_training', config, '--methods', *words, '--rounds', 1, '--json', file)
    steps = json.loads(file.read_text())['steps']
    assert [step['config'] for step in steps] == [f'{config} {word}' for word in words]


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['{config}', '--methods', 'lorra'], "got 'lorra'. Did you mean lora?"),
        (['{config}', '--methods', 'lora,rnk=2'], "got 'rnk'. Did you mean rank?"),
        (['{config}', '--rounds', '0'], '--rounds must be at least 1, got 0.'),
        (['{config},model.target_rate'], 'configs must be CONFIG[,KEY=VALUE...], got '),
        (['{config},model.target_rate=50'], 'target_rate must lie in (0, 1], got 50.'),
        (['no.py'], 'config must name an existing file, got no.py.'),
        (['{config}', '--json', 'no_such_folder/x.json'], '--json must name a file in an existing folder'),
    ],
)
def test_training_benchmark_refuses(run_tool, capfd, config, args, message):
    with pytest.raises(SystemExit) as exit_info:
        run_tool('benchmark_training', *(arg.format(config=config) for arg in args))
    assert exit_info.value.code == 2
    assert message in capfd.readouterr().err
