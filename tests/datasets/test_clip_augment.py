"""RandAugment of clips: one draw for all frames."""

import numpy as np
import pytest
import torch

from mmdyt.datasets.clip_augment import ClipRandAugment


def frames(count=3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)
    return [image.copy() for _ in range(count)]


def test_every_frame_is_changed_alike():
    changed = 0
    for seed in range(10):
        torch.manual_seed(seed)
        out = ClipRandAugment()(dict(imgs=frames()))['imgs']
        assert len(out) == 3 and all(image.dtype == np.uint8 and image.shape == (24, 32, 3) for image in out)
        assert all((image == out[0]).all() for image in out)
        changed += (out[0] != frames()[0]).any()
    assert changed > 5


def test_a_draw_repeats_for_a_seed_and_differs_between_seeds():
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(ClipRandAugment()(dict(imgs=frames()))['imgs'][0])
    assert (outs[0] == outs[1]).all() and (outs[0] != outs[2]).any()


def test_a_higher_magnitude_changes_more():
    changes = []
    for magnitude in (1, 10):
        total = 0.0
        for seed in range(20):
            torch.manual_seed(seed)
            image = ClipRandAugment(num_ops=1, magnitude=magnitude)(dict(imgs=frames(1)))['imgs'][0]
            total += np.abs(image.astype(float) - frames()[0]).mean()
        changes.append(total)
    assert changes[1] > changes[0]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_ops=0), 'num_ops must be a positive integer, got 0'),
        (dict(magnitude=11), r'magnitude must be an integer in \[0, 10\], got 11'),
        (dict(magnitude=0.7), r'magnitude must be an integer in \[0, 10\], got 0\.7'),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClipRandAugment(**options)
