"""tools/benchmark_hook.py: what the hook adds, on a tiny data set."""

import json

import pytest


def test_steps_and_epochs_are_timed_with_and_without_the_hook(tmp_path, tiny_cls_config, run_tool, capsys):
    file = tmp_path / 'cost.json'
    sizes = ['--steps', 4, '--rounds', 2, '--images', 6]
    run_tool('benchmark_hook', tiny_cls_config, *sizes, '--json', file)
    result = json.loads(file.read_text())
    train, test = result['train'], result['test']
    assert len(train['plain_s']) == len(train['watched_s']) == 2 and len(test['with_s']) == len(test['without_s']) == 2
    assert min(train['ratio'], test['ratio'], *train['plain_s'], *test['without_s']) > 0
    assert 'A watched training step takes' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--steps', '3'], '--steps must be even, every second is watched, got 3.'),
        (['--rounds', '0'], '--rounds must be at least 1, got 0.'),
        (['--cfg-options', 'custom_hooks=[]'], 'config must have mmdyt.FLOPsHook in custom_hooks, got [].'),
    ],
)
def test_mistakes_are_refused(tiny_cls_config, run_tool, capfd, args, message):
    with pytest.raises(SystemExit):
        run_tool('benchmark_hook', tiny_cls_config, *args)
    assert message in capfd.readouterr().err
