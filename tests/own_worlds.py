"""Data as a user has it: class folders, masks, clips; classes are told apart by their colour."""

from pathlib import Path

NAMES = ('blue', 'green', 'red')


def colour(rng, label: int, *shape: int):
    """A picture (\\*shape, 3) in 8 bits, blue first, of noise and one colour."""
    import numpy as np

    picture = rng.integers(0, 60, (*shape, 3))
    picture[..., label] += 180
    return picture.astype(np.uint8)


def draw_class_folders(root: Path, splits=(('train', 4), ('val', 2))) -> Path:
    """``SPLIT/CLASS/i.png`` of 36 x 40; a split named '' has its classes in the root."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    for split, number in splits:
        for label, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                cv2.imwrite(str(root / split / name / f'{i}.png'), colour(rng, label, 36, 40))
    return root


def draw_masks(root: Path, splits=(('train', 6), ('val', 2))) -> Path:
    """``images/SPLIT/i.jpg`` and ``masks/SPLIT/i.png`` of 48 x 64 with the labels 0, 1, 2, and ``classes.txt``."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    for split, number in splits:
        for kind in ('images', 'masks'):
            (root / kind / split).mkdir(parents=True)
        for i in range(number):
            labels = np.kron(rng.integers(0, 3, (3, 4)), np.ones((16, 16))).astype(np.uint8)
            cv2.imwrite(str(root / 'masks' / split / f'{i}.png'), labels)
            picture = np.stack([colour(rng, label, 48, 64) for label in range(3)])
            picture = np.take_along_axis(picture, labels[None, ..., None], 0)[0]
            cv2.imwrite(str(root / 'images' / split / f'{i}.jpg'), picture)
    (root / 'classes.txt').write_text('\n'.join(NAMES) + '\n')
    return root


def draw_clips(root: Path, splits=(('train', 3), ('val', 1))) -> Path:
    """``SPLIT/CLASS/i.mp4`` of 10 frames of 32 x 40."""
    import numpy as np
    from conftest import write_clip

    rng = np.random.default_rng(0)
    for split, number in splits:
        for label, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                write_clip(root / split / name / f'{i}.mp4', colour(rng, label, 10, 32, 40)[..., ::-1])
    return root


def draw_clip_lists(root: Path) -> Path:
    """The clips of :func:`draw_clips` in ``videos``, and lists of them."""
    draw_clips(root / 'videos')
    for split, number in (('train', 3), ('val', 1)):
        lines = [f'{split}/{name}/{i}.mp4 {label}' for label, name in enumerate(NAMES) for i in range(number)]
        (root / f'{split}.txt').write_text('\n'.join(lines) + '\n')
    (root / 'classes.txt').write_text('\n'.join(NAMES) + '\n')
    return root


DRAW = dict(classification=draw_class_folders, segmentation=draw_masks, video=draw_clips)
