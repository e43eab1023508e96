"""Colour jitter under NumPy 2, and how compat mends modules that are imported later."""

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import pytest
from test_compat import run_python

from mmdyt import compat
from mmdyt.compat import colors, imports

compat.install()
needs_mmaction = pytest.mark.skipif(find_spec('mmaction') is None, reason='needs mmaction2')
HUES = [-0.5, -0.25, -0.1, -0.004, 0.0, 0.004, 0.1, 0.25, 0.5]


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 24, 3)).astype(np.uint8)


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize('hue', HUES)
def test_hues_are_shifted_around_the_circle(image, hue, backend):
    """As torchvision shifts them, by whole 255ths."""
    import mmcv
    from torchvision.transforms.functional import adjust_hue, to_pil_image

    found = mmcv.adjust_hue(image, hue, backend=backend)
    expected = np.array(adjust_hue(to_pil_image(image[..., ::-1].copy()), hue))[..., ::-1]
    assert np.abs(found.astype(int) - expected).max() <= (0 if backend == 'pillow' else 12)  # OpenCV rounds otherwise


@needs_mmaction
@pytest.mark.parametrize('hue', HUES)
def test_hues_of_clips_are_shifted_around_the_circle(image, hue):
    from mmaction.datasets.transforms import ColorJitter

    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(int)
    hsv[..., 0] = (hsv[..., 0] + int(hue * 255)) % 180
    expected = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)
    np.testing.assert_array_equal(ColorJitter.adjust_hue(image.astype(np.float32), hue), expected)


def test_hues_that_are_right_are_left_alone():
    def adjust_hue(img, hue_factor, backend=None):
        return img

    module = SimpleNamespace(adjust_hue=adjust_hue)
    colors.repair_mmcv_hue(module)
    assert module.adjust_hue is adjust_hue
    jitter = SimpleNamespace(adjust_hue=colors._adjust_hue)
    right = jitter.adjust_hue
    colors.repair_mmaction_hue(SimpleNamespace(ColorJitter=jitter))
    assert jitter.adjust_hue is right


@pytest.fixture
def later(tmp_path, monkeypatch):
    """A package that can be imported, and its name."""
    (tmp_path / 'mends').mkdir()
    (tmp_path / 'mends' / '__init__.py').write_text('')
    (tmp_path / 'mends' / 'broken.py').write_text('def add(a, b):\n    return a - b\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    yield 'mends.broken'
    for name in ('mends', 'mends.broken'):
        sys.modules.pop(name, None)
    for finder in sys.meta_path:
        if isinstance(finder, imports._RepairingFinder):
            finder.repairs.pop('mends.broken', None)


def mend(module: ModuleType) -> None:
    module.add = lambda a, b: a + b


@pytest.mark.parametrize('before', [True, False])
def test_modules_are_mended_whenever_they_are_imported(later, before):
    import importlib

    if before:
        importlib.import_module(later)
    imports.repair_modules({later: mend})
    assert (later in sys.modules) == before
    assert importlib.import_module(later).add(1, 2) == 3
    assert sum(isinstance(finder, imports._RepairingFinder) for finder in sys.meta_path) == 1


def test_what_needs_no_repair_is_found_as_ever(later):
    assert find_spec('mends').name == 'mends' and find_spec('mends.none') is None
    imports.repair_modules({'mends.none': mend})
    assert find_spec('mends.none') is None


def test_repairs_reach_a_task_library_that_was_imported_before():
    if find_spec('mmseg') is None:
        pytest.skip('needs mmsegmentation')
    done = run_python("""
from mmdyt import compat
compat._stub_missing_compiled_ops()
import mmseg.models, torch
from mmseg.models.decode_heads.decode_head import accuracy
from mmseg.models import build_loss
compat.install()
from mmseg.models.decode_heads import decode_head
assert decode_head.accuracy is not accuracy
loss = build_loss(dict(type='CrossEntropyLoss', class_weight=[1.0, 1.0]))
print(loss(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 255]]]), ignore_index=255).item())
""")
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout.split()[-1]) - 0.3466) < 1e-3  # half of log 2
