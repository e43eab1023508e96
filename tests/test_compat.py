import io
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import LoggerHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import CheckpointLoader

from mmdyt import compat

ROOT = Path(__file__).parents[1]
lite_only = pytest.mark.skipif(
    find_spec('mmcv') is None or find_spec('mmcv._ext') is not None, reason='needs mmcv-lite'
)


def run_python(code: str) -> subprocess.CompletedProcess:
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)


def reload(*objects):
    """What `torch.load` makes of them, with its defaults."""
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file)


@pytest.fixture
def nothing_declared_safe():
    """A process in which nobody has called `install` yet, as far as `torch.load` can tell."""
    declared = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(declared)


@pytest.fixture
def ext_loader(monkeypatch):
    """mmcv's module, which forgets at the end what a test did to it."""
    from mmcv.utils import ext_loader

    monkeypatch.setattr(ext_loader, 'load_ext', 'the original')
    return ext_loader


def test_importing_compat_imports_nothing_heavy():
    code = 'import sys, mmdyt.compat; sys.exit(any(m in sys.modules for m in ("torch", "numpy", "mmengine", "mmcv")))'
    assert run_python(code).returncode == 0


@lite_only
@pytest.mark.skipif(find_spec('mmseg') is None, reason='needs mmsegmentation')
def test_mmseg_needs_the_repair():
    done = run_python('import mmseg.models')
    assert "No module named 'mmcv._ext'" in done.stderr


def test_installed_repairs_let_the_task_libraries_be_imported():
    hosts = [name for name in ('mmseg', 'mmaction', 'mmpretrain') if find_spec(name)]
    done = run_python(f"""
import importlib, sys, warnings
from mmdyt import compat
compat.install()
assert not {{'mmseg', 'mmaction', 'mmpretrain'}} & set(sys.modules), 'install imports no task library'
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    for host in {hosts}:
        importlib.import_module(host + '.models')
print([w for w in caught if 'Fail to import' in str(w.message)])
compat.install()
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith('[]')


@lite_only
def test_install_works_after_mmcv_was_imported():
    done = run_python("""
import mmcv.cnn
from mmdyt import compat
compat.install()
import mmcv.ops
""")
    assert done.returncode == 0, done.stderr


@lite_only
class TestCompiledOps:
    @pytest.fixture(autouse=True)
    def installed(self):
        compat.install()

    def test_pure_python_op_works(self):
        from mmcv.ops import point_sample

        image = torch.arange(16.0).view(1, 1, 4, 4)
        centre = torch.tensor([[[0.5, 0.5]]])
        assert point_sample(image, centre).item() == pytest.approx(7.5)  # mean of the four middle pixels: 5, 6, 9, 10

    def test_stubbed_op_names_itself_and_the_remedy(self):
        from mmcv.ops import nms

        with pytest.raises(RuntimeError, match='nms is a compiled op of mmcv, and mmcv-lite has none'):
            nms(torch.rand(2, 4), torch.rand(2), 0.5)

    @pytest.mark.filterwarnings('ignore::DeprecationWarning')
    def test_mmengine_still_sees_that_the_ops_are_missing(self):
        from mmengine.model import revert_sync_batchnorm
        from mmengine.utils.dl_utils import mmcv_full_available

        assert not mmcv_full_available()
        model = revert_sync_batchnorm(torch.nn.Sequential(torch.nn.SyncBatchNorm(3)))
        assert model(torch.rand(2, 3, 4, 4)).shape == (2, 3, 4, 4)

    def test_collect_env_reports_no_compiler(self):
        from mmcv.utils import collect_env

        assert collect_env()['MMCV Compiler'] == 'n/a'

    def test_second_repair_is_a_no_op(self):
        from mmcv.utils import ext_loader

        load_ext = ext_loader.load_ext
        compat.install()
        assert ext_loader.load_ext is load_ext


def test_missing_extension_gives_stubs(ext_loader, monkeypatch):
    monkeypatch.setattr(compat, 'find_spec', lambda name: None if name == 'mmcv._ext' else find_spec(name))
    compat._stub_missing_compiled_ops()
    ops = ext_loader.load_ext('_ext', ['carafe_forward'])
    with pytest.raises(RuntimeError, match='carafe_forward'):
        ops.carafe_forward()


def test_compiled_ops_are_left_alone(ext_loader, monkeypatch, tmp_path):
    import mmcv

    (tmp_path / '_ext.py').write_text('def nms(): return "compiled"')
    monkeypatch.setattr(mmcv, '__path__', [str(tmp_path), *mmcv.__path__])
    monkeypatch.delitem(sys.modules, 'mmcv._ext', raising=False)
    compat._stub_missing_compiled_ops()
    assert ext_loader.load_ext == 'the original'
    assert compat._load_ext('_ext', ['nms']).nms() == 'compiled'
    del sys.modules['mmcv._ext'], mmcv._ext


@pytest.mark.parametrize('repair', [compat._stub_missing_compiled_ops, compat._stub_missing_drn_localizer])
def test_nothing_is_done_for_a_library_that_is_not_installed(repair, monkeypatch):
    monkeypatch.setattr(compat, 'find_spec', lambda name: None)
    before = set(sys.modules)
    repair()
    assert set(sys.modules) == before


class TestDRN:
    @pytest.fixture
    def mmaction(self, monkeypatch, tmp_path):
        """A package folder that stands for mmaction."""
        (tmp_path / 'models' / 'localizers').mkdir(parents=True)
        spec = ModuleSpec('mmaction', loader=None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path)]
        monkeypatch.setattr(compat, 'find_spec', lambda name: spec)
        for name in [name for name in sys.modules if name.startswith('mmaction.models.localizers.drn')]:
            monkeypatch.delitem(sys.modules, name)
        yield tmp_path
        sys.modules.pop('mmaction.models.localizers.drn', None)
        sys.modules.pop('mmaction.models.localizers.drn.drn', None)

    def test_missing_package_is_stubbed(self, mmaction):
        compat._stub_missing_drn_localizer()
        with pytest.raises(RuntimeError, match='DRN is missing from mmaction2'):
            sys.modules['mmaction.models.localizers.drn.drn'].DRN()

    def test_package_on_disk_is_left_alone(self, mmaction):
        (mmaction / 'models' / 'localizers' / 'drn').mkdir()
        compat._stub_missing_drn_localizer()
        assert 'mmaction.models.localizers.drn' not in sys.modules


needs_safe_load = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6), reason='torch.load accepts everything before 2.6'
)


@needs_safe_load
@pytest.mark.usefixtures('nothing_declared_safe')
class TestHistory:
    def test_history_needs_the_repair(self):
        with pytest.raises(UnpicklingError, match='HistoryBuffer'):
            reload(HistoryBuffer([0.5], [1]))

    def test_message_hub_survives_a_checkpoint(self):
        compat.install()
        hub = MessageHub.get_instance('test_compat')
        for loss in (0.5, torch.tensor(0.25), np.float32(2)):
            hub.update_scalar('train/loss', loss)
        hub.update_info('best_score', np.float64(81.5))
        hub.update_info('iter', 3)
        state = reload(hub.state_dict())[0]
        history, counts = state['log_scalars']['train/loss'].data
        assert history.tolist() == [0.5, 0.25, 2] and counts.tolist() == [1, 1, 1]
        assert state['log_scalars']['train/loss'].mean() == pytest.approx(2.75 / 3)
        assert state['runtime_info']['best_score'] == 81.5

    def test_runner_resumes_from_its_own_checkpoint(self, tmp_path):
        compat.install()
        train(tmp_path, max_iters=2)
        runner = train(tmp_path, max_iters=3, resume=True)
        assert runner.iter == 3
        assert len(runner.message_hub.get_scalar('train/loss').data[0]) == 3

    @pytest.mark.parametrize('code', compat.DTYPES)
    def test_numbers_and_text_of_every_type_can_be_loaded(self, code):
        """A best score of any type, and a palette in what the data set says of itself."""
        compat.install()
        scalar, array = reload(np.ones(1, code)[0], np.ones((2, 3), code))
        assert scalar == np.ones(1, code)[0] and array.dtype == np.dtype(code)

    @pytest.mark.parametrize('anneal', ['cos', 'linear'])
    def test_one_cycle_goes_on_as_if_unbroken(self, tmp_path, anneal):
        compat.install()
        schedule = dict(type='OneCycleLR', eta_max=1.0, total_steps=8, end=8, anneal_strategy=anneal, by_epoch=False)
        train(tmp_path / 'broken', max_iters=2, param_scheduler=schedule)
        resumed = train(tmp_path / 'broken', max_iters=4, resume=True, param_scheduler=schedule)
        unbroken = train(tmp_path / 'unbroken', max_iters=4, param_scheduler=schedule)
        assert resumed.optim_wrapper.get_lr() == unbroken.optim_wrapper.get_lr()
        assert resumed.model.slope == unbroken.model.slope

    @pytest.mark.parametrize('core', ['core', '_core'])
    def test_checkpoint_of_either_numpy_generation_can_be_read(self, core):
        compat.install()
        file = io.BytesIO()
        torch.save([np.zeros(2), np.float32(1)], file, _use_new_zipfile_serialization=False)
        content, count = re.subn(rb'cnumpy\._?core\.', f'cnumpy.{core}.'.encode(), file.getvalue())
        assert count == 2
        assert torch.load(io.BytesIO(content)) == [pytest.approx(np.zeros(2)), 1]

    def test_second_install_declares_nothing_more(self):
        compat.install()
        declared = torch.serialization.get_safe_globals()
        compat.install()
        assert set(torch.serialization.get_safe_globals()) == set(declared)

    @pytest.mark.parametrize('attribute', ['__init__', '__class__', '__globals__'])
    def test_getattr_in_a_checkpoint_reaches_the_statistics_only(self, attribute):
        compat.install()
        with pytest.raises(UnpicklingError, match='not allowed in a checkpoint'):
            reload(Call(getattr, HistoryBuffer, attribute))

    def test_malicious_checkpoint_is_still_rejected(self, tmp_path):
        compat.install()
        with pytest.raises(UnpicklingError):
            reload(Call(os.system, f'touch {tmp_path}/owned'))
        with pytest.raises(UnpicklingError):
            reload(Call(eval, f'open("{tmp_path}/owned", "w")'))
        assert not (tmp_path / 'owned').exists()

    def test_checkpoint_from_an_address_is_loaded_as_safely(self, tmp_path, monkeypatch):
        compat.install()
        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
        (tmp_path / 'web').mkdir()
        torch.save(dict(state_dict=dict(w=torch.ones(1))), tmp_path / 'web/good.pth')
        torch.save(Call(os.system, f'touch {tmp_path}/owned'), tmp_path / 'web/bad.pth')
        handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / 'web'))
        with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f'http://127.0.0.1:{server.server_port}'
            assert CheckpointLoader.load_checkpoint(f'{address}/good.pth')['state_dict']['w'] == 1
            with pytest.raises(UnpicklingError):
                CheckpointLoader.load_checkpoint(f'{address}/bad.pth')
            server.shutdown()
        assert not (tmp_path / 'owned').exists()


@pytest.mark.parametrize(('rank', 'written'), [(0, True), (1, False)])
def test_only_the_first_rank_writes_the_metrics_of_a_test(tmp_path, monkeypatch, rank, written):
    compat.install()
    monkeypatch.setattr('mmengine.dist.utils.get_rank', lambda group=None: rank)
    processor = SimpleNamespace(get_log_after_epoch=lambda *args, **kwargs: (dict(mIoU=1.0), ''))
    hook = LoggerHook()
    hook.json_log_path = 'metrics.json'
    logger = SimpleNamespace(info=lambda text: None)
    runner = SimpleNamespace(log_processor=processor, test_dataloader=[], logger=logger, log_dir=str(tmp_path))
    hook.after_test_epoch(runner)
    assert (tmp_path / 'metrics.json').exists() == written


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def train(work_dir, max_iters, resume=False, **options):
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Line(BaseModel):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, mode):
            return {'loss': (self.slope * x).mean()}

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        runner = Runner(
            Line(),
            str(work_dir),
            train_dataloader=dict(
                dataset=[dict(x=torch.ones(1))] * 4,
                batch_size=1,
                sampler=dict(type='InfiniteSampler'),
                collate_fn=dict(type='default_collate'),
            ),
            train_cfg=dict(by_epoch=False, max_iters=max_iters),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
            log_level=logging.ERROR,
            resume=resume,
            experiment_name=f'compat_{work_dir.name}_{max_iters}',
            **options,
        )
        runner.train()
    return runner
