"""mmdyt.apis: from a checkpoint to predictions, in three tasks."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from predicting import CLASSES, make_checkpoint

from mmdyt.apis import Prediction, Skipped, load
from mmdyt.core.observe import record_dispatch
from mmdyt.files import BadFileError

TASKS = dict(cls='tiny_cls_config', seg='tiny_config', video='tiny_video_config')


@pytest.fixture(scope='module')
def made(request, tmp_path_factory):
    """``made(task)`` gives a checkpoint that carries its config, and three inputs."""
    known = {}

    def make(task: str) -> tuple[Path, list[str]]:
        if task not in known:
            config = request.getfixturevalue(TASKS[task])
            folder = tmp_path_factory.mktemp(task)
            known[task] = make_checkpoint(config, folder), inputs_of(task, config)
        return known[task]

    def inputs_of(task: str, config: Path) -> list[str]:
        if task == 'seg':
            return sorted(map(str, (request.getfixturevalue('ade_root') / 'images/validation').iterdir()))[:3]
        return sorted(map(str, config.parent.glob('test*.png' if task == 'cls' else 'videos/val*.mp4')))[:3]

    return make


def frames_of(path: str) -> np.ndarray:
    """All frames of a clip, red first."""
    from decord import VideoReader

    return VideoReader(path)[:].asnumpy()


def same(one: Prediction, other: Prediction) -> None:
    """Refuse predictions that differ by more than rounding; names of files may."""
    assert [scored[:2] for scored in one.top] == [scored[:2] for scored in other.top]
    np.testing.assert_allclose([s.score for s in one.top], [s.score for s in other.top], atol=1e-5)
    assert one.gmacs == pytest.approx(other.gmacs, rel=1e-6) and one.rates == pytest.approx(other.rates)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_equal(one.segmentation, other.segmentation)


@pytest.mark.parametrize('task', TASKS)
def test_no_config_is_needed_and_files_give_predictions(made, task):
    checkpoint, inputs = made(task)
    model = load(checkpoint)
    one = model(inputs[0])
    assert one.file == inputs[0] and {name for name, _, _ in one.top} <= set(CLASSES)
    assert all(a.score >= b.score for a, b in zip(one.top, one.top[1:], strict=False))
    assert all(CLASSES[label] == name for name, label, _ in one.top)
    assert sum(score for _, _, score in one.top) == pytest.approx(1)  # of all three classes
    assert 0 < one.gmacs < 1.5 * one.gmacs_dense and 0 < one.rate < 1
    assert (one.segmentation is None) == (task != 'seg')
    if task == 'seg':
        assert one.segmentation.shape == (64, 96)
        assert one.top[0].score == pytest.approx((one.segmentation == one.top[0].label).mean())
    assert one.tokens.ndim == (3 if task == 'video' else 2) and 0 <= np.nanmin(one.tokens) <= np.nanmax(one.tokens) <= 1


@pytest.mark.parametrize('task', TASKS)
def test_batches_equal_singles_and_arrays_equal_paths(made, task):
    checkpoint, inputs = made(task)
    model = load(checkpoint)
    singles = [model(path) for path in inputs]
    arrays = [frames_of(path) if task == 'video' else cv2.imread(path) for path in inputs]
    for found in (model(inputs, batch_size=2), model(inputs, batch_size=8), model(arrays, batch_size=3)):
        assert len(found) == len(singles)
        for one, other in zip(found, singles, strict=True):
            same(one, other)
    assert [one.file for one in model(arrays)] == ['input 0', 'input 1', 'input 2']


def test_inputs_of_several_sizes_keep_their_order(made, tmp_path):
    checkpoint, _ = made('seg')
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (*size, 3), np.uint8) for size in [(64, 96), (64, 64), (64, 96), (96, 64)]]
    model = load(checkpoint)
    together = model(images, batch_size=4)
    assert [one.segmentation.shape for one in together] == [image.shape[:2] for image in images]
    for one, image in zip(together, images, strict=True):
        same(one, model(image))


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('rate', [0.25, 0.5, 1.0])
def test_a_rate_is_met_on_every_input_without_calibration(made, task, rate):
    checkpoint, inputs = made(task)
    model = load(checkpoint).set_rate(rate)
    for one in model(inputs):
        assert one.rate == pytest.approx(rate)  # 4 and 24 tokens divide so
    own = load(checkpoint)(inputs[0])
    same(model.set_rate(None)(inputs[0]), own)


@pytest.mark.parametrize('task', TASKS)
def test_a_cost_is_met_on_every_input(made, task):
    checkpoint, inputs = made(task)
    model = load(checkpoint)
    least, most = (model.set_rate(rate)(inputs[0]).gmacs for rate in (1e-6, 1.0))
    tokens = dict(cls=4, seg=24, video=4)[task]  # of an image
    for share in (0.3, 0.8, 2.0):
        wanted = least + share * (most - least)
        for one in model.set_gmacs(wanted)(inputs):
            assert one.gmacs <= wanted * (1 + 1e-9)
            assert one.gmacs >= min(wanted, most) - 1.01 * (most - least) / tokens  # one more token would be too dear
    with pytest.raises(ValueError, match='gmacs must be at least'):
        model.set_gmacs(0.9 * least)(inputs[0])


def test_a_cost_is_that_of_all_windows(request, tmp_path):
    options = {'model.test_cfg.mode': 'slide', 'model.test_cfg.crop_size': (64, 64), 'model.test_cfg.stride': (32, 32)}
    model = load(make_checkpoint(request.getfixturevalue('tiny_config'), tmp_path, options=options))
    small, large = (np.random.default_rng(0).integers(0, 255, (64, w, 3), np.uint8) for w in (64, 96))
    assert model(large).gmacs_dense == pytest.approx(2 * model(small).gmacs_dense)
    least, most = (model.set_rate(rate)(large).gmacs for rate in (1e-6, 1.0))
    wanted = (least + most) / 2
    found = model.set_gmacs(wanted)([small, large])  # each has the rate that it can afford
    assert found[0].rate == 1 and found[0].gmacs == pytest.approx(most / 2)
    assert wanted - (most - least) / 16 <= found[1].gmacs <= wanted * (1 + 1e-9)


def test_shares_of_a_calibrated_checkpoint_keep_their_order(request, tmp_path):
    own = [0.9, 0.75, 0.5, 0.1]
    checkpoint = make_checkpoint(request.getfixturevalue('tiny_config'), tmp_path, capacities=own)
    model = load(checkpoint)
    assert not model.equal_shares
    for rate in (0.05, 0.3, 0.6, 0.95):
        shares = list(model._rates.shares(rate).values())
        assert np.mean(shares) == pytest.approx(rate) and shares == sorted(shares, reverse=True)
    assert list(model._rates.shares(np.mean(own)).values()) == pytest.approx(own)
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    assert model.set_rate(0.4)(image).rate == pytest.approx(0.4, abs=0.5 / 24)
    assert list(model.set_rate(None)(image).rates.values()) == pytest.approx(own, abs=0.5 / 24)


def test_a_broken_file_is_skipped_and_named_where_others_go_on(made, tmp_path):
    checkpoint, inputs = made('cls')
    broken = tmp_path / 'broken.png'
    broken.write_bytes(Path(inputs[0]).read_bytes()[:60])
    sources = [inputs[0], str(broken), str(tmp_path / 'none.png'), inputs[1], np.zeros((4, 4), np.uint8)]
    model = load(checkpoint)
    found = list(model.each(sources, batch_size=8))
    assert [type(one) for one in found] == [Prediction, Skipped, Skipped, Prediction, Skipped]
    assert str(broken) in str(found[1]) and 'none.png' in str(found[2]) and 'image (H, W, 3)' in str(found[4])
    same(found[3], model(inputs[1]))
    with pytest.raises(BadFileError, match='broken.png'):
        model(str(broken))


def test_folders_and_lists(made, tmp_path):
    checkpoint, inputs = made('cls')
    model = load(checkpoint)
    listed = tmp_path / 'list.txt'
    listed.write_text(f'# two\n{inputs[1]} 2\n\n{inputs[0]}\n')
    assert [one.file for one in model(listed)] == [inputs[1], inputs[0]]
    assert len(model(Path(inputs[0]).parent)) == 27  # of 18 + 9 images
    with pytest.raises(FileNotFoundError, match='nowhere'):
        model('nowhere')


def test_names_of_classes(request, tmp_path):
    """The checkpoint's, else the config's, else numbers."""
    config = request.getfixturevalue('tiny_config')
    checkpoint = make_checkpoint(config, tmp_path)
    content = torch.load(checkpoint)
    assert load(checkpoint, config).classes == CLASSES
    del content['meta']['dataset_meta']
    torch.save(content, checkpoint)
    for names in (load(checkpoint, config), load(checkpoint), load(checkpoint, Config.fromfile(config))):
        assert names.classes == ('sky', 'road', 'car') and names.palette[2] == [255, 0, 0]
    plain = make_checkpoint(request.getfixturevalue('tiny_cls_config'), tmp_path)
    content = torch.load(plain)
    del content['meta']['dataset_meta']
    torch.save(content, plain)
    assert {s.name for s in load(plain)(np.zeros((9, 9, 3), np.uint8)).top} == {'class 0', 'class 1', 'class 2'}


def test_configs_whose_types_are_classes(tiny_cls_config, made, tmp_path):
    """Python-style ones, as files, as objects, and as they lie in a checkpoint."""
    checkpoint, inputs = made('cls')
    text = Config.fromfile(tiny_cls_config, import_custom_modules=False).pretty_text
    for name in ('mmdyt.DyTImageClassifier', 'LoadImageFromFile'):
        assert f"type='{name}'" in text
        text = text.replace(f"type='{name}'", f'type={name.split(".")[-1]}')
    imports = 'from mmcv.transforms import LoadImageFromFile\nfrom mmdyt.models.classifier import DyTImageClassifier\n'
    file, copied = tmp_path / 'python_style.py', tmp_path / 'copied.pth'
    file.write_text(imports + text)
    content = torch.load(checkpoint)
    content['meta']['cfg'] = Config.fromfile(file).pretty_text
    torch.save(content, copied)
    wanted = load(checkpoint)(inputs[0]).line()
    for model in (load(checkpoint, file), load(checkpoint, Config.fromfile(file)), load(copied)):
        assert model(inputs[0]).line() == wanted


def test_what_a_model_cannot_do_is_refused(made, request, tmp_path):
    checkpoint, inputs = made('cls')
    model = load(checkpoint)
    for call, message in [
        (lambda: model.set_rate(0), 'rate must lie in'),
        (lambda: model.set_gmacs(-1), 'gmacs must be a positive number'),
        (lambda: model(inputs, batch_size=0), 'batch_size must be at least 1'),
        (lambda: model(inputs, top=0), 'top must be at least 1'),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    options = {'model.backbone.dispatcher': None}
    plain = make_checkpoint(request.getfixturevalue('tiny_cls_config'), tmp_path, options=options)
    plain = load(plain)
    with pytest.raises(ValueError, match='must have a dispatcher with a threshold'):
        plain.set_rate(0.5)
    one = plain(inputs[0])  # predicts all the same
    assert one.rate is None and one.tokens is None and one.gmacs > one.gmacs_dense
    assert 'null' not in str(one) and one.line()['activation_rate'] is None


def test_scores_of_a_video_head_are_probabilities(made):
    checkpoint, inputs = made('video')
    model = load(checkpoint)
    assert model.host.cls_head.average_clips == 'score'
    by_score = model(inputs[0])
    model.host.cls_head.average_clips = None
    assert sum(s.score for s in model(inputs[0]).top) == pytest.approx(1)
    assert all(0 <= s.score <= 1 for s in by_score.top)


def test_logits_that_are_no_numbers_are_no_prediction(made):
    checkpoint, inputs = made('cls')
    model = load(checkpoint)
    torch.nn.init.constant_(model.host.head.layers.head.bias, torch.nan)
    (found,) = model.each(inputs[:1])
    assert isinstance(found, Skipped) and 'NaN' in found.line()['error']


def test_iterating_holds_nothing_open(made):
    """Who iterates may watch the model meanwhile, and each sees what is its own."""
    checkpoint, inputs = made('cls')
    model = load(checkpoint)
    wanted = model(inputs)
    found = model.each(inputs)
    several = [next(found)]
    with record_dispatch(model.host) as record:
        several.append(next(found))
        assert all(len(passes) == 1 for passes in record.dispatches.values())
    several.append(next(found))
    assert all(len(passes) == 1 for passes in record.dispatches.values())
    for one, other in zip(several, wanted, strict=True):
        same(one, other)


@pytest.mark.parametrize('task', TASKS)
def test_a_pass_that_was_interrupted_leaves_no_trace(made, task, monkeypatch):
    checkpoint, inputs = made(task)
    model = load(checkpoint)
    whole = model(inputs[0])
    predict = model.host.predict

    def stop(*args, **options):
        predict(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.host, 'predict', stop)
        with pytest.raises(KeyboardInterrupt):
            model(inputs)
    same(model(inputs[0]), whole)


@pytest.mark.gpu
def test_on_a_gpu(made):
    checkpoint, inputs = made('cls')
    model = load(checkpoint)
    there = load(checkpoint).to('cuda')
    assert there.device.type == 'cuda'
    assert there(inputs[0]).top[0].score == pytest.approx(model(inputs[0]).top[0].score, abs=1e-3)
