"""Vision Transformers whose tokens become fewer: the plain one where none do, cost, restored maps, export."""

import pytest
import torch
from mmpretrain.models.backbones import VisionTransformer
from static_graphs import export_any_batch, not_static
from test_vit import TINY

from mmdyt.core.attention import DENSE
from mmdyt.core.fit.calibrate import calibrate, token_dispatchers
from mmdyt.core.fit.request import CalibrationRequest
from mmdyt.core.grid import View, on_grid
from mmdyt.core.levels import level_masks
from mmdyt.core.macs import count_macs
from mmdyt.core.observe import dynamic_branches, record_dispatch
from mmdyt.core.padding import showing
from mmdyt.core.restoring import RESTORE
from mmdyt.core.tokens import TokenState
from mmdyt.core.tuning import count_parameters
from mmdyt.models import DyTVisionTransformer

SPARSE = [dict(type='mmdyt.SparseTokens', keep_rate=0.6), dict(type='mmdyt.DenseAdapter', bottleneck=4)]
GATED = [dict(type='mmdyt.EvidenceTokens', keep_rate=0.6, attention=True), SPARSE[1]]
TOME = [dict(type='mmdyt.ToMe', r=2)]
SCOPED = [dict(type='mmdyt.ToMe', r=10, scope='mlp')]
METHODS = pytest.mark.parametrize(
    'parts', [SPARSE, GATED, TOME, [*SPARSE, *TOME]], ids=['sparse', 'gated', 'tome', 'both']
)
SIZE = (32, 48)  # of pixels: 4 x 6 patches
ARCH = dict(TINY, num_layers=4)


def build(parts, seed=0, **options) -> DyTVisionTransformer:
    torch.manual_seed(seed)
    options = dict(adapter=None, dispatcher=None, img_size=SIZE, patch_size=8) | options
    model = DyTVisionTransformer(arch=ARCH, parts=parts, **options)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if 'dense_adapter.up' in name or 'adapter.up' in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def images(number=3) -> torch.Tensor:
    return torch.randn(number, 3, *SIZE, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def run(model, x):
    return model(x)[-1]


@pytest.mark.parametrize('out_type', ['cls_token', 'featmap', 'avg_featmap', 'raw'])
@pytest.mark.parametrize(
    'part',
    [
        dict(type='mmdyt.SparseTokens', keep_rate=1),
        dict(type='mmdyt.ToMe', r=0),
        dict(type='mmdyt.ToMe', r=0, scope='mlp'),
    ],
    ids=['k = 1', 'r = 0', 'scoped'],
)
def test_nothing_to_reduce_is_the_plain_network(part, out_type):
    model = build([part], out_type=out_type)
    plain = VisionTransformer(ARCH, img_size=SIZE, patch_size=8, out_type=out_type)
    plain.load_state_dict(model.state_dict())
    plain.eval()
    assert torch.equal(run(model, images()), run(build([], out_type=out_type), images()))
    torch.testing.assert_close(run(model, images()), run(plain, images()), rtol=0, atol=1e-5)


@METHODS
@pytest.mark.parametrize('dispatched', [False, True])
@pytest.mark.parametrize('cls', [True, False])
def test_the_cost_is_that_of_an_operator_counter(parts, dispatched, cls):
    options = dict(dispatcher=dict(type='mmdyt.TokenDispatcher')) if dispatched else {}
    model = build(parts, with_cls_token=cls, out_type='featmap', **options)
    for branch in dynamic_branches(model).values():
        branch.dispatcher.set_rule(capacity=0.5)
    x = images(1)
    with record_dispatch(model) as record:
        counted = count_macs(lambda: model(x))
    assert float(model.macs_of(24, {name: runs[0] for name, runs in record.runs.items()})) == pytest.approx(counted)
    active = {name: passes[0].mask.sum().item() for name, passes in record.dispatches.items()}
    assert float(model.macs(*SIZE, active)) == pytest.approx(counted)
    assert counted < count_macs(lambda: build([], with_cls_token=cls, out_type='featmap', adapter=None)(x)) * 1.2


@pytest.mark.parametrize('adapters', [['dense'], ['plain'], ['plain', 'dense', 'plus'], []], ids='+'.join)
@pytest.mark.parametrize('fuse', ['sum', 'none'])
def test_cells_that_left_go_on_through_the_adapters_at_their_cost(fuse, adapters):
    kinds = dict(dense=SPARSE[1], plain=dict(type='mmdyt.Adapter', bottleneck=4), plus=dict(type='mmdyt.AdapterPlus'))
    parts = [dict(SPARSE[0], fuse=fuse), *(kinds[name] for name in adapters)]
    model, x = build(parts, out_type='featmap', restore='stale+adapter', final_norm=False), images(2)
    seen = {}
    for i, layer in enumerate(model.layers):
        for part in layer.dynamic['mlp'].deltas():
            torch.nn.init.normal_(part.up.weight, std=0.1)
        layer.register_forward_hook(lambda module, args, out, i=i: seen.update({i: (args[1].live, args[1].left)}))
    with record_dispatch(model) as record:
        counted = count_macs(lambda: run(model, x[:1]))
    assert float(model.macs_of(24, {name: runs[0] for name, runs in record.runs.items()})) == pytest.approx(counted)
    assert float(model.macs(*SIZE, {})) == pytest.approx(counted)
    features = run(model, x).flatten(2).transpose(1, 2)
    live, left = seen[3]
    assert torch.equal(features[~live], left[~live]) and 0 < live.float().mean() < 1
    before = dict(live=seen[1][0], value=seen[1][1])  # as of the second layer, where the first step is
    gone, value = ~before['live'], before['value']
    for layer in model.layers[2:]:
        read = value
        for part in layer.dynamic['mlp'].deltas('parallel'):
            value = value + part.alone(read, TokenState(1))
        for part in layer.dynamic['mlp'].deltas('serial'):
            value = value + part.alone(value, TokenState(1))
    torch.testing.assert_close(features[gone], value[gone], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('keep_rate', 'expected'), [(0.9, 15.594), (0.8, 13.495), (0.7, 11.752), (0.6, 10.208), (0.5, 8.920)]
)
def test_sparse_tuning_costs_and_tunes_what_the_paper_says(keep_rate, expected):
    """arXiv 2405.14700 draws 11.7 G and 1.08 M at 0.7; scores and the weighted sum are in no published count."""
    parts = [dict(type='mmdyt.SparseTokens', keep_rate=keep_rate), dict(type='mmdyt.DenseAdapter')]
    with torch.device('meta'):
        model = DyTVisionTransformer(arch='base', adapter=None, dispatcher=None, parts=parts, out_type='raw')
    lengths, extra = [197], 0
    for i, layer in enumerate(model.layers):
        extra += sum(part.macs(lengths[-1], 1, min(i, 3)) for part in layer.steps('mid'))
        lengths.append(layer.patches_after(lengths[-1] - 1, 1) + 1)
    macs = (model.macs(224, 224, {}) - extra) / 1e9
    assert int(macs * 1000) / 1000 == expected
    assert count_parameters(model)['tuned'] == 1_091_584
    if keep_rate == 0.7:
        assert sorted(set(lengths), reverse=True) == [197, 140, 100, 72]


@pytest.mark.parametrize(
    ('keep_rate', 'expected'), [(1, 4.6), (0.9, 4.0), (0.8, 3.5), (0.7, 3.0), (0.6, 2.6), (0.5, 2.3)]
)
def test_a_deit_s_costs_what_evit_published(keep_rate, expected):
    """Arxiv 2202.07800, in G, to one digit as there."""
    parts = [dict(type='mmdyt.SparseTokens', keep_rate=keep_rate)]
    with torch.device('meta'):
        model = DyTVisionTransformer(arch='deit-small', adapter=None, dispatcher=None, parts=parts, out_type='raw')
    assert round(model.macs(224, 224, {}) / 1e9, 1) == expected


@pytest.mark.parametrize(('r', 'expected'), [(4, 15.343), (8, 13.122), (13, 10.381), (16, 8.783)])
def test_tome_costs_what_its_matching_and_fewer_tokens_cost(r, expected):
    """Closed form of arXiv 2210.09461 with |A||B|D for the matching."""
    with torch.device('meta'):
        model = DyTVisionTransformer(
            arch='base', adapter=None, dispatcher=None, parts=[dict(type='mmdyt.ToMe', r=r)], out_type='raw'
        )
    assert int(model.macs(224, 224, {}) / 1e6) / 1000 == expected


def test_a_falling_schedule_merges_as_many_in_all_but_for_rounding():
    model = build([dict(type='mmdyt.ToMe', r=3, schedule='falling')])
    assert [layer.steps('mid')[0].pairs for layer in model.layers] == [6, 4, 2, 0]


@METHODS
def test_an_image_is_the_same_alone_and_in_any_batch(parts):
    model, x = build(parts, out_type='featmap'), images(4)
    together = run(model, x)
    for i in range(4):
        torch.testing.assert_close(run(model, x[i : i + 1])[0], together[i], rtol=0, atol=1e-5)
    torch.testing.assert_close(run(model, x.flip(0)).flip(0), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize('restore', RESTORE)
@METHODS
def test_every_patch_has_a_feature_at_every_level(parts, restore):
    model, x = build(parts, out_type='featmap', out_indices=[0, 1, 3], restore=restore, final_norm=False), images()
    states = []
    model.layers[-1].register_forward_hook(lambda module, args, out: states.append((args[1], out)))
    with torch.no_grad():
        levels = model(x)
    assert [level.shape for level in levels] == 3 * [(3, 32, 4, 6)]
    ((state, tokens),) = states
    cells, patches = levels[-1].flatten(2).transpose(1, 2), tokens[:, 1:]
    for image in range(3):
        live = state.live[image]
        assert torch.equal(cells[image, live], patches[image, state.owner[image, live]])  # bit by bit
    assert state.live.all() == (parts is TOME)


def test_a_cell_that_left_is_stale():
    """Reference: the features of the last block that the token still ran, which the earlier level shows."""
    model = build([dict(type='mmdyt.SparseTokens', at=[1], keep_rate=0.5)], out_type='featmap', out_indices=[0, 3],
                  final_norm=False)  # fmt: skip
    seen = []
    model.layers[1].dynamic['attn'].register_forward_hook(lambda module, args, out: seen.append(out))
    model.layers[3].register_forward_hook(lambda module, args, out: seen.append(args[1]))
    with torch.no_grad():
        cells = model(images())[-1].flatten(2).transpose(1, 2)
    mid, state = seen
    left = ~state.live
    assert left.sum().item() == 3 * 12
    assert torch.equal(cells[left], mid[:, 1:][left])


@METHODS
def test_prompts_and_the_class_token_are_spared(parts):
    model = build([dict(type='mmdyt.Prompts', length=3, deep=True), *parts], out_type='raw')
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append((args[1].first, out.shape[1])))
    whole = run(model, images())
    assert whole.shape == (3, 25, 32) and [first for first, _ in seen] == 4 * [4]
    assert seen[-1][1] == 4 + model.layers[-1].patches_after(seen[-2][1] - 4, 4)


@METHODS
def test_training_reaches_everything_that_is_tuned(parts):
    model = build(parts, out_type='featmap', out_indices=[1, 3]).train()
    generator = torch.Generator().manual_seed(3)
    loss = sum((level * torch.randn(level.shape, generator=generator)).sum() for level in model(images()))
    if parts is TOME:
        assert not loss.requires_grad  # it tunes nothing
        return
    loss.backward()
    tuned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert tuned


@METHODS
def test_autocast_runs(parts):
    model, x = build(parts, out_type='featmap'), images()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        half = run(model, x)
    assert (half.float() - run(model, x)).abs().mean() < 0.1 * run(model, x).abs().mean()


@pytest.mark.parametrize(
    ('parts', 'restore'),
    [
        (SPARSE, 'stale+delta'),
        (SPARSE, 'knn'),
        (GATED, 'stale+adapter'),
        ([*SPARSE, *TOME], 'stale'),
        (TOME, 'merge'),
        (SCOPED, 'stale'),
    ],
    ids=['delta', 'knn', 'gated', 'both', 'merge', 'scoped'],
)
def test_it_is_exported_with_static_shapes(parts, restore):
    model, x = build(parts, out_type='featmap', restore=restore), images()
    program = export_any_batch(model, x)
    assert not not_static(program)
    torch.testing.assert_close(program.module()(x)[-1], run(model, x), rtol=0, atol=1e-4)


@METHODS
def test_dispatch_goes_on_among_the_tokens_that_are_left(parts):
    model, x = build(parts, out_type='featmap', dispatcher=dict(type='mmdyt.TokenDispatcher')), images(8)
    for dispatcher in token_dispatchers(model).values():
        torch.nn.init.normal_(dispatcher.gate.weight)
    calibrate(model, [lambda: model(x)], CalibrationRequest(0.5, 'uniform', per_image=True))
    with torch.no_grad(), record_dispatch(model) as record:
        packed = model(x)[-1]
    maps = on_grid(record.flat(), (4, 6))
    assert maps.shape == (4, 8, 4, 6)
    for found, dispatch in zip(maps.flatten(2), record.flat(), strict=True):
        left = dispatch.patch_mask.shape[1]
        assert 0.3 < dispatch.patch_mask.mean() < 0.7
        owner = torch.arange(24).expand(8, -1) if dispatch.owner is None else dispatch.owner
        assert owner.max() < left and torch.equal(found, dispatch.patch_mask[..., 0].gather(1, owner))
    for branch in dynamic_branches(model).values():
        branch.inference = 'masked'
    torch.testing.assert_close(packed, run(model, x), rtol=0, atol=1e-4)


@torch.no_grad()
def test_merged_for_the_mlp_only_every_patch_keeps_its_own():
    """Reference: the MLP on the means of groups, by hand, from the groups of the plan."""
    model, x = build(SCOPED), torch.randn(2, 25, 32, generator=torch.Generator().manual_seed(3))
    layer, state = model.layers[1], TokenState(prefix=1)
    y = x + layer.attention_branch(x, DENSE, state)
    plan = layer.steps('around')[0].plan(y, state)
    assert plan.number == 14
    expected = y + layer.mlp_branch(y, DENSE)
    for image in range(2):
        for slot in range(14):
            group = 1 + (plan.slots[image] == slot).nonzero().flatten()
            mean = y[image, group].mean(0, keepdim=True)
            expected[image, group] = y[image, group] + layer.mlp_branch(mean[None], DENSE)[0]
    out = layer(x, TokenState(prefix=1))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    counted = count_macs(lambda: model(images(1)))
    assert model.macs(*SIZE, {}) == counted


def test_merged_for_the_mlp_only_costs_what_its_rows_cost():
    with torch.device('meta'):
        model = DyTVisionTransformer(
            arch='base', adapter=None, dispatcher=None, parts=[dict(type='mmdyt.ToMe', r=98, scope='mlp')]
        )
    assert model.macs(224, 224, {}) / 1e9 == pytest.approx(12.04, abs=0.005)


def test_tokens_skip_an_mlp_or_share_its_update():
    with pytest.raises(ValueError, match='dispatcher must be None beside a ToMe around the MLP, got one'):
        build(SCOPED, dispatcher=dict(type='mmdyt.TokenDispatcher'))


@pytest.mark.parametrize('parts', [SPARSE[:1], TOME, SCOPED], ids=['sparse', 'tome', 'scoped'])
@pytest.mark.parametrize('dispatch', ['attn', 'attn_mlp', 'layer'])
def test_attention_must_run_on_all_tokens(parts, dispatch):
    with pytest.raises(ValueError, match='dispatch must'):
        build(parts, dispatch=dispatch, dispatcher=dict(type='mmdyt.TokenDispatcher'))


TOKENS = dict(dispatcher=dict(type='mmdyt.TokenDispatcher'))
CELLS = dict(dispatcher=dict(type='mmdyt.CellDispatcher'))
LEVEL = TOKENS | dict(decide_per='level', out_indices=[1, 3], out_type='featmap')


@pytest.mark.parametrize(
    ('part', 'options', 'message'),
    [
        (dict(type='mmdyt.SparseTokens', keep_rate=70), {}, 'keep_rate must lie in (0, 1], got 70.'),
        (dict(type='mmdyt.SparseTokens', fuse='max'), {}, "fuse must be one of ['sum', 'mean', 'none'], got 'max'."),
        (dict(type='mmdyt.SparseTokens', at=[9]), {}, 'at must hold fractions in [0, 1) or indices below 4, got 9.'),
        (dict(type='mmdyt.SparseTokens', at=0.5), {}, 'at must be a list of fractions or indices, got 0.5.'),
        (dict(type='mmdyt.SparseTokens', at='all'), {}, "at must be a list of fractions or indices, got 'all'."),
        (dict(type='mmdyt.ToMe', r=-1), {}, 'r must be a number of pairs, got -1.'),
        (
            dict(type='mmdyt.ToMe', schedule='rising'),
            {},
            "schedule must be one of ['constant', 'falling'], got 'rising'.",
        ),
        (dict(type='mmdyt.ToMe', scope='attn'), {}, "scope must be one of ['block', 'mlp'], got 'attn'."),
        (dict(type='mmdyt.ToMe', pairs=3), {}, 'parts must not set pairs of a ToMe, which is filled in, got 3.'),
        (
            dict(type='mmdyt.DenseAdapter', index=3),
            {},
            'parts must not set index of a DenseAdapter, which is filled in',
        ),
        (dict(type='mmdyt.DenseAdapter', bottleneck=0), {}, 'bottleneck must be a positive integer, got 0.'),
        (dict(type='mmdyt.DenseAdapter', layers=[0, 2]), {}, 'layers must hold 1, which layer 2 reads, got none.'),
        (dict(type='mmdyt.ToMe'), CELLS, 'dispatcher must not be a CellDispatcher behind a ToMe'),
        (dict(type='mmdyt.ToMe'), LEVEL, "decide_per must be 'layer' with a ToMe between layers that share a decision"),
        (
            dict(type='mmdyt.SparseTokens', keep_rate=0.95, at=[1]),
            LEVEL,
            "decide_per must be 'layer' with a SparseTokens",
        ),
        (
            dict(type='mmdyt.SparseTokens', fuse='none'),
            dict(out_type='featmap', restore='fused'),
            "restore must be 'stale', 'stale+adapter' or 'knn' with a SparseTokens that drops tokens, got 'fused'.",
        ),
        (
            dict(type='mmdyt.SparseTokens'),
            dict(restore='stale+adapter', adapter=dict(type='mmdyt.MoEAdapter', num_experts=2), out_type='featmap'),
            "restore must not be 'stale+adapter' with a MoEAdapter, which reads all tokens, got it.",
        ),
        (
            dict(type='mmdyt.ToMe'),
            dict(restore='best'),
            "restore must be one of ['stale', 'stale+delta', 'stale+adapter'",
        ),
    ],
)
def test_mistakes_are_refused_before_work_starts(part, options, message):
    with pytest.raises(ValueError, match='.') as error:
        build([part], **options)
    assert message in str(error.value)


def test_one_dense_adapter_a_layer():
    two = [dict(type='mmdyt.DenseAdapter', site=site) for site in ('attn', 'mlp')]
    with pytest.raises(ValueError, match='parts must hold one DenseAdapter a layer, got two in layer 0.'):
        build(two)


def test_levels_may_begin_where_tokens_become_fewer():
    """The decision of a level is about the tokens that are left when its first layer decides."""
    model = build([dict(type='mmdyt.SparseTokens', at=[2], keep_rate=0.5)], **LEVEL)
    with torch.no_grad(), record_dispatch(model) as record:
        model(images())
    assert [d.tokens for d in record.flat()] == [25, 25, 14, 14]


@pytest.mark.parametrize('parts', [SPARSE, TOME, SCOPED, [*SPARSE, *TOME]], ids=['sparse', 'tome', 'scoped', 'both'])
@pytest.mark.parametrize('cls', [True, False])
@pytest.mark.parametrize('skip', [True, False])
def test_with_prompts_the_cost_is_that_of_an_operator_counter(parts, cls, skip):
    if skip and not cls:
        pytest.skip('without a class token all tokens are read')
    kind = dict(out_type='cls_token', skip_unread=True) if skip else dict(out_type='featmap')
    model, x = build([dict(type='mmdyt.Prompts', length=3), *parts], with_cls_token=cls, **kind), images(1)
    with record_dispatch(model) as record:
        counted = count_macs(lambda: model(x))
    assert float(model.macs_of(24, {name: runs[0] for name, runs in record.runs.items()})) == pytest.approx(counted)
    assert float(model.macs(*SIZE, {})) == pytest.approx(counted)


@pytest.mark.parametrize('parts', [SPARSE[:1], TOME, SCOPED], ids=['sparse', 'tome', 'scoped'])
def test_padding_counts_in_no_cost_rate_or_map(parts):
    """Reference: tokens that show something of the image, counted in the state of the pass."""
    model = build(parts, out_type='featmap', final_norm=False)
    sizes, first = [(32, 48), (16, 24)], 1
    views = [View(size, (8, 8)) for size in sizes]
    shown = [24, 6]
    with torch.no_grad(), record_dispatch(model) as record, showing(lambda rows: views):
        model(images(2))
    for name, (run,) in record.runs.items():
        if not name.endswith('mlp'):
            continue
        assert torch.as_tensor(run.queries)[1] < torch.as_tensor(run.queries)[0], name
        for image in range(2):
            assert first <= torch.as_tensor(run.queries)[image] <= first + shown[image]
    macs = model.macs_of(torch.tensor(shown), {name: passes[0] for name, passes in record.runs.items()})
    assert macs.shape == (2,) and macs[1] < macs[0] / 2
    for (dispatch,) in record.dispatches.values():
        part = dispatch.took_part().squeeze(-1)
        hidden = torch.zeros(4, 6, dtype=torch.bool)
        hidden[2:], hidden[:, 3:] = True, True
        assert not part[1][hidden.flatten()].any()
        assert part[0].sum() == pytest.approx(dispatch.patch_mask[0].sum().item(), abs=1e-4)


def test_levels_know_padding_where_tokens_are_fewer():
    model = build(
        [dict(type='mmdyt.SparseTokens', keep_rate=0.3, at=[1])], out_type='featmap', out_indices=[0, 3], **TOKENS
    )
    views = [View((16, 48), (8, 8))] * 2
    with torch.no_grad(), record_dispatch(model) as record, showing(lambda rows: views):
        features = model(images(2))
    for mask in level_masks(record.of_pass(), [0, 3], features[0], padded=0.25):
        assert (mask[:, :, 2:] == 0.25).all() and (mask[:, :, :2] != 0.25).all()


@METHODS
def test_it_compiles_as_one_graph(parts):
    model, x = build(parts, out_type='featmap', **TOKENS), images()
    for dispatcher in token_dispatchers(model).values():
        dispatcher.set_rule(capacity=0.5)
    with torch.no_grad():
        compiled = torch.compile(model, backend='eager', fullgraph=True)(x)[-1]
    torch.testing.assert_close(compiled, run(model, x), rtol=0, atol=1e-5)
