"""``tools/report.py`` on a real run, and what it refuses."""

import pytest


def test_a_run_has_a_page_that_is_written_anew(trained, run_tool, tmp_path, capsys):
    for _ in range(2):
        run_tool('report', trained, trained, '--out', tmp_path / 'report.html')
        assert capsys.readouterr().out == f'1 runs: {tmp_path / "report.html"}\n'
    text = (tmp_path / 'report.html').read_text()
    assert 'decode.loss_ce' in text and 'activation_rate/layer_3' in text and '"median"' in text


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['{tmp}/none'], 'WORK_DIR must be a folder'),
        (['{tmp}'], 'WORK_DIR must hold a run'),
        (['{run}', '--pictures', '-1'], '--pictures must be at least 0, got -1'),
        (['{run}', '--out', '{tmp}/notes.html'], '--out must be a new file or an earlier report'),
        (['{run}', '--out', '{tmp}/none/x.html'], '--out must'),
    ],
)
def test_what_is_refused_changes_nothing(trained, run_tool, tmp_path, capfd, arguments, message):
    (tmp_path / 'notes.html').write_text('mine')
    with pytest.raises(SystemExit):
        run_tool('report', *(argument.format(tmp=tmp_path, run=trained) for argument in arguments))
    assert message in capfd.readouterr().err
    assert (tmp_path / 'notes.html').read_text() == 'mine' and len(list(tmp_path.iterdir())) == 1
