"""Data that is missing, broken, or means something else than the config says."""

import cv2
import numpy as np
import spoil
from case import refused, stops, works

IMAGE, MASK = 'images/training/3.png', 'annotations/training/3.png'
PNG = b'\x89PNG\r\n\x1a\n'


def _rotated(here):
    """A JPEG whose EXIF says that it lies on its side, with a mask that stands."""
    from PIL import Image

    picture = Image.open(here / IMAGE).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(here / IMAGE.replace('.png', '.jpg'), exif=exif)
    (here / IMAGE).unlink()
    (here / IMAGE.replace('.png', '.jpg')).rename(here / IMAGE)


def _turned_mask(here):
    """A picture that EXIF turns, whose mask was drawn before it was turned."""
    from PIL import Image

    picture = Image.open(here / IMAGE)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.convert('RGB').save(here / 'turned.jpg', exif=exif)
    (here / 'turned.jpg').rename(here / IMAGE)


def _color_mask(here):
    cv2.imwrite(str(here / MASK), np.zeros((64, 96, 3), np.uint8) + np.uint8([1, 2, 3]))


def _rgba_images(here):
    for file in (here / 'images').rglob('*.png'):
        picture = cv2.imread(str(file))
        cv2.imwrite(str(file), np.dstack([picture, np.full(picture.shape[:2], 128, np.uint8)]))


def _gray_images(here):
    for file in here.glob('*.png'):
        cv2.imwrite(str(file), cv2.imread(str(file), cv2.IMREAD_GRAYSCALE))


def _unlike_sizes(here):
    rng = np.random.default_rng(0)
    for i, file in enumerate(sorted((here / 'images').rglob('*.png'))):
        size = (64 + 7 * i, 81 + 3 * i)
        cv2.imwrite(str(file), rng.integers(0, 255, (*size, 3)).astype(np.uint8))
        mask = Mask = str(file).replace('images', 'annotations')
        cv2.imwrite(Mask, rng.integers(0, 4, size).astype(np.uint8)) and mask


def _ignored_only(here):
    for file in (here / 'annotations').rglob('*.png'):
        cv2.imwrite(str(file), np.zeros((64, 96), np.uint8))


BROKEN = [
    ('zero bytes', b''),
    ('text', b'this is no image at all'),
    ('header only', PNG),
    ('html', b'<html><body>404</body></html>' * 20),
]

IMAGES = [
    *(refused('image', 'train seg', '3.png', change=spoil.content(IMAGE, data)) for _, data in BROKEN),
    *(refused('mask', 'train seg', '3.png', change=spoil.content(MASK, data)) for _, data in BROKEN),
    *(
        stops('image', 'test seg {ckpt}', '2.png', change=spoil.content('images/validation/2.png', data))
        for _, data in BROKEN
    ),
    *(stops('image', 'train cls', 'train7.png', change=spoil.content('train7.png', data)) for _, data in BROKEN),
    *(stops('image', 'test cls {ckpt}', 'test5.png', change=spoil.content('test5.png', data)) for _, data in BROKEN),
    *(
        stops('clip', 'train video', 'train4.mp4', change=spoil.content('videos/train4.mp4', data))
        for _, data in BROKEN[:2]
    ),
    *(
        stops('clip', 'test video {ckpt}', 'val3.mp4', change=spoil.content('videos/val3.mp4', data))
        for _, data in BROKEN[:2]
    ),
    *(stops('image', 'train seg', '3.png', change=spoil.cut(IMAGE, share)) for share in (0.3, 0.9)),
    *(stops('mask', 'train seg', '3.png', change=spoil.cut(MASK, share)) for share in (0.3, 0.7)),
    *(stops('image', 'train cls', 'train7.png', change=spoil.cut('train7.png', share)) for share in (0.3, 0.9)),
    stops('clip', 'train video', 'train4.mp4', change=spoil.cut('videos/train4.mp4', 0.4)),
    stops('image', 'train seg', '3.png', change=spoil.image(IMAGE, (32, 32, 3))),
    stops('mask', 'train seg', '3.png', change=spoil.image(MASK, (32, 96), 1)),
    stops('mask', 'train seg', '3.png', change=spoil.image(MASK, (96, 64), 1)),
    stops('mask', 'train seg', '3.png', change=_color_mask),
    stops('mask', 'train seg', '3.png', change=_turned_mask),
    stops('mask', 'test seg {ckpt}', '1.png', change=spoil.image('annotations/validation/1.png', (60, 96), 1)),
    works('image', 'train seg', change=_rotated),
    works('image', 'train seg', change=_rgba_images),
    works('image', 'train cls', change=_gray_images),
    works('image', 'train seg', change=_unlike_sizes),
    works('mask', 'train seg --cfg-options train_cfg.max_iters=2', change=_ignored_only),
    works('image', 'train cls', change=spoil.image('train7.png', (1, 1, 3))),
    works('image', 'train cls', change=spoil.image('train7.png', (3, 900, 3))),
]

MISSING = [
    refused('missing', 'train seg', 'images', change=spoil.remove('images/training')),
    refused('missing', 'train seg', 'annotations', change=spoil.remove('annotations/validation')),
    refused('missing', 'train seg', '3.png', change=spoil.remove(MASK)),
    refused('missing', 'train cls', 'train7.png', change=spoil.remove('train7.png')),
    refused('missing', 'train cls', 'test5.png', change=spoil.remove('test5.png')),
    refused('missing', 'train cls', 'train.txt', change=spoil.remove('train.txt')),
    refused('missing', 'test cls {ckpt}', 'test.txt', change=spoil.remove('test.txt')),
    refused('missing', 'train video', 'train4.mp4', change=spoil.remove('videos/train4.mp4')),
    refused('missing', 'train video', 'videos', change=spoil.remove('videos')),
    refused('missing', 'train folders', 'train', change=spoil.remove('train')),
    refused('missing', 'train folders', 'val', change=spoil.remove('val')),
    refused('missing', 'train seg', 'annotations', change=spoil.rename('annotations', 'annotation')),
    refused(
        'missing',
        'vtab vtab --root {here}/root --tasks cifar',
        'train800val200',
        change=spoil.remove('root/cifar/train800val200.txt'),
    ),
]

LISTS = [
    *(
        refused('list', 'train cls', *says, change=change)
        for says, change in (
            (('train.txt',), spoil.content('train.txt', '')),
            (('train.txt',), spoil.content('train.txt', '\n\n')),
            (('train.txt',), spoil.content('train.txt', b'\xff\xfe\x00\x01' * 40)),
            (('train.txt', '7'), spoil.replace('train.txt', 'train6.png 0', 'train6.png')),
            (('train.txt', '7'), spoil.replace('train.txt', 'train6.png 0', 'train6.png zero')),
            (('train.txt', '7'), spoil.replace('train.txt', 'train6.png 0', 'train6.png -1')),
            (('train.txt', '7'), spoil.replace('train.txt', 'train6.png 0', 'train6.png 3')),
            (('train.txt', '7'), spoil.replace('train.txt', 'train6.png 0', 'train6.png 0.5')),
            (('train.txt', '7'), spoil.replace('train.txt', 'train6.png 0', 'train6.png 1 2')),
            (('train.txt', '7'), spoil.replace('train.txt', 'train6.png 0', 'train6.png,0')),
            (('train6.png',), spoil.replace('train.txt', 'train6.png 0', 'images/train6.png 0')),
            (('test.txt',), spoil.replace('test.txt', 'test4.png 1', 'test4.png 9')),
        )
    ),
    *(
        refused('list', 'train video', *says, change=change)
        for says, change in (
            (('train.txt',), spoil.content('train.txt', '')),
            (('train.txt', '5'), spoil.replace('train.txt', 'train4.mp4 1', 'train4.mp4')),
            (('train.txt', '5'), spoil.replace('train.txt', 'train4.mp4 1', 'train4.mp4 one')),
            (('train.txt', '5'), spoil.replace('train.txt', 'train4.mp4 1', 'train4.mp4 3')),
            (('val.txt',), spoil.replace('val.txt', 'val3.mp4 0', 'val3.mp4 -1')),
        )
    ),
    refused('list', 'train cls', 'train.txt', change=spoil.append('train.txt', '\n\n')),
    works('list', 'train cls', change=spoil.replace('train.txt', '\n', '\r\n')),
    refused('list', 'train cls', 'train.txt', change=spoil.replace('train.txt', 'train0.png', '\ufefftrain0.png')),
    works(
        'list',
        'train cls',
        change=spoil.both(
            spoil.rename('train6.png', 'my images/train 6.png'),
            spoil.replace('train.txt', 'train6.png 0', 'my images/train 6.png 0'),
        ),
    ),
    works(
        'list',
        'train cls',
        change=spoil.both(
            spoil.rename('train6.png', 'Übung/日本.png'), spoil.replace('train.txt', 'train6.png', 'Übung/日本.png')
        ),
    ),
]


def _only_first_class(here):
    text = (here / 'test.txt').read_text().splitlines()
    (here / 'test.txt').write_text('\n'.join(line for line in text if line.endswith(' 0')) + '\n')


LABELS = [
    *(
        refused('labels', f'{command} folders{more}', *says, change=change)
        for command, more in (('train', ''), ('test', ' {ckpt}'))
        for says, change in (
            (('green',), spoil.remove('val/green')),
            (('green',), spoil.rename('val/green', 'val/Green')),
            (('violet;class folders',), spoil.image('val/violet/0.png', (20, 24, 3))),
        )
    ),
    refused('labels', 'train folders', 'violet;class folders', change=spoil.image('train/violet/0.png', (20, 24, 3))),
    refused('labels', 'train folders', 'green', change=spoil.remove('train/green')),
    works(
        'labels',
        'train folders',
        change=spoil.both(spoil.remove('val/green'), spoil.remove('train/green')),
        check=lambda here, said: 'will not be trained' in said,
    ),
    refused('labels', 'train folders --cfg-options model.head.num_classes=2', 'num_classes'),
    *(refused('labels', 'train seg', '3.png', change=spoil.image(MASK, (64, 96), value)) for value in (4, 77, 254)),
    refused('labels', 'train seg', '0.png', change=spoil.image('annotations/validation/0.png', (64, 96), 9)),
    refused(
        'labels', 'train seg', 'classes', change=spoil.replace('config.py', "'sky', 'road', 'car'", "'sky', 'road'")
    ),
    refused(
        'labels',
        'train seg',
        'classes',
        change=spoil.replace('config.py', "'sky', 'road', 'car'", "'sky', 'road', 'car', 'tree'"),
    ),
    refused(
        'labels',
        'train seg',
        'classes',
        change=spoil.append(
            'config.py', "\nval_dataloader['dataset']['metainfo'] = dict(classes=('car', 'road', 'sky'))\n"
        ),
    ),
    refused(
        'labels',
        'train seg',
        'reduce_zero_label',
        change=spoil.append('config.py', "\nval_dataloader['dataset']['reduce_zero_label'] = False\n"),
    ),
    refused(
        'labels',
        'train cls',
        'classes',
        change=spoil.append('config.py', "\ntrain_dataloader['dataset']['metainfo'] = dict(classes=('a', 'b'))\n"),
    ),
    refused(
        'labels',
        'train cls',
        'classes',
        change=spoil.append(
            'config.py',
            "\ntrain_dataloader['dataset']['metainfo'] = dict(classes=('a', 'b', 'c'))\n"
            "val_dataloader['dataset']['metainfo'] = dict(classes=('b', 'a', 'c'))\n",
        ),
    ),
    works('labels', 'train cls', change=_only_first_class),
    works('labels', 'train seg', change=spoil.image(MASK, (64, 96), 255)),
    works('labels', 'train folders', change=spoil.content('val/.DS_Store', b'\0\0')),
    works('labels', 'train folders', change=spoil.content('train/.ipynb_checkpoints/red-checkpoint.png', b'\0')),
    works('labels', 'train folders', change=spoil.content('train/red/.hidden.png', b'\0')),
    works('labels', 'train folders', change=spoil.content('train/notes.txt', 'about these images')),
    works('labels', 'train folders', change=spoil.content('train/red/Thumbs.db', b'\0')),
    works('labels', 'train seg', change=spoil.content('images/training/.hidden.png', b'\0')),
]

CASES = IMAGES + MISSING + LISTS + LABELS
