import pytest
import torch
import torch.nn as nn

from mmdyt.core import kernels
from mmdyt.core.dispatch import gumbel_sigmoid, hard_mask, straight_through
from mmdyt.core.tokens import TokenState
from mmdyt.parts.dispatcher import RandomDispatcher, SampleDispatcher, TokenDispatcher


def dispatcher_with(weight: torch.Tensor, bias: float = 0.0, **arguments) -> TokenDispatcher:
    dispatcher = TokenDispatcher(len(weight), **arguments)
    with torch.no_grad():
        dispatcher.gate.weight.copy_(weight[None])
        dispatcher.gate.bias.fill_(bias)
    return dispatcher


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_mask_is_exactly_zero_or_one(training, dtype):
    dispatcher = TokenDispatcher(8).train(training)
    dispatch = dispatcher(torch.randn(4, 50, 8).to(dtype))
    mask, logits = dispatch.mask, dispatch.logits
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert logits.dtype in (torch.float32, torch.float64)


@pytest.mark.parametrize(
    ('tokens', 'dtype', 'gate', 'kernels_run'),
    [
        ('dense', torch.float32, torch.float32, ['gate', 'order']),
        ('dense', torch.bfloat16, torch.float32, ['gate', 'order']),
        ('transposed', torch.float32, torch.float32, ['order']),
        ('dense', torch.bfloat16, torch.bfloat16, ['order']),
        ('dense', torch.float64, torch.float64, []),
    ],
)
def test_the_kernels_decide_what_the_plain_path_decides(monkeypatch, tokens, dtype, gate, kernels_run):
    torch.manual_seed(0)
    dispatcher = dispatcher_with(torch.randn(8)).to(gate).eval()
    dispatcher.set_rule(capacity=0.4)
    x = torch.randn(3, 11, 8, dtype=dtype)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if tokens == 'transposed' else x
    with torch.no_grad():
        expected, calls = dispatcher(x), []

        def gate_logits(x, weight, bias):
            assert weight.shape == (1, 8) and bias.shape == (1,) and weight.dtype == bias.dtype == torch.float32
            calls.append('gate')
            return nn.functional.linear(x.float(), weight, bias)

        def order_tokens(logits, active, prefix):
            assert logits.shape == (3, 10, 1) and (active, prefix) == (expected.active, 1)
            calls.append('order')
            return expected.order, expected.rows()

        monkeypatch.setattr(kernels, 'usable', lambda x: True)
        monkeypatch.setattr(kernels, 'gate_logits', gate_logits)
        monkeypatch.setattr(kernels, 'order_tokens', order_tokens)
        found = dispatcher(x)
    assert calls == kernels_run
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.order, expected.order)
    assert torch.equal(found.mask, expected.mask) and torch.equal(found.rows(), expected.rows())


@pytest.mark.parametrize('mode', [True, False])
def test_sample_dispatcher_decides_once_per_image(mode):
    torch.manual_seed(0)
    dispatcher = SampleDispatcher(8).train(mode)
    nn.init.normal_(dispatcher.gate.weight, std=3)
    dispatch = dispatcher(torch.randn(64, 10, 8, requires_grad=True))
    mask, logits = dispatch.mask, dispatch.logits
    patches = mask[:, 1:, 0]
    assert mask.shape == (64, 10, 1) and logits.shape == (64, 9, 1) and torch.all(mask[:, 0] == 1)
    assert torch.equal(patches, patches[:, :1].expand_as(patches)) and 0 < patches[:, 0].mean() < 1
    if mode:
        patches.sum().backward()
        assert dispatcher.gate.weight.grad.abs().sum() > 0


def test_sample_dispatcher_reads_the_mean_of_the_patch_tokens():
    dispatcher, x = SampleDispatcher(8).eval(), torch.randn(3, 10, 8)
    expected = dispatcher.gate(x[:, 1:].mean(dim=1))
    torch.testing.assert_close(dispatcher(x).logits[:, 4], expected)


@pytest.mark.parametrize('mode', [True, False])
def test_random_dispatcher_meets_its_rate_and_has_nothing_to_learn(mode):
    dispatcher = RandomDispatcher(8, num_prefix_tokens=2, rate=0.3).train(mode)
    torch.manual_seed(0)
    dispatch = dispatcher(torch.randn(200, 102, 8))
    assert torch.all(dispatch.mask[:, :2] == 1) and dispatch.logits is None
    assert dispatch.patch_mask.mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 20000) ** 0.5)  # 4 sigma
    assert not list(dispatcher.parameters())


@pytest.mark.parametrize('rate', [0, 50, -0.1])
def test_random_dispatcher_refuses_a_rate_that_is_no_fraction(rate):
    with pytest.raises(ValueError, match=rf'rate must lie in \(0, 1\], got {rate}'):
        RandomDispatcher(8, rate=rate)


def test_straight_through_is_exactly_hard_with_the_gradient_of_the_score():
    score = torch.rand(100_000, requires_grad=True)
    hard = straight_through(score)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard.detach().bool(), score > 0.5)
    hard.sum().backward()
    assert torch.equal(score.grad, torch.ones_like(score))


@pytest.mark.parametrize('prefix', [0, 1, 5])
@pytest.mark.parametrize('training', [True, False])
def test_prefix_tokens_are_always_active(prefix, training):
    never = dispatcher_with(torch.zeros(4), bias=-1e4, num_prefix_tokens=prefix).train(training)
    dispatch = never(torch.randn(3, 9, 4))
    assert dispatch.mask.shape == (3, 9, 1)
    assert dispatch.mask[:, :prefix].eq(1).all()
    assert dispatch.mask[:, prefix:].eq(0).all()
    assert dispatch.patch_mask.shape == (3, 9 - prefix, 1)


@pytest.mark.parametrize('tau', [0.5, 1.0, 5.0])
def test_mean_training_mask_is_mean_sigmoid_of_logit_for_any_tau(tau):
    torch.manual_seed(0)
    logits = torch.randn(64) * 2
    draws = 20_000
    mask = straight_through(gumbel_sigmoid(logits.expand(draws, -1), tau))
    p = logits.sigmoid()
    standard_error = (p * (1 - p) / draws).sqrt()
    assert ((mask.mean(0) - p).abs() < 5 * standard_error).all()
    assert abs(mask.mean() - p.mean()) < 5 * (standard_error.square().sum().sqrt() / 64)


def test_noise_is_drawn_per_token_and_image():
    dispatcher = dispatcher_with(torch.zeros(4))
    mask = dispatcher(torch.zeros(2, 101, 4)).patch_mask
    assert 0.3 < mask.mean() < 0.7
    assert not torch.equal(mask[0], mask[1])


def test_inference_has_no_noise_and_ties_are_inactive():
    dispatcher = dispatcher_with(torch.tensor([1.0, 0.0]), num_prefix_tokens=0, tau=0.1).eval()
    x = torch.tensor([[[1e-30, 0.0], [0.0, 0.0], [-1e-30, 0.0], [3.0, 0.0]]])
    assert dispatcher(x).mask.flatten().tolist() == [1, 0, 0, 1]


def test_small_positive_logits_survive_half_precision():
    weight = torch.full((4,), 2.0**-13)
    dispatcher = dispatcher_with(weight, num_prefix_tokens=0).half().eval()
    x = torch.full((1, 1, 4), 2.0**-3, dtype=torch.float16)
    logit = (x.float() @ weight[:, None]).item()
    assert torch.tensor(logit, dtype=torch.float16).sigmoid() == 0.5  # the trap: sigmoid > 0.5 is false in half
    assert dispatcher(x).mask.item() == 1
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert dispatcher.float()(x.float()).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(dim=8, tau=0), 'tau must be a positive number, got 0'),
        (dict(dim=8, tau=float('inf')), 'tau must be a positive number, got inf'),
        (dict(dim=8, num_prefix_tokens=-1), 'num_prefix_tokens must be at least 0, got -1'),
        (dict(dim=0), 'dim must be at least 1, got 0'),
    ],
)
def test_dispatcher_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenDispatcher(**arguments)


def test_rules_and_temperatures_out_of_range_are_refused_and_change_nothing():
    dispatcher = TokenDispatcher(8)
    dispatcher.set_rule(1.0, 0.5)
    for capacity in (50, -0.1, float('nan')):
        with pytest.raises(ValueError, match=rf'capacity must lie in \[0, 1\], got {capacity}\. It is a fraction'):
            dispatcher.set_rule(2.0, capacity)
    with pytest.raises(ValueError, match='threshold must be a number or infinite, got nan'):
        dispatcher.set_rule(float('nan'), 0.2)
    with pytest.raises(ValueError, match='tau must be a positive number, got 0'):
        dispatcher.set_tau(0)
    assert (dispatcher.threshold.item(), dispatcher.capacity, dispatcher.tau) == (1.0, 0.5, 5.0)


def test_a_rule_without_a_threshold_keeps_it_and_one_without_a_capacity_drops_it():
    dispatcher = TokenDispatcher(8)
    dispatcher.set_rule(1.0, 0.5)
    dispatcher.set_rule(capacity=0.25)
    assert (dispatcher.threshold.item(), dispatcher.capacity) == (1.0, 0.25)
    dispatcher.set_rule()
    assert (dispatcher.threshold.item(), dispatcher.capacity) == (1.0, None)


def test_a_set_gate_scores_patch_tokens():
    dispatcher, x = TokenDispatcher(8), torch.randn(2, 5, 8)
    weight = torch.randn(8)
    dispatcher.set_gate(weight, torch.tensor(0.5))
    torch.testing.assert_close(dispatcher.score(x)[..., 0], x @ weight + 0.5)


@pytest.mark.parametrize('kind', [TokenDispatcher, SampleDispatcher, RandomDispatcher])
@pytest.mark.parametrize('mode', [True, False])
def test_prompts_are_always_active_and_not_read(kind, mode):
    dispatcher, x, state = kind(8).train(mode), torch.randn(3, 20, 8), TokenState(prefix=1, prompts=4)
    torch.manual_seed(0)
    dispatch = dispatcher(x, state)
    torch.manual_seed(0)
    without = dispatcher(torch.cat([x[:, :1], x[:, 5:]], dim=1))
    assert dispatch.num_prefix_tokens == 5 and dispatch.mask[:, :5].eq(1).all()
    if kind is not RandomDispatcher:  # draws for prompts too
        assert torch.equal(dispatch.patch_mask, without.patch_mask) and torch.equal(dispatch.logits, without.logits)


def test_a_fitted_gate_is_not_trained():
    assert len(list(TokenDispatcher(8).tuned_parameters())) == 2
    assert not list(TokenDispatcher(8, fitted=True).tuned_parameters())


@pytest.mark.parametrize('rate', [0.5, 0.95])
def test_initial_rate_is_the_chance_to_be_active_at_the_start(rate):
    torch.manual_seed(0)
    dispatcher = TokenDispatcher(8, initial_rate=rate)
    mask = dispatcher(0.01 * torch.randn(50, 401, 8)).patch_mask  # scores near 0
    assert mask.mean().item() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 20000) ** 0.5)  # 4 sigma
    assert dispatcher.gate.bias.item() == pytest.approx(torch.tensor(rate).logit().item())


@pytest.mark.parametrize('rate', [0, 1, 95])
def test_initial_rate_must_leave_a_choice(rate):
    with pytest.raises(ValueError, match=rf'initial_rate must lie in \(0, 1\), got {rate}'):
        TokenDispatcher(8, initial_rate=rate)


@pytest.mark.parametrize('kind', [TokenDispatcher, SampleDispatcher])
def test_inference_compares_with_the_threshold_and_training_does_not(kind):
    torch.manual_seed(0)
    dispatcher, x = kind(8).eval(), torch.randn(64, 20, 8)
    assert torch.equal(dispatcher(x).patch_mask, (dispatcher(x).logits > 0).float())  # eq. (3)
    middle = dispatcher(x).logits.median().item()
    dispatcher.set_rule(middle)
    logits = dispatcher(x).logits
    assert torch.equal(dispatcher(x).patch_mask, (logits > middle).float()) and middle != 0
    dispatcher.train()
    torch.manual_seed(1)
    mask = dispatcher(x).mask
    dispatcher.set_rule(100.0)
    torch.manual_seed(1)
    assert torch.equal(dispatcher(x).mask, mask)


@pytest.mark.parametrize('kind', [TokenDispatcher, SampleDispatcher])
@pytest.mark.parametrize('noise', [True, False])
def test_a_pass_in_training_mode_erases_no_calibration(kind, noise):
    """Saliency maps, a fit or a look at the losses would else throw it away."""
    dispatcher, x = kind(8, noise=noise).train(), torch.randn(4, 20, 8)
    dispatcher.set_rule(1.0, 0.25)
    dispatcher(x).mask.sum().backward()
    with torch.no_grad():
        dispatcher(x)
    assert dispatcher.threshold.item() == 1 and dispatcher.capacity == 0.25


def test_thresholds_are_stored_and_not_learnt():
    dispatcher = TokenDispatcher(8)
    assert set(dispatcher.state_dict()) == {'gate.weight', 'gate.bias', 'threshold'}
    assert {name for name, _ in dispatcher.named_parameters()} == {'gate.weight', 'gate.bias'}
    assert dispatcher.threshold.shape == () and dispatcher.threshold.dtype == torch.float32
    assert not list(RandomDispatcher(8).buffers())


def test_reset_parameters_resets_the_threshold():
    dispatcher = TokenDispatcher(8)
    dispatcher.set_rule(1.0)
    dispatcher.reset_parameters()
    assert dispatcher.threshold.item() == 0


def load(module: nn.Module, tensors: dict) -> list[str]:
    """Names of what is missing."""
    return module.load_state_dict(tensors, strict=False).missing_keys


@pytest.mark.parametrize('prefix', ['', '0.'])
def test_a_gate_from_before_thresholds_loads_with_0_and_nothing_missing(prefix):
    old = {f'{prefix}{name}': tensor for name, tensor in TokenDispatcher(8).state_dict().items() if name != 'threshold'}
    names = list(old)
    dispatcher = TokenDispatcher(8)
    dispatcher.set_rule(1.0)
    assert not load(nn.Sequential(dispatcher) if prefix else dispatcher, old)
    assert dispatcher.threshold.item() == 0
    assert torch.equal(dispatcher.gate.weight, old[f'{prefix}gate.weight'])
    assert list(old) == names


def test_a_checkpoint_without_the_gate_leaves_the_threshold_alone():
    dispatcher = TokenDispatcher(8)
    dispatcher.set_rule(1.0)
    assert set(load(dispatcher, {})) == {'gate.weight', 'gate.bias', 'threshold'}
    assert dispatcher.threshold.item() == 1


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_thresholds_of_half_models_are_compared_in_fp32(dtype):
    """In half precision these logits and the threshold are the same number."""
    dispatcher = TokenDispatcher(8).to(dtype)
    assert dispatcher.threshold.dtype == dtype
    dispatcher.set_rule(1.0)
    logits = torch.tensor([1 - 2.0**-20, 1.0, 1 + 2.0**-20])
    assert logits.to(dtype).unique().tolist() == [1.0]
    assert hard_mask(logits, dispatcher.threshold).tolist() == [0, 0, 1]


def test_thresholds_need_no_memory_on_the_meta_device():
    with torch.device('meta'):
        dispatcher = TokenDispatcher(8).eval()
    assert dispatcher.threshold.is_meta
    assert hard_mask(torch.empty(2, 5, 1, device='meta'), dispatcher.threshold).shape == (2, 5, 1)


@pytest.mark.parametrize('kind', [TokenDispatcher, SampleDispatcher])
def test_without_noise_training_decides_as_inference_does(kind):
    torch.manual_seed(0)
    dispatcher, x = kind(8, noise=False, tau=2.0), torch.randn(64, 20, 8)
    dispatcher.set_rule(0.01)
    trained = dispatcher(x)
    assert torch.equal(trained.mask, dispatcher.eval()(x).mask)
    assert 0 < trained.patch_mask.mean() < 1
    (slope,) = torch.autograd.grad(trained.patch_mask.sum(), dispatcher.gate.bias)
    score = torch.sigmoid((trained.logits - 0.01) / 2.0)
    torch.testing.assert_close(slope, (score * (1 - score) / 2.0).sum()[None])


def test_an_open_dispatcher_without_noise_trains_with_all_tokens():
    dispatcher, x = TokenDispatcher(8, noise=False), torch.randn(4, 20, 8)
    dispatcher.set_rule(-torch.inf)
    dispatch = dispatcher(x)
    assert dispatch.mask.min() == 1
    (slope,) = torch.autograd.grad(dispatch.mask.sum(), dispatch.logits)
    assert not slope.any()
