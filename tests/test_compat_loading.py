"""A bad image, mask or frame stops training, validation and test with its name; what is hidden is no sample."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from mmdyt import compat

compat.install()

import mmaction.datasets  # noqa: E402, F401
import mmpretrain.datasets  # noqa: E402, F401
import mmseg.datasets  # noqa: E402, F401
from mmengine.registry import DATASETS, DefaultScope  # noqa: E402

from mmdyt.compat.loading import install, is_cut_jpeg  # noqa: E402

NOISE = np.random.default_rng(0).integers(0, 255, (32, 48, 3)).astype(np.uint8)
JPEG, PNG = (cv2.imencode(ending, NOISE)[1].tobytes() for ending in ('.jpg', '.png'))
LOAD = dict(type='LoadImageFromFile')


def thumbnail() -> bytes:
    """A JPEG that holds another, whole one, as cameras write them."""
    small = cv2.imencode('.jpg', NOISE[::4, ::4])[1].tobytes()
    return JPEG[:2] + b'\xff\xe1' + (len(small) + 8).to_bytes(2, 'big') + b'Exif\0\0' + small + JPEG[2:]


BAD = dict(
    empty=(b'', 'it is empty'),
    text=(b'no image at all', 'it is no image'),
    zeros=(bytes(500), 'it is no image'),
    half_jpeg=(JPEG[: len(JPEG) // 2], 'it is cut short'),
    jpeg_without_end=(JPEG[:-2], 'it is cut short'),
    half_with_thumbnail=(thumbnail()[:-300], 'it is cut short'),
    half_png=(PNG[: len(PNG) // 2], 'it is cut short'),
    damaged_png=(PNG[:1000] + bytes(64) + PNG[1064:], 'it is damaged (broken data stream'),
)


def load(dataset: dict, scope: str, workers: int = 0) -> list:
    """All samples, as a data loader gives them."""
    with DefaultScope.overwrite_default_scope(scope):
        built = DATASETS.build(dict(_scope_=scope, **dataset))
        loader = DataLoader(
            built, num_workers=workers, collate_fn=list, multiprocessing_context='fork' if workers else None
        )
        return [sample for batch in loader for sample in batch]


def images(folder: Path, content: bytes | None = None, **load_options) -> dict:
    """A data set of mmpretrain with three images, the second of them bad."""
    for i in range(3):
        (folder / f'{i}.jpg').write_bytes(content if i == 1 and content is not None else JPEG)
    (folder / 'list.txt').write_text('0.jpg 0\n1.jpg 1\n2.jpg 0\n')
    pipeline = [LOAD | load_options, dict(type='PackInputs')]
    return dict(type='CustomDataset', data_root=str(folder), data_prefix='', ann_file='list.txt', pipeline=pipeline)


def pairs(folder: Path, image: bytes = PNG, mask: bytes | None = None, steps: tuple = (), **options) -> dict:
    """A data set of mmseg with three images and masks, the second of them as given."""
    good = cv2.imencode('.png', NOISE[..., 0] % 3)[1].tobytes()
    for name in ('images', 'masks'):
        (folder / name).mkdir(exist_ok=True)
    for i in range(3):
        (folder / 'images' / f'{i}.png').write_bytes(image if i == 1 else PNG)
        (folder / 'masks' / f'{i}.png').write_bytes(mask if i == 1 and mask is not None else good)
    pipeline = [LOAD, dict(type='LoadAnnotations'), *steps, dict(type='PackSegInputs')]
    prefix = dict(img_path='images', seg_map_path='masks')
    return dict(
        dict(type='BaseSegDataset', data_root=str(folder), data_prefix=prefix, img_suffix='.png', pipeline=pipeline),
        **options,
    )


def png(array: np.ndarray) -> bytes:
    return cv2.imencode('.png', array)[1].tobytes()


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize('bad', BAD)
def test_a_bad_image_is_named(tmp_path, bad, backend):
    content, reason = BAD[bad]
    with pytest.raises(ValueError) as error:
        load(images(tmp_path, content, imdecode_backend=backend), 'mmpretrain')
    assert str(error.value).startswith(f'img_path must name a sound image, got {tmp_path}/1.jpg: {reason}')
    assert str(error.value).endswith('Replace the file, or take it out of the list.')


@pytest.mark.parametrize(('workers', 'test_mode'), [(2, False), (0, True)])
def test_a_bad_image_is_named_in_training_and_test_with_and_without_workers(tmp_path, workers, test_mode):
    assert len(load(images(tmp_path) | dict(test_mode=test_mode), 'mmpretrain', workers)) == 3
    with pytest.raises(ValueError, match=f'got {tmp_path}/1.jpg: it is empty'):
        load(images(tmp_path, b'') | dict(test_mode=test_mode), 'mmpretrain', workers)


def test_a_file_that_is_gone_is_named(tmp_path):
    dataset = pairs(tmp_path, ann_file='list.txt')
    (tmp_path / 'list.txt').write_text('0\n9\n')
    with pytest.raises(
        ValueError, match='img_path must name a sound image, got .*/images/9.png: there is no such file'
    ):
        load(dataset, 'mmseg')
    (tmp_path / 'masks' / '0.png').unlink()
    with pytest.raises(ValueError, match='seg_map_path must name a sound mask, got .*/masks/0.png: there is no such'):
        load(dataset, 'mmseg')


def test_where_the_host_was_told_to_pass_over_bad_images_it_does(tmp_path):
    samples = load(images(tmp_path, b'', ignore_empty=True), 'mmpretrain')
    assert len(samples) == 3 and {Path(s['data_samples'].img_path).name for s in samples} == {'0.jpg', '2.jpg'}


def test_a_jpeg_that_is_cut_short_is_never_filled_with_grey(tmp_path, monkeypatch):
    """As OpenCV before 5 does."""
    monkeypatch.setattr(cv2, 'imdecode', lambda content, flag: np.full((32, 48, 3), 128, np.uint8))
    assert len(load(images(tmp_path), 'mmpretrain')) == 3
    with pytest.raises(ValueError, match='1.jpg: it is cut short'):
        load(images(tmp_path, JPEG[:-300]), 'mmpretrain')


@pytest.mark.parametrize('options', [[], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 1]])
def test_whole_jpegs_of_all_kinds_are_whole(options):
    content = cv2.imencode('.jpg', NOISE, options)[1].tobytes()
    assert not is_cut_jpeg(content) and not is_cut_jpeg(content + b'more') and not is_cut_jpeg(memoryview(content))
    assert all(is_cut_jpeg(content[:end]) for end in (2, 3, 10, len(content) // 2, len(content) - 1))
    assert not is_cut_jpeg(thumbnail()) and not is_cut_jpeg(PNG[:99]) and not is_cut_jpeg(b'')


@pytest.mark.parametrize(
    ('mask', 'message'),
    [
        (b'', 'seg_map_path must name a sound mask, got {mask}: it is empty.'),
        (b'text', 'seg_map_path must name a sound mask, got {mask}: it is no image.'),
        (PNG[:200], 'seg_map_path must name a sound mask, got {mask}: it is cut short.'),
        (
            png(np.zeros((16, 24), np.uint8)),
            'seg_map_path must name a mask as large as its image, 48 x 32 in {image}, got 24 x 16 in {mask}.',
        ),
        (
            png(np.zeros((64, 96), np.uint8)),
            'seg_map_path must name a mask as large as its image, 48 x 32 in {image}, got 96 x 64 in {mask}.',
        ),
        (
            png(np.zeros((48, 32), np.uint8)),
            'seg_map_path must name a mask as large as its image, 48 x 32 in {image}, got 32 x 48 in {mask}.',
        ),
        (png(NOISE), 'seg_map_path must name a mask of one channel, got 3 in {mask}.'),
        (png(np.zeros((32, 48, 4), np.uint8)), 'seg_map_path must name a mask of one channel, got 4 in {mask}.'),
    ],
    ids=['empty', 'text', 'cut', 'smaller', 'larger', 'turned', 'rgb', 'rgba'],
)
def test_a_bad_mask_is_named(tmp_path, mask, message):
    crop = dict(type='RandomCrop', crop_size=(16, 16))
    with pytest.raises(ValueError) as error:
        load(pairs(tmp_path, mask=mask, steps=(crop,)), 'mmseg')
    assert message.format(mask=tmp_path / 'masks/1.png', image=tmp_path / 'images/1.png') in str(error.value)


def exif_jpeg(orientation: int) -> bytes:
    """An image of 48 x 32 that is to be turned for display."""
    import io

    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(NOISE).save(file, 'JPEG', exif=exif)
    return file.getvalue()


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_an_image_turned_by_exif_needs_a_mask_that_is_turned(tmp_path, orientation, backend):
    dataset = pairs(tmp_path, image=exif_jpeg(orientation))
    dataset['pipeline'][0] = LOAD | dict(imdecode_backend=backend)
    if orientation < 5:
        assert len(load(dataset, 'mmseg')) == 3
        return
    with pytest.raises(ValueError, match='32 x 48 in .*1.png, got 48 x 32 in .*/masks/1.png. The image is turned by'):
        load(dataset, 'mmseg')
    dataset['pipeline'][0]['color_type'] = 'color_ignore_orientation'  # as the message says
    assert len(load(dataset, 'mmseg')) == 3
    turned = pairs(tmp_path, image=exif_jpeg(orientation), mask=png(np.zeros((48, 32), np.uint8)))
    assert len(load(turned, 'mmseg')) == 3


def test_masks_are_checked_in_validation_behind_the_resize_and_within_tta(tmp_path):
    resize, pack = dict(type='Resize', scale=(96, 64)), dict(type='PackSegInputs')
    tta = dict(type='TestTimeAug', transforms=[[resize], [dict(type='LoadAnnotations')], [pack]])
    for pipeline in ([LOAD, resize, dict(type='LoadAnnotations'), pack], [LOAD, tta]):
        assert len(load(pairs(tmp_path) | dict(pipeline=pipeline), 'mmseg')) == 3
        small = pairs(tmp_path, mask=png(np.zeros((16, 24), np.uint8))) | dict(pipeline=pipeline)
        with pytest.raises(ValueError, match='got 24 x 16 in .*/masks/1.png'):
            load(small, 'mmseg')


def test_colours_may_become_classes_in_a_transform_of_the_users_own(tmp_path):
    from mmcv.transforms import BaseTransform
    from mmengine.registry import TRANSFORMS

    class ToClasses(BaseTransform):
        def transform(self, results):
            results['gt_seg_map'] = (
                results['gt_seg_map'][..., 0] % 3 if results['gt_seg_map'].ndim == 3 else results['gt_seg_map']
            )
            return results

    TRANSFORMS.register_module(module=ToClasses, name='test_loading_ToClasses', force=True)
    assert len(load(pairs(tmp_path, mask=png(NOISE), steps=(dict(type='test_loading_ToClasses'),)), 'mmseg')) == 3


def test_a_step_that_fails_on_a_sound_image_names_it(tmp_path):
    steps = (dict(type='RandomRotate', prob=1.0, degree=10, seg_pad_val='x'),)
    with pytest.raises(
        ValueError, match='pipeline must fit every sample, got one that RandomRotate fails on, .*/0.png: '
    ):
        load(pairs(tmp_path, steps=steps), 'mmseg')


def test_a_bad_frame_is_named(tmp_path):
    (tmp_path / 'clip').mkdir()
    for i in range(1, 5):
        (tmp_path / 'clip' / f'img_{i:05}.jpg').write_bytes(b'' if i == 3 else JPEG)
    (tmp_path / 'list.txt').write_text('clip 4 0\n')
    pipeline = [
        dict(type='SampleFrames', clip_len=4, frame_interval=1, num_clips=1, test_mode=True),
        dict(type='RawFrameDecode'),
    ]
    dataset = dict(type='RawframeDataset', ann_file=str(tmp_path / 'list.txt'), data_prefix=dict(img=str(tmp_path)))
    with pytest.raises(ValueError, match='frame_dir must name a sound frame, got .*/clip/img_00003.jpg: it is empty'):
        load(dataset | dict(pipeline=pipeline), 'mmaction')


@pytest.mark.parametrize('opener', ['DecordInit', 'PyAVInit'])
@pytest.mark.parametrize('content', [b'', b'no video'])
def test_a_bad_video_is_named_by_stock_openers_too(tmp_path, opener, content):
    pytest.importorskip(dict(DecordInit='decord', PyAVInit='av')[opener])
    (tmp_path / 'a.mp4').write_bytes(content)
    (tmp_path / 'list.txt').write_text('a.mp4 0\n')
    dataset = dict(type='VideoDataset', ann_file=str(tmp_path / 'list.txt'), data_prefix=dict(video=str(tmp_path)))
    with pytest.raises(ValueError, match=f'filename must name a sound file, got {tmp_path}/a.mp4: '):
        load(dataset | dict(pipeline=[dict(type=opener)]), 'mmaction')


def test_hidden_folders_and_files_are_no_classes_and_no_samples(tmp_path):
    for name in ('cat', 'dog', '.ipynb_checkpoints', 'dog/.thumbs'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'a.jpg').write_bytes(JPEG)
    for name in ('.DS_Store', 'cat/._a.jpg', 'cat/.DS_Store'):
        (tmp_path / name).write_bytes(b'')
    samples = load(dict(type='CustomDataset', data_root=str(tmp_path), pipeline=[LOAD]), 'mmpretrain')
    assert [(Path(s['img_path']).parent.name, s['gt_label']) for s in samples] == [('cat', 0), ('dog', 1)]
    folders = pairs(tmp_path)
    for kind in ('images', 'masks'):
        (tmp_path / kind / '.ipynb_checkpoints').mkdir()
    (tmp_path / 'images' / '.ipynb_checkpoints' / '0-checkpoint.png').write_bytes(PNG)
    assert len(load(folders, 'mmseg')) == 3


def test_installing_again_changes_nothing():
    import mmcv
    from mmcv.transforms import BaseTransform

    before = BaseTransform.__call__, mmcv.imfrombytes
    install()
    assert (BaseTransform.__call__, mmcv.imfrombytes) == before
