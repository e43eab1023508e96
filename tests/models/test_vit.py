import pytest
import torch
import torch.nn as nn
from mmpretrain.models.backbones import VisionTransformer

from mmdyt.core.macs import count_macs
from mmdyt.core.observe import complete_model, dynamic_branches, record_dispatch
from mmdyt.core.tuning import count_parameters
from mmdyt.models import DyTVisionTransformer

TINY = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)


def make_pair(seed=0, dispatch='mlp', **vit):
    """A plain mmpretrain ViT with random weights everywhere, and a Dynamic Tuning one with the same."""
    arguments = dict(arch=TINY, img_size=32, patch_size=8) | vit
    torch.manual_seed(seed)
    plain = VisionTransformer(**arguments)
    plain.init_weights()
    dynamic = DyTVisionTransformer(dispatch=dispatch, **arguments)
    result = dynamic.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys and all('.dynamic.' in name for name in result.missing_keys)
    plain.eval()  # returns None in mmpretrain
    return plain, dynamic.eval()


def spread_masks(model, seed=0):
    """Give the dispatchers opinions and the adapters something to say."""
    generator = torch.Generator().manual_seed(seed)
    for branch in dynamic_branches(model).values():
        nn.init.normal_(branch.adapter.up.weight, std=0.5, generator=generator)
        nn.init.normal_(branch.dispatcher.gate.weight, generator=generator)


def set_all(model, active):
    for branch in dynamic_branches(model).values():
        nn.init.zeros_(branch.dispatcher.gate.weight)
        nn.init.constant_(branch.dispatcher.gate.bias, 1.0 if active else -1.0)


class TestParameters:
    def test_vit_b_gets_exactly_the_papers_new_parameters(self):
        with torch.device('meta'):
            plain = VisionTransformer('base')
            dynamic = DyTVisionTransformer(arch='base', adapter=dict(bottleneck=64))
        counts = count_parameters(dynamic)
        assert counts['adapter'] == 1_189_632  # arXiv 2403.11808: 1.19 M
        assert counts['dispatcher'] == 9_228
        assert counts['tuned'] == counts['adapter'] + counts['dispatcher']
        assert counts['frozen'] == sum(p.numel() for p in plain.parameters())
        new = set(dynamic.state_dict()) - set(plain.state_dict())
        assert set(plain.state_dict()) < set(dynamic.state_dict())
        assert len(new) == 12 * (6 + 1) and all('.dynamic.' in name for name in new)  # parameters, and the threshold

    @pytest.mark.parametrize('bottleneck', [1, 8])
    def test_counts_follow_the_formula_for_any_size(self, bottleneck):
        model = DyTVisionTransformer(arch=TINY, img_size=32, patch_size=8, adapter=dict(bottleneck=bottleneck))
        counts = count_parameters(model)
        assert counts['adapter'] == 3 * (2 * 32 * bottleneck + bottleneck + 32)
        assert counts['dispatcher'] == 3 * 33


class TestCompleteModel:
    @pytest.mark.parametrize(
        'vit',
        [
            dict(),
            dict(out_type='raw', out_indices=(0, 2)),
            dict(out_type='featmap', final_norm=False, out_indices=(0, 1, 2)),
            dict(out_type='avg_featmap'),
            dict(out_type='featmap', with_cls_token=False),
            dict(pre_norm=True),
            dict(layer_scale_init_value=0.1),
            dict(layer_cfgs=dict(ffn_type='swiglu_fused')),
        ],
        ids=str,
    )
    def test_with_fresh_adapters_it_is_the_plain_vit_bit_for_bit(self, vit):
        plain, dynamic = make_pair(**vit)
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad(), complete_model(dynamic):
            for got, expected in zip(dynamic(x), plain(x), strict=True):
                assert torch.equal(got, expected)

    @pytest.mark.parametrize('size', [(32, 32), (48, 32), (30, 45)])
    def test_any_input_size(self, size):
        plain, dynamic = make_pair(out_type='featmap', final_norm=False)
        x = torch.randn(1, 3, *size)
        with torch.no_grad(), complete_model(dynamic):
            assert torch.equal(dynamic(x)[0], plain(x)[0])

    def test_training_mode_equals_the_plain_vit_with_drop_path(self):
        plain, dynamic = make_pair(drop_path_rate=0.5)
        dynamic.requires_grad_(True)
        x = torch.randn(4, 3, 32, 32)
        for branch in dynamic_branches(dynamic).values():
            branch.adapter.dropout.p = 0.0  # it would draw random numbers too
        torch.manual_seed(3)
        plain.train()
        with torch.no_grad():  # with gradients a CPU runs other attention kernels: equal but for rounding
            expected = plain(x)[0]
        for gradients in (False, True):
            torch.manual_seed(3)
            with complete_model(dynamic), torch.set_grad_enabled(gradients):
                out = dynamic.train()(x)[0]
            assert torch.allclose(out, expected, rtol=0, atol=1e-5 if gradients else 0)


class TestInference:
    @pytest.mark.parametrize('batch', [1, 2, 5])
    @pytest.mark.parametrize('active', ['none', 'one', 'some', 'all'])
    @torch.no_grad()
    def test_packed_equals_masked(self, batch, active):
        _, model = make_pair(out_type='raw')
        spread_masks(model)
        x = torch.randn(batch, 3, 32, 32)
        if active in ('none', 'all'):
            set_all(model, active == 'all')
        if active == 'one':  # exactly one token of the batch is active in layer 1
            branch = model.layers[1].dynamic['mlp']
            with record_dispatch(model) as record:
                model(x)
            branch.dispatcher.gate.bias -= (
                record.dispatches['layers.1.dynamic.mlp'][0].logits.flatten().topk(2)[0].mean()
            )
        with record_dispatch(model) as record:
            packed = model(x)[0]
        for branch in dynamic_branches(model).values():
            branch.inference = 'masked'
        torch.testing.assert_close(packed, model(x)[0], rtol=0, atol=1e-6)
        rates = [dispatch.patch_mask.mean().item() for dispatch in record.flat()]
        if active == 'one':
            assert record.flat()[1].patch_mask.sum() == 1
        elif active == 'some':
            assert all(0 < rate < 1 for rate in rates)
        else:
            assert rates == [float(active == 'all')] * 3

    @torch.no_grad()
    def test_packed_equals_masked_without_a_cls_token(self):
        _, model = make_pair(out_type='raw', with_cls_token=False)
        spread_masks(model)
        x = torch.randn(2, 3, 32, 32)
        packed = model(x)[0]
        for branch in dynamic_branches(model).values():
            branch.inference = 'masked'
        torch.testing.assert_close(packed, model(x)[0], rtol=0, atol=1e-6)

    @torch.no_grad()
    def test_an_image_gives_the_same_output_alone_and_in_any_batch(self):
        _, model = make_pair(out_type='raw')
        spread_masks(model)
        x = torch.randn(5, 3, 32, 32)
        whole = model(x)[0]
        for i in range(5):
            torch.testing.assert_close(model(x[i : i + 1])[0][0], whole[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(model(x.flip(0))[0].flip(0), whole, rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_masks_lie_on_the_image_grid(self):
        """A token's mask follows its patch: dispatchers that look for brightness find the bright corner."""
        _, model = make_pair(out_type='raw')
        with record_dispatch(model) as record:
            model(torch.randn(1, 3, 32, 48))
        assert record.flat()[0].patch_mask.shape == (1, 4 * 6, 1)
        assert record.flat()[0].mask.shape == (1, 1 + 4 * 6, 1)

    @torch.no_grad()
    def test_bf16_autocast_runs_packed(self):
        _, model = make_pair()
        spread_masks(model)
        x = torch.randn(2, 3, 32, 32)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            low = model(x)[0]
        assert torch.isfinite(low).all()

    def test_saliency_through_eval_works(self):
        _, model = make_pair()
        spread_masks(model)
        x = torch.randn(2, 3, 32, 32, requires_grad=True)
        model(x)[0].pow(3).sum().backward()  # the plain sum of what a norm returns is constant
        assert x.grad.abs().sum() > 1


class TestTraining:
    def test_gradients_reach_dispatcher_and_adapter_and_no_frozen_value_moves(self):
        _, model = make_pair(out_type='raw')  # the CLS token alone does not read the last layer's patches
        spread_masks(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        model.train()(torch.randn(4, 3, 32, 32))[0].square().sum().backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            new = '.dynamic.' in name
            assert parameter.requires_grad == new
            assert torch.equal(parameter, before[name]) == (not new), name

    def test_init_cfg_on_linear_leaves_the_new_parts_alone(self):
        init = dict(type='Constant', layer='Linear', val=7.0)
        model = DyTVisionTransformer(arch=TINY, img_size=32, patch_size=8, init_cfg=init)
        model.init_weights()
        assert (model.layers[0].attn.qkv.weight == 7).all()  # the trap is set
        for branch in dynamic_branches(model).values():
            assert branch.adapter.up.weight.eq(0).all() and branch.adapter.up.bias.eq(0).all()
            assert branch.dispatcher.gate.weight.std() < 0.1

    @pytest.mark.parametrize('more', [[], [dict(type='mmdyt.SSF', official=True)]])
    def test_pretrained_parts_survive_init_weights(self, tmp_path, more):
        arguments = dict(arch=TINY, img_size=32, patch_size=8, parts=more)
        source = DyTVisionTransformer(**arguments)
        spread_masks(source)
        torch.save(source.state_dict(), tmp_path / 'tuned.pth')
        init = dict(type='Pretrained', checkpoint=str(tmp_path / 'tuned.pth'))
        model = DyTVisionTransformer(**arguments, init_cfg=init)
        model.init_weights()
        for name, tensor in source.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name

    def test_train_returns_self(self):
        _, model = make_pair()
        assert model.train() is model and model.training
        assert model.eval() is model and not model.training


class TestCost:
    @pytest.mark.parametrize('size', [(32, 32), (30, 45)])
    @torch.no_grad()
    def test_closed_form_equals_an_operator_counter_at_real_masks(self, size, monkeypatch):
        def plain_attention(query, key, value, dropout_p=0.0):
            return (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1) @ value

        _, model = make_pair(out_type='raw')
        spread_masks(model)
        x = torch.randn(1, 3, *size)
        with record_dispatch(model) as record:
            fused = count_macs(lambda: model(x))
        active = [dispatch.mask.sum().item() for dispatch in record.flat()]
        assert len(set(active)) > 1
        for layer in model.layers:
            monkeypatch.setattr(layer.attn, 'scaled_dot_product_attention', plain_attention)
        counted = count_macs(lambda: model(x))
        patches = model.num_patches(*size)
        assert patches == record.flat()[0].patch_mask.shape[1]
        assert counted == fused == model.macs(*size, dict(zip(record.names, active, strict=True)))

    @pytest.mark.parametrize('vit', [dict(pre_norm=True, final_norm=False), dict(out_type='avg_featmap')], ids=str)
    @torch.no_grad()
    def test_dense_equals_an_operator_counter_on_the_plain_vit(self, vit):
        plain, model = make_pair(**vit)
        assert count_macs(lambda: plain(torch.randn(1, 3, 32, 32))) == model.dense_macs(32, 32)


class TestMistakes:
    @pytest.mark.parametrize(
        ('arguments', 'message'),
        [
            (dict(dispatch='mpl'), r"dispatch must be one of \['mlp', 'attn', 'attn_mlp', 'layer'\], got 'mpl'"),
            (dict(frozen_stages=3), 'frozen_stages must not be set, got 3'),
            (dict(out_indices=(1, 3)), r'out_indices must lie below the depth 3, got \[1, 3\]'),
            (dict(tuned=('adaptor',)), "tuned must hold patterns that match parameter names, got 'adaptor'"),
            (
                dict(inference='sparse'),
                r"inference must be one of \['auto', 'packed', 'fixed', 'masked'\], got 'sparse'",
            ),
            (dict(adapter=dict(bottleneck=0)), 'bottleneck must be a positive integer, got 0'),
        ],
    )
    def test_are_refused_in_the_constructor(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            DyTVisionTransformer(arch=TINY, img_size=32, patch_size=8, **arguments)

    @pytest.mark.parametrize('name', ['img_size', 'patch_size'])
    @pytest.mark.parametrize(
        ('value', 'passes'),
        [(16, True), ((16, 16), True), ([16, 16], True), ([16], False), ((16,), False), ([], False),
         ([16, 16, 16], False), (0, False), ((16, 0), False), (16.0, False), ('16', False)],
    )  # fmt: skip
    def test_sides_are_those_that_mmpretrain_takes(self, name, value, passes):
        sizes = dict(img_size=32, patch_size=8) | {name: value}
        if passes:
            assert VisionTransformer(arch=TINY, **sizes).patch_resolution == (
                DyTVisionTransformer(arch=TINY, **sizes).patch_resolution
            )
            return
        with pytest.raises(ValueError, match=f'{name} must be a positive integer, or a list of two, .* got '):
            DyTVisionTransformer(arch=TINY, **sizes)

    def test_unread_layers_are_warned_of(self):
        with pytest.warns(UserWarning, match=r'out_indices \[0, 1\] leave the layers after 1 unread'):
            DyTVisionTransformer(arch=TINY, img_size=32, patch_size=8, out_indices=(0, 1))

    def test_negative_out_indices_work_in_a_tuple(self):
        model = DyTVisionTransformer(arch=TINY, img_size=32, patch_size=8, out_indices=(-2, -1))
        assert model.out_indices == [1, 2]


def test_active_only_is_refused_for_gates_that_are_trained():
    with pytest.raises(ValueError, match="^training must not be 'active_only' with dispatchers that are trained"):
        DyTVisionTransformer(TINY, img_size=32, patch_size=8, training='active_only')
    fitted = dict(noise=False, fitted=True)
    DyTVisionTransformer(TINY, img_size=32, patch_size=8, training='active_only', dispatcher=fitted)
