"""Configs that come with the package are found from anywhere; the user's own win."""

from argparse import Namespace
from pathlib import Path

import pytest
from conftest import ROOT
from mmengine import hub
from mmengine.config import Config

from mmdyt import compat, preflight
from mmdyt.packaged import CONFIGS, TOOLS, find_config
from mmdyt.preflight import config as reading

compat.install()
LEAF = 'configs/dyt/vitb_cifar100.py'


def request(config) -> Namespace:
    return Namespace(config=str(config), cfg_options=None, work_dir=None, launcher='none', local_rank=0)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working directory without configs; nothing was told yet."""
    monkeypatch.chdir(tmp_path)
    reading._tell_packaged.cache_clear()
    return tmp_path


def test_in_a_clone_they_lie_beside_the_package():
    assert (CONFIGS, TOOLS) == (ROOT / 'configs', ROOT / 'tools')


@pytest.mark.parametrize(
    ('name', 'found'),
    [
        (LEAF, ROOT / LEAF),
        ('mmdyt::dyt/vitb_cifar100.py', ROOT / LEAF),
        ('dyt/vitb_cifar100.py', Path('dyt/vitb_cifar100.py')),  # any other path is the user's
        ('configs/none.py', Path('configs/none.py')),
        (f'/nowhere/{LEAF}', Path(f'/nowhere/{LEAF}')),
    ],
)
def test_find_config(name, found):
    assert find_config(name) == found


def test_the_users_own_file_wins(elsewhere):
    own = elsewhere / LEAF
    own.parent.mkdir(parents=True)
    own.write_text('')
    assert find_config(LEAF) == Path(LEAF)


def test_a_packaged_config_is_read_and_told_once(capsys):
    for _ in range(2):
        cfg = preflight.load_config(request(LEAF))
    assert cfg.to_dict() == preflight.load_config(request(ROOT / LEAF)).to_dict()
    assert capsys.readouterr().err == f'{LEAF} is not in the working directory, that of mmdyt is read: {ROOT / LEAF}\n'


@pytest.mark.parametrize('name', ['configs/dyt/vitb_cifr100.py', 'mmdyt::dyt/vitb_cifr100.py'])
def test_a_misspelt_one_is_refused_with_near_names(name):
    with pytest.raises(FileNotFoundError, match=f'got {name}. Did you mean {LEAF}'):
        preflight.load_config(request(name))


def test_a_base_of_ones_own_config_reads_as_its_file(elsewhere):
    """Neither scope nor anything else is added, so that types of the host are found."""
    (elsewhere / 'own.py').write_text("_base_ = 'mmdyt::dyt/vitb_cifar100.py'\nmodel = dict(target_rate=0.7)\n")
    cfg, expected = Config.fromfile('own.py'), Config.fromfile(ROOT / LEAF)
    expected.model.target_rate = 0.7
    assert cfg.to_dict() == expected.to_dict()
    preflight.check(preflight.load_config(request('own.py')), loops=())  # builds the model


def test_a_base_that_is_none_of_ours_is_named(elsewhere):
    (elsewhere / 'own.py').write_text("_base_ = 'mmdyt::dyt/none.py'\n")
    with pytest.raises(ValueError, match='mmdyt:: must come before a config.*got mmdyt::dyt/none.py'):
        preflight.load_config(request('own.py'))


def test_bases_of_other_packages_are_read_as_before(elsewhere):
    (elsewhere / 'own.py').write_text("_base_ = 'mmpretrain::_base_/schedules/cifar10_bs128.py'\n")
    assert Config.fromfile('own.py').optim_wrapper.optimizer._scope_ == 'mmpretrain'


def test_get_config_of_mmengine_reads_ours():
    assert hub.get_config('mmdyt::dyt/vitb_cifar100.py').to_dict() == Config.fromfile(ROOT / LEAF).to_dict()
    assert 'optim_wrapper' in hub.get_config('mmpretrain::_base_/schedules/cifar10_bs128.py')
