"""Every cell of every level that a decoder reads holds what its own token was given, whatever was skipped.

Pixels carry their image, row and column. A token knows those of its first pixel, and the branches of each block write
what they read from the tokens that reach them, into channels of their own: a token that is misplaced on its way into a
branch, or back from it, leaves the coordinate of another one. B images, C channels.
"""

import copy
from itertools import islice

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import mmdyt.models.segmentor  # noqa: F401  repairs the wheels before mmseg is imported
from mmdyt.core import executors
from mmdyt.core.attention import DENSE, attend
from mmdyt.core.dispatch import straight_through
from mmdyt.core.grid import windows
from mmdyt.core.observe import decisions, dynamic_branches, record_dispatch

# isort: split
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

LAYERS, CHANNELS, PATCH = 4, 64, 16
CODE = 4  # image, row, column, and 1 for a patch
SIZES = [(64, 64), (48, 80), (50, 70), (33, 97), (40, 24)]  # square or not, of whole patches or not, one below the crop
FACTORS = [4, 2, 1, 0.5]
PYRAMID = dict(type='Feature2Pyramid', embed_dim=CHANNELS, rescales=FACTORS, norm_cfg=dict(type='BN'))
ADAPTED = dict(type='mmdyt.MoEAdapterNeck', in_channels=[CHANNELS] * 4, rescales=FACTORS, norm_cfg=dict(type='BN'))


@pytest.fixture
def build(tiny_model_cfg):
    """A segmentor whose tokens are coordinates, whose branches write them, and whose neck only resizes."""

    def built(neck=PYRAMID, train=False, **backbone):
        torch.manual_seed(0)
        arch = dict(tiny_model_cfg.backbone.arch, embed_dims=CHANNELS)
        backbone = {**tiny_model_cfg.backbone, 'arch': arch, 'init_cfg': None, 'drop_path_rate': 0.0, **backbone}
        # the heads are not read
        heads = dict(decode_head=dict(tiny_model_cfg.decode_head, in_channels=[CHANNELS] * 4), auxiliary_head=None)
        model = MODELS.build(dict(tiny_model_cfg, neck=neck, backbone=backbone, **heads)).train(train)
        code_tokens(model.backbone)
        bypass(getattr(model.neck, 'pyramid', model.neck))
        return model

    return built


@torch.no_grad()
def code_tokens(backbone) -> None:
    """Patch tokens are the first pixel of their patch, and a 1; all others are 0."""
    for parameter in (
        backbone.cls_token,
        backbone.pos_embed,
        *(p for n, p in backbone.named_parameters() if 'prompts' in n),
    ):
        if parameter is not None:
            parameter.zero_()
    conv = backbone.patch_embed.projection
    conv.weight.zero_(), conv.bias.zero_()
    for channel in range(3):
        conv.weight[channel, channel, 0, 0] = 1
    conv.bias[3] = 1
    for i, layer in enumerate(backbone.layers):
        layer.attention_branch, layer.mlp_branch = attention_of(slot(i)), mlp_of(slot(i) + 2 * CODE)


def slot(layer: int) -> int:
    """The first channel of a layer: coordinates from attention, the mean of its keys, coordinates from the MLP."""
    return CODE + 3 * CODE * layer


def mlp_of(first: int):
    def mlp(x, layout=DENSE):
        return written(layout.queries(x), first)

    return mlp


def attention_of(first: int):
    def attention(x, layout, state=None):
        code = x[..., :CODE].unsqueeze(1)
        query = layout.queries(x)
        mean = attend(torch.zeros_like(query[..., :CODE]).unsqueeze(1), torch.zeros_like(code), code, layout)
        update = written(query, first)
        update[..., first + CODE : first + 2 * CODE] = mean.squeeze(1)
        return update

    return attention


def written(x: Tensor, first: int) -> Tensor:
    """An update that holds the coordinate of each token, from a channel on."""
    update = torch.zeros_like(x)
    update[..., first : first + CODE] = x[..., :CODE]
    return update


@torch.no_grad()
def bypass(pyramid) -> None:
    """Upsampling repeats cells."""
    pyramid.upsample_4x[1], pyramid.upsample_4x[2] = nn.Identity(), nn.Identity()
    for conv in (pyramid.upsample_4x[0], pyramid.upsample_4x[3], pyramid.upsample_2x[0]):
        conv.bias.zero_()
        conv.weight.copy_(torch.eye(CHANNELS)[..., None, None].expand_as(conv.weight))


def images(batch: int, height: int, width: int, flip: str = 'none', scale: float = 1.0) -> Tensor:
    """(B, 3, height, width): pixels that hold their image, and their row and column in the image as it was."""
    rows, columns = (torch.arange(side) / scale + 1 for side in (height, width))
    found = torch.stack(
        [torch.stack([torch.full((height, width), float(b + 1)), *torch.meshgrid(rows, columns, indexing='ij')])
         for b in range(batch)]
    )  # fmt: skip
    return found.flip(dict(none=(), horizontal=(3,), vertical=(2,))[flip])


def drawn(share: str, seed: int = 0, learnt: bool = False):
    """A rule: real decisions about scores that are drawn, of some tokens or of all or none of whole images."""
    generator = torch.Generator().manual_seed(seed)
    offsets = dict(none=[-99.0], all=[99.0], some=[0.0], uneven=[99.0, -99.0, 0.0])[share]

    def rule(dispatcher, x, state):
        prefix = dispatcher.num_prefix_tokens + state.prompts
        logits = torch.randn(x.shape[0], x.shape[1] - prefix, 1, generator=generator)
        logits += torch.tensor([offsets[i % len(offsets)] for i in range(len(x))])[:, None, None]
        dispatch = dispatcher.decide(logits, prefix)
        if learnt:
            soft = nn.functional.pad(logits.requires_grad_().sigmoid(), (0, 0, prefix, 0), value=1.0)
            dispatch = dispatch.with_mask(straight_through(soft, dispatch.mask))
        return dispatch

    return rule


class Looks:
    """What each pass of a backbone was given, what it decided, and what the heads then read, in turn."""

    def __init__(self, model):
        self.model, self.inputs, self.features = model, [], []

    def __enter__(self):
        self._handles = [
            self.model.backbone.register_forward_hook(lambda module, args, out: self.inputs.append(args[0])),
            self.model.neck.register_forward_hook(lambda module, args, out: self.features.append(out)),
        ]
        self._recording = record_dispatch(self.model)
        self.record = self._recording.__enter__()
        return self

    def __exit__(self, *error):
        self._recording.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def levels(self, index: int) -> list[Tensor]:
        """What the backbone must give in a pass, (B, C, rows, columns) for each level, by the masks of that pass."""
        backbone, decided = self.model.backbone, self.record.of_pass(index)
        code = self.inputs[index][:, :, ::PATCH, ::PATCH]
        code = torch.cat([code, torch.ones_like(code[:, :1])], dim=1)
        found = torch.zeros(len(code), CHANNELS, *code.shape[2:])
        found[:, :CODE] = code
        levels = []
        for i, (layer, prefix) in enumerate(zip(backbone.layers, backbone.prefixes(), strict=True)):
            for site, branch in layer.branches().items():
                dispatch = decided.get(f'backbone.layers.{i}.dynamic.{site}')
                mask = torch.ones_like(code[:, :1]) if dispatch is None else on_image(dispatch, code)
                first = slot(i)
                if site != 'mlp':
                    sees_all = branch.keys == 'all' or (
                        branch.training and branch.training_executor == 'masked_all_keys'
                    )
                    seen = torch.ones_like(mask) if sees_all else mask
                    total = (seen * code).sum(dim=(2, 3), keepdim=True)
                    number = seen.sum(dim=(2, 3), keepdim=True) + prefix
                    found[:, first : first + CODE] = mask * code
                    found[:, first + CODE : first + 2 * CODE] = mask * total / number.clamp(min=1)
                if site != 'attn':
                    found[:, first + 2 * CODE : first + 3 * CODE] = mask * code
            levels.append(found.clone())
        return levels

    def check(self, least: int = 1) -> None:
        """Every cell of every level of every pass."""
        assert len(self.inputs) == len(self.features) >= least
        for index, features in enumerate(self.features):
            for level, (found, expected) in enumerate(zip(features, self.levels(index), strict=True)):
                torch.testing.assert_close(
                    found.detach(), resized(expected, FACTORS[level]), rtol=0, atol=1e-3,
                    msg=lambda text, level=level, index=index: f'level {level} of pass {index}: {text}',
                )  # fmt: skip
            self.check_masks(index)

    def check_masks(self, index: int) -> None:
        """Masks of levels say what the branches wrote: their 1 for a patch."""
        masks = self.model.level_masks(self.record, self.inputs[index], index)
        sites = self.model.backbone.layers[0].sites
        for level, (mask, features) in enumerate(zip(masks, self.features[index], strict=True)):
            if FACTORS[level] >= 1:  # the pyramid pools by the maximum
                channels = [slot(level) + (CODE - 1 if site == 'attn' else 3 * CODE - 1) for site in sites]
                torch.testing.assert_close(mask, features[:, channels].mean(1, keepdim=True), rtol=0, atol=1e-6)


def on_image(dispatch, code: Tensor) -> Tensor:
    """(B, 1, rows, columns)."""
    return dispatch.patch_mask.detach().float().reshape(len(code), 1, *code.shape[2:])


def resized(x: Tensor, factor: float) -> Tensor:
    if factor < 1:
        return nn.functional.max_pool2d(x, round(1 / factor))
    return x.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


def set_rules(model, inference: str, share: str) -> None:
    capacity = dict(none=0.0, some=0.4, all=1.0, uneven=0.6)[share] if inference == 'fixed' else None
    for branch in dynamic_branches(model).values():
        branch.dispatcher.set_rule(capacity=capacity)


def look(model, inputs: Tensor, rule=None, gradients: bool = False) -> Looks:
    with torch.set_grad_enabled(gradients), Looks(model) as looks:
        if rule is None:
            model.extract_feat(inputs)
        else:
            with decisions(model, rule):
                model.extract_feat(inputs)
    return looks


DISPATCH = [('mlp', 'active'), ('attn', 'active'), ('attn', 'all'), ('attn_mlp', 'active'), ('attn_mlp', 'all')]
DISPATCH += [('layer', 'active'), ('layer', 'all')]


@pytest.mark.parametrize('share', ['none', 'some', 'all', 'uneven'])
@pytest.mark.parametrize('inference', ['masked', 'packed', 'fixed'])
@pytest.mark.parametrize(('dispatch', 'keys'), DISPATCH)
def test_inference(build, dispatch, keys, inference, share):
    model = build(dispatch=dispatch, keys=keys, inference=inference)
    set_rules(model, inference, share)
    for batch, size in enumerate(SIZES, start=1):
        look(model, images(batch, *size), drawn(share, batch)).check()


@pytest.mark.parametrize('share', ['some', 'uneven'])
@pytest.mark.parametrize('learnt', [True, False])
@pytest.mark.parametrize('training', ['masked', 'split', 'active_only', 'masked_all_keys'])
@pytest.mark.parametrize(('dispatch', 'keys'), DISPATCH)
def test_training(build, dispatch, keys, training, learnt, share):
    dispatcher = dict(type='mmdyt.TokenDispatcher', noise=False, fitted=True)
    model = build(train=True, dispatch=dispatch, keys=keys, training=training, dispatcher=dispatcher)
    for batch, size in ((1, SIZES[3]), (4, SIZES[2])):
        look(model, images(batch, *size), drawn(share, batch, learnt), gradients=True).check()


OTHERS = dict(
    without_prefix=dict(with_cls_token=False),
    prompts=dict(parts=[dict(type='mmdyt.Prompts', length=3)]),
    fewer_prompts=dict(parts=[dict(type='mmdyt.Prompts', length=2, layers=[0])]),
    adapted_neck=dict(neck=ADAPTED),
    break_even=dict(break_even=0.5),
    no_adapter=dict(adapter=None),
)


@pytest.mark.parametrize('inference', ['masked', 'packed', 'fixed'])
@pytest.mark.parametrize(('dispatch', 'keys'), [('mlp', 'active'), ('attn_mlp', 'active'), ('layer', 'all')])
@pytest.mark.parametrize('name', OTHERS)
def test_other_sequences(build, name, dispatch, keys, inference):
    model = build(dispatch=dispatch, keys=keys, inference=inference, **OTHERS[name])
    for share in ('none', 'some', 'uneven'):
        set_rules(model, inference, share)
        for batch, size in ((1, SIZES[3]), (3, SIZES[2])):
            look(model, images(batch, *size), drawn(share, batch)).check()


DISPATCHERS = dict(
    token=dict(type='mmdyt.TokenDispatcher'),
    sample=dict(type='mmdyt.SampleDispatcher'),
    cell=dict(type='mmdyt.CellDispatcher', cell=(2, 3)),
    random=dict(type='mmdyt.RandomDispatcher'),
    none=None,
)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('dispatch', ['mlp', 'attn_mlp', 'layer'])
@pytest.mark.parametrize('name', DISPATCHERS)
def test_dispatchers(build, name, dispatch, train):
    model = build(train=train, dispatch=dispatch, dispatcher=DISPATCHERS[name])
    for branch in dynamic_branches(model).values():
        if hasattr(branch.dispatcher, 'gate'):
            nn.init.normal_(branch.dispatcher.gate.weight[:, :3], std=0.1)
    for batch, size in enumerate(SIZES, start=1):
        look(model, images(batch, *size), gradients=train).check()


@pytest.mark.parametrize('inference', ['masked', 'packed', 'fixed'])
@pytest.mark.parametrize('dispatch', ['mlp', 'attn_mlp', 'layer'])
def test_inactive_tokens_get_their_substitute(build, dispatch, inference):
    model = build(dispatch=dispatch, inference=inference, substitute=dict(type='mmdyt.MeanUpdate'))
    set_rules(model, inference, 'some')
    branches = dynamic_branches(model)
    for branch in branches.values():
        branch.substitute.value.data[-1] = 1.0  # a channel of its own
    looks = look(model, images(3, 50, 70), drawn('some'))
    expected = sum(
        1 - on_image(d, looks.inputs[0][:, :, ::PATCH, ::PATCH])
        for d in list(looks.record.flat())[: 3 * len(branches) // 4]
    )
    torch.testing.assert_close(looks.features[0][2][:, -1:], expected)
    for features in looks.features[0]:
        features[:, -1] = 0
    looks.check()


def samples(batch: int, size, **meta) -> list[SegDataSample]:
    meta = dict(ori_shape=tuple(size), img_shape=tuple(size), img_path='x.png') | meta
    labels = PixelData(data=torch.zeros(1, *size, dtype=torch.long))
    return [SegDataSample(gt_sem_seg=labels, metainfo=dict(meta)) for _ in range(batch)]


def show_first_level(model) -> None:
    """Heads that tell what is in the finest level, pixel by pixel."""
    model.num_classes = model.out_channels = CHANNELS
    model.decode_head.predict = lambda features, metas, test_cfg: per_pixel(features[0], 4, metas[0]['img_shape'])


def per_pixel(features: Tensor, pixels: int, size) -> Tensor:
    return resized(features, pixels)[..., : size[0], : size[1]]


@pytest.mark.parametrize('flip', ['none', 'horizontal', 'vertical'])
@pytest.mark.parametrize('scale', [1.0, 1.5])
@pytest.mark.parametrize('at_once', [1, 2, 100])
@pytest.mark.parametrize('size', [(80, 112), (70, 90), (40, 24), (64, 100)])
def test_windows_flips_and_scales(build, size, at_once, scale, flip):
    """What each window saw, and what the test makes of all of them in the coordinates of the image."""
    batch = 2
    model = build(dispatch='attn_mlp')
    show_first_level(model)
    slide = dict(mode='slide', crop_size=(64, 64), stride=(24, 40))
    model.test_cfg.update(slide if at_once == 1 else slide | dict(windows_per_pass=at_once))
    inputs = images(batch, *size, flip, scale)
    data = samples(batch, size, **(dict(flip=True, flip_direction=flip) if flip != 'none' else {}))
    with torch.no_grad(), Looks(model) as looks, decisions(model, drawn('uneven')):
        results = model(inputs, data, mode='predict')
    places = windows(size, (64, 64), (24, 40))
    looks.check(least=-(-len(places) // at_once))
    total, seen = torch.zeros(batch, CHANNELS, *size), torch.zeros(*size)
    remaining = iter(places)
    for index, shown in enumerate(looks.inputs):
        some = list(islice(remaining, at_once))
        level = per_pixel(looks.levels(index)[0], PATCH, shown.shape[2:]).unflatten(0, (batch, len(some)))
        for i, (top, left, height, width) in enumerate(some):
            place = (..., slice(top, top + height), slice(left, left + width))
            assert torch.equal(shown.unflatten(0, (batch, len(some)))[:, i], inputs[place])
            total[place] += level[:, i]
            seen[place] += 1
    expected = (total / seen).flip(dict(none=(), horizontal=(3,), vertical=(2,))[flip])
    for result, of_image in zip(results, expected, strict=True):
        torch.testing.assert_close(result.seg_logits.data, of_image, rtol=0, atol=1e-3)


@pytest.mark.parametrize('mode', ['predict', 'loss'])
@pytest.mark.parametrize(('dispatch', 'inference'), [('mlp', 'packed'), ('attn_mlp', 'masked'), ('layer', 'fixed')])
def test_padding(build, dispatch, inference, mode):
    """Images of several sizes, padded to that of the batch: padding is skipped, and moves nothing."""
    model = build(dispatch=dispatch, inference=inference)
    set_rules(model, inference, 'some')
    show_first_level(model)
    sizes = [(64, 96), (40, 96), (50, 33)]
    inputs, data = images(3, 64, 96), []
    for i, (height, width) in enumerate(sizes):
        inputs[i, :, height:], inputs[i, :, :, width:] = 0, 0
        padding = (0, 96 - width, 0, 64 - height)
        data += samples(1, (64, 96), ori_shape=(height, width), img_padding_size=padding, padding_size=padding)
    if mode == 'loss':
        model.train()
        model.decode_head.loss = lambda features, samples, cfg: dict(loss_ce=features[0].sum())
    with torch.set_grad_enabled(mode == 'loss'), Looks(model) as looks, decisions(model, drawn('some')):
        results = model(inputs, data, mode=mode)
    looks.check()
    first = per_pixel(looks.levels(0)[0], PATCH, (64, 96))
    for i, (height, width) in enumerate(sizes):
        rows, columns = -(-height // PATCH) * PATCH, -(-width // PATCH) * PATCH
        assert not first[i, slot(0) + 3 * CODE - 1, rows:].any()
        assert not first[i, slot(0) + 3 * CODE - 1, :, columns:].any()
        if mode == 'predict':
            expected = first[i, :, :height, :width]
            torch.testing.assert_close(results[i].seg_logits.data, expected, rtol=0, atol=1e-3)


def one_token_on(dispatch):
    """The decision as one would misread it: rows one further."""
    moved = copy.copy(dispatch)
    rows, tokens = dispatch.rows(), dispatch.mask.shape[:2].numel()
    moved._rows = (rows + 1) % tokens
    return moved


@pytest.mark.parametrize('what', ['scatter', 'gather', 'both', 'images'])
@pytest.mark.parametrize(('dispatch', 'keys'), DISPATCH)
@pytest.mark.parametrize('inference', ['packed', 'fixed'])
def test_a_token_out_of_place_is_found(build, monkeypatch, inference, dispatch, keys, what):
    """The check itself: an index that is shifted by one, or images that change places, do not pass."""
    model = build(dispatch=dispatch, keys=keys, inference=inference)
    set_rules(model, inference, 'some')
    scatter = executors._scatter

    def broken(update, out, of):
        if what == 'images':
            half = len(update) // 2
            return scatter(torch.cat([update[half:], update[:half]]), out, of)
        if what == 'gather':  # each token gets what the one before it read
            return scatter(update.roll(1, 0), out, of)
        return scatter(update, out, one_token_on(of))

    if what == 'both':
        run = executors.EXECUTORS[inference]
        monkeypatch.setitem(
            executors.EXECUTORS, inference, lambda *args: run(*args[:3], one_token_on(args[3]), args[4])
        )
    else:
        monkeypatch.setattr(executors, '_scatter', broken)
    looks = look(model, images(2, 48, 80), drawn('some'))
    with pytest.raises(AssertionError, match='level 0 of pass 0'):
        looks.check()
