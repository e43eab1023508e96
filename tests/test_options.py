"""Options of the wrong kind are refused by name in the constructor, whatever the class."""

import inspect
import math
from types import UnionType
from typing import get_args

import pytest

import mmdyt.models.recognizer
import mmdyt.models.segmentor
from mmdyt.core.aggregator import CrossAttentionAggregator
from mmdyt.core.fit.request import CalibrationRequest
from mmdyt.core.options import is_integer, is_number
from mmdyt.datasets.clip_augment import ClipRandAugment
from mmdyt.datasets.clips import DecodeClip, OpenClip
from mmdyt.engine import CalibrationHook, EvidenceHook, TauScheduleHook
from mmdyt.models import DyTVisionTransformer
from mmdyt.models.classifier import DyTImageClassifier
from mmdyt.models.clip_neck import ClipNeck
from mmdyt.models.dynamic_model import DynamicModel
from mmdyt.models.necks import MoEAdapterNeck
from mmdyt.parts import (
    adapter,
    adapter_plus,
    dispatcher,
    ether,
    ether_plus,
    halting,
    lora,
    mean_update,
    moe_adapter,
    prompts,
    ssf,
)

# what else the constructor wants; widths that the network gives are not a user's
CLASSES = {
    adapter.Adapter: dict(dim=8),
    adapter_plus.AdapterPlus: dict(dim=8),
    dispatcher.TokenDispatcher: dict(dim=8),
    dispatcher.SampleDispatcher: dict(dim=8),
    dispatcher.RandomDispatcher: dict(dim=8),
    halting.HaltingDispatcher: dict(dim=8),
    ether.ETHER: dict(out_features=8, in_features=8),
    ether_plus.ETHERPlus: dict(out_features=8, in_features=8),
    lora.LoRA: dict(out_features=8, in_features=8),
    mean_update.MeanUpdate: dict(dim=8),
    moe_adapter.MoEAdapter: dict(dim=8),
    prompts.Prompts: dict(dim=8, patch_values=48),
    ssf.SSF: dict(out_features=8, in_features=8),
    CrossAttentionAggregator: dict(dim=8, num_heads=2),
    CalibrationRequest: {},
    CalibrationHook: {},
    EvidenceHook: dict(feature_weight=1.0),
    TauScheduleHook: {},
    ClipRandAugment: {},
    OpenClip: {},
    DecodeClip: {},
    ClipNeck: dict(in_channels=8, adapter=dict(type='mmdyt.MoEAdapter')),
    MoEAdapterNeck: dict(in_channels=8, adapter=dict(type='mmdyt.MoEAdapter')),
    DyTVisionTransformer: {},
    DyTImageClassifier: {},
    mmdyt.models.segmentor.DyTEncoderDecoder: {},
    mmdyt.models.recognizer.DyTRecognizer: {},
}
WIDTHS = ('dim', 'out_features', 'in_features', 'patch_values', 'index', 'depth')
BAD = {bool: ['off', 0, 1, None], int: [True, '3', 1.5, math.nan], float: [True, '0.3', math.nan, math.inf, -math.inf]}


def rows():
    """A class, one of its options, and a value of another kind."""
    for cls in CLASSES:
        parameters = dict(inspect.signature(cls).parameters)
        if issubclass(cls, DynamicModel):
            parameters |= inspect.signature(DynamicModel).parameters
        for name, parameter in parameters.items():
            kinds = get_args(parameter.annotation) if isinstance(parameter.annotation, UnionType) else ()
            for kind in kinds or (parameter.annotation,):
                if name not in WIDTHS and kind in BAD:
                    yield from (pytest.param(cls, name, bad, id=f'{cls.__name__}-{name}-{bad}') for bad in BAD[kind])


@pytest.mark.parametrize(('cls', 'name', 'bad'), list(rows()))
def test_an_option_of_another_kind_is_refused_by_name(cls, name, bad):
    with pytest.raises(ValueError, match=rf'^{name} must .*, got {bad!r}'):
        cls(**(CLASSES[cls] | {name: bad}))


def test_the_table_covers_every_class_with_such_options():
    assert len(list(rows())) > 150
    parts = [vars(module) for module in (adapter, adapter_plus, dispatcher, ether, ether_plus, lora, moe_adapter, ssf)]
    public = {value for module in parts for value in module.values() if inspect.isclass(value)}
    ours = {cls for cls in public if cls.__module__.startswith('mmdyt.parts')}
    assert ours <= CLASSES.keys()


@pytest.mark.parametrize(
    ('value', 'number', 'integer'),
    [(1, True, True), (0.5, True, False), (True, False, False), ('1', False, False), (None, False, False)]
    + [(math.nan, False, False), (math.inf, False, False)],
)
def test_numbers(value, number, integer):
    assert (is_number(value), is_integer(value)) == (number, integer)
