"""Stage 4 of the demo: stage 3 with one option more: the aggregator knows which frame is which; not in the paper.

python tools/demo.py, or on what it drew, after stage 1: python tools/train.py configs/demo/clips_temporal.py
"""

_base_ = './clips_order_blind.py'

work_dir = '{{$MMDYT_DEMO:work_dirs/demo}}/clips_temporal'
model = dict(neck=dict(aggregator=dict(temporal_positions=_base_.num_frames)))
