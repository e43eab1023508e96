"""What is exported, and how it is compared."""

import pytest
import torch
from torch import nn

from mmdyt.core.dispatch import best_tokens
from mmdyt.engine.export import task_of
from mmdyt.engine.export_check import Comparison, median_times, predictions, ties

NO = torch.tensor([False, False])


def test_equal_scores_are_equal_and_others_are_named():
    scores = torch.randn(2, 5)
    comparison = Comparison()
    comparison.add(scores, scores * (1 + 1e-6), NO)
    comparison.add(scores, scores + torch.tensor([[0.0], [1e-2]]) * scores.abs().amax(), NO)
    assert comparison.unequal() == [3] and comparison.total == 4


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_no_number_is_not_equal(value):
    comparison = Comparison()
    comparison.add(torch.ones(2, 3), torch.tensor([[1.0, 1, 1], [1, value, 1]]), NO)
    assert comparison.unequal() == [1]


def test_an_image_whose_masks_hang_on_a_tie_is_told_apart():
    comparison = Comparison()
    comparison.add(torch.ones(2, 3), 2 * torch.ones(2, 3), torch.tensor([True, False]))
    assert comparison.flipped() == [0] and comparison.unequal() == [1]
    comparison = Comparison()
    comparison.add(torch.ones(2, 3), torch.tensor([[2.0, 1, 1], [1.25, 1, 1]]), torch.tensor([True, False]))
    assert comparison.largest() == 0.25


def test_scores_that_are_no_numbers_are_never_excused_by_a_tie():
    comparison = Comparison()
    comparison.add(torch.ones(2, 3), torch.full((2, 3), torch.nan), torch.tensor([True, True]))
    assert comparison.unequal() == [0, 1] and comparison.flipped() == []


def test_ties_are_those_at_the_border_between_active_and_inactive_tokens():
    logits = torch.tensor([[4.0, 3, 3, 1], [4, 4, 3, 1], [4, 3, 2, 1], [4, 3, 3 - 1e-7, 1]])[..., None]
    assert ties([best_tokens(logits, 0.5, 1)]).tolist() == [True, False, False, True]
    assert ties([best_tokens(logits, 0.0, 1), best_tokens(logits, 1.0, 1)]).tolist() == [False]
    assert ties([best_tokens(logits, 0.25, 1), best_tokens(logits, 0.5, 1)]).tolist() == [True, True, False, True]


def test_one_class_is_predicted_by_its_sign():
    assert predictions(torch.tensor([[[[-1.0, 2.0]]]])).tolist() == [[[False, True]]]
    assert predictions(torch.tensor([[1.0, 2.0]])).tolist() == [1]


def test_all_are_timed_equally_often():
    calls = dict(a=0, b=0)

    def count(name):
        def run(images):
            calls[name] += 1

        return run

    found = median_times({name: count(name) for name in calls}, torch.zeros(1), 3)
    assert calls == dict(a=4, b=4) and found.keys() == calls.keys()


def test_what_has_no_head_is_refused():
    with pytest.raises(ValueError, match='^model must be a classifier or a segmentor'):
        task_of(nn.Linear(1, 1))


class Sorts(nn.Module):
    """The order of tokens, as a dispatcher finds it."""

    def forward(self, image):
        return image.flatten(1).argsort(dim=1, descending=True, stable=True).to(image.dtype)


def test_equal_scores_keep_their_order_in_onnx(tmp_path):
    onnx_files = pytest.importorskip('mmdyt.engine.onnx_files')
    pytest.importorskip('onnxruntime', reason='the extra export is not installed')
    pytest.importorskip('onnxscript', reason='the extra export is not installed')
    from mmdyt.engine.export import Facts, to_program

    facts = Facts('classification', (4, 5), [0.0], [1.0], 'RGB', None, '', {}, [], '', '')
    onnx_files.write_onnx(to_program(Sorts(), (4, 5)), facts, tmp_path / 'sort.onnx', 20)
    run = onnx_files.open_onnx(tmp_path / 'sort.onnx')
    for images in (torch.randint(0, 3, (7, 3, 4, 5)).float(), torch.zeros(1, 3, 4, 5)):
        assert torch.equal(run(images), Sorts()(images))
