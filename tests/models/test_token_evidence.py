"""Which tokens to keep: evidence against differences of the loss, and what a fit makes of it."""

import pytest
import torch
from test_fewer_tokens import SPARSE, build, images, run

from mmdyt.core.context import RULES, ask
from mmdyt.core.fit.ridge import Moments
from mmdyt.core.fit.token_evidence import fit_token_gates, gated, log_evidence
from mmdyt.core.grid import View
from mmdyt.core.macs import count_macs
from mmdyt.core.observe import record_dispatch, unreduced
from mmdyt.core.padding import showing
from mmdyt.core.teacher import FeatureTeacher
from mmdyt.core.tokens import TokenState
from mmdyt.parts.evidence_tokens import EvidenceTokens

GATED = [dict(type='mmdyt.EvidenceTokens', keep_rate=0.5, at=[1, 2]), dict(type='mmdyt.DenseAdapter', bottleneck=4)]
NAMES = [f'layers.{i}.dynamic.mid.evidence_tokens' for i in (1, 2)]
READ = torch.randn(32, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def loss_of(out):
    """Of all cells of a map, or of class tokens."""
    return (out.flatten(2).transpose(1, 2) if out.dim() == 4 else out).matmul(READ.to(out.dtype)).square().mean()


def losing(model, x, name, image, token, amount):
    """The loss where a token counts ``1 - amount`` as a key from a step on, and is that much nearer to what it was."""
    left = []

    def lose(operation, tokens, state):
        if operation is gated(model)[name]:
            state.sizes = torch.ones_like(state.count_sizes(tokens), dtype=tokens.dtype)
            state.sizes[image, token] -= amount
            left.append(tokens[image, 1 + token].clone())
        return tokens

    with torch.no_grad(), ask(RULES, dict.fromkeys(gated(model).values(), lose)):
        out = model(x)[-1]
    if out.dim() == 4:
        cell = out[image, :, token // 6, token % 6]
        cell += amount * (left[0] - cell)
    return loss_of(out).item()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('out_type', ['cls_token', 'featmap'])
def test_evidence_is_the_slope_of_the_loss_along_losing_a_token(out_type, name):
    model, x = build(GATED, out_type=out_type, final_norm=False).double(), images(2).double()
    found = {name: logs.view(2, 24) for name, _, logs in log_evidence(model, lambda: loss_of(model(x)[-1]))}
    assert list(found) == NAMES
    step = 1e-3
    for image, (one, other) in enumerate([(5, 17), (0, 23)]):
        slopes = [
            losing(model, x, name, image, t, step) - losing(model, x, name, image, t, -step) for t in (one, other)
        ]
        expected = torch.tensor(slopes).abs().log()
        assert (found[name][image, one] - found[name][image, other]).item() == pytest.approx(
            (expected[0] - expected[1]).item(), abs=2e-3
        )


@pytest.mark.parametrize('attention', [False, True])
def test_a_fit_is_the_ridge_regression_of_its_log_evidence(attention):
    model, x = build([dict(GATED[0], attention=attention), GATED[1]], out_type='featmap'), images(8)

    def loss():
        return loss_of(model(x)[-1])

    rows = {name: (inputs, logs) for name, inputs, logs in log_evidence(model, loss)}
    explained = fit_token_gates(model, [loss], ridge=1e-6)
    assert list(explained) == NAMES and all(0.1 < share <= 1 for share in explained.values())
    for name, operation in gated(model).items():
        inputs, logs = rows[name]
        moments = Moments(inputs.shape[1], inputs.device)
        moments.add(inputs, logs)
        weight, bias, _ = moments.solve(1e-6)
        torch.testing.assert_close(operation.gate.weight[0].double(), weight, rtol=1e-4, atol=1e-5)
        predicted = operation.gate(inputs).squeeze(1)
        assert torch.corrcoef(torch.stack([predicted.detach(), logs]))[0, 1] > 0.3
        assert inputs.shape[1] == 32 + attention and bias.isfinite()


def test_every_pass_of_a_loss_counts():
    model, x = build(GATED, out_type='featmap'), images(2)
    found = log_evidence(model, lambda: sum(loss_of(model(x)[-1]) for _ in range(2)))
    assert [(name, tuple(inputs.shape)) for name, inputs, _ in found] == 2 * [(name, (48, 32)) for name in NAMES]


def test_padding_is_not_fitted_to():
    model, x = build(GATED, out_type='featmap'), images(2)
    views = [View((32, 48), (8, 8)), View((16, 48), (8, 8))]
    with showing(lambda rows: views):
        found = log_evidence(model, lambda: loss_of(model(x)[-1]))
    assert [len(inputs) for _, inputs, _ in found] == [36, 36]


@pytest.mark.parametrize(
    ('parts', 'losses', 'options', 'message'),
    [
        (SPARSE, [lambda: None], {}, 'parts that keep tokens by a gate, EvidenceTokens, got none'),
        (GATED, [], {}, 'losses must hold at least one loss'),
        (GATED, [lambda: torch.zeros((), requires_grad=True)], {}, 'losses must depend on the tokens'),
        (GATED, [lambda: None], dict(ridge=0), 'ridge must be a positive number, got 0'),
    ],
    ids=['no gate', 'no loss', 'another loss', 'ridge'],
)
def test_what_cannot_be_fitted_is_refused_and_nothing_changed(parts, losses, options, message):
    model = build(parts)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit_token_gates(model, losses, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_gate_behind_which_nothing_is_read_stays_as_it_was():
    model = build([dict(GATED[0], at=[1, 3]), GATED[1]], out_type='cls_token')
    first, last = gated(model).values()
    before = last.gate.weight.clone()
    explained = fit_token_gates(model, [lambda: loss_of(model(images())[-1])])
    assert list(explained) == [NAMES[0]] and torch.equal(last.gate.weight, before)


def test_a_diverged_model_is_not_fitted():
    model = build(GATED, out_type='featmap')
    with pytest.raises(ValueError, match='losses must give finite evidence for some image, got none'):
        fit_token_gates(model, [lambda: loss_of(model(images())[-1]) * torch.nan])


@pytest.mark.parametrize('attention', [False, True])
@pytest.mark.parametrize('fuse', ['sum', 'mean', 'none'])
@pytest.mark.parametrize('cls', [True, False])
def test_the_cost_of_a_gate_is_counted(fuse, attention, cls):
    part = dict(GATED[0], fuse=fuse, attention=attention)
    model, x = build([part, GATED[1]], out_type='featmap', with_cls_token=cls), images(1)
    with record_dispatch(model) as record:
        counted = count_macs(lambda: model(x))
    assert float(model.macs_of(24, {name: runs[0] for name, runs in record.runs.items()})) == pytest.approx(counted)
    assert float(model.macs(32, 48, {})) == pytest.approx(counted)


@pytest.mark.parametrize('fuse', ['sum', 'mean'])
def test_the_best_tokens_of_the_gate_stay_and_padding_goes_first(fuse):
    torch.manual_seed(0)
    part, x = EvidenceTokens(8, keep_rate=0.5, fuse=fuse), torch.randn(2, 7, 8)
    padding = torch.tensor([6 * [False], [True, True, *4 * [False]]])
    state = TokenState(1, padding=padding)
    part.gate.weight.data.normal_()
    after = part(x, state)
    for image in range(2):
        logits = part.gate(x[image, 1:]).squeeze(1).masked_fill(padding[image], -torch.inf)
        best = logits.argsort(descending=True)[:3].sort().values
        rest = torch.tensor([i for i in range(6) if i not in best])
        weights = logits.softmax(0)[rest]
        weights = weights / weights.sum() if fuse == 'mean' else weights
        expected = torch.cat([x[image, :1], x[image, 1 + best], (weights @ x[image, 1 + rest])[None]])
        torch.testing.assert_close(after[image], expected, rtol=0, atol=1e-6)
        assert state.owner[image, best].tolist() == [0, 1, 2]


@pytest.mark.parametrize('dispatch', ['attn', 'attn_mlp', 'layer'])
def test_dispatched_attention_is_refused(dispatch):
    with pytest.raises(ValueError, match="dispatch must (be 'mlp'|not be 'layer') with a?.*EvidenceTokens"):
        build(GATED, dispatch=dispatch, dispatcher=dict(type='mmdyt.TokenDispatcher'))


def test_a_teacher_sees_all_tokens():
    model, x = build(GATED, out_type='featmap'), images()
    teacher = FeatureTeacher(model, 1.0)
    with unreduced(model):
        expected = run(model, x)
    assert torch.equal(teacher.features(model, x)[-1], expected)
    assert not torch.allclose(run(model, x), expected, atol=1e-3)
