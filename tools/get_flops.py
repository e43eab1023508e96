"""Count the multiply-adds and parameters of a config; needs neither data nor weights.

python tools/get_flops.py configs/dyt/upernet_vitb_ade20k.py [--shape H W] [--rate R] [--json FILE]
"""

import argparse
from pathlib import Path

from mmdyt import compat

compat.install()

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings

from mmdyt import preflight
from mmdyt.core.observe import complete_model, dynamic_branches
from mmdyt.core.tuning import count_parameters
from mmdyt.engine.host import HEADS, find_host, is_recognizer, part_macs
from mmdyt.engine.shapes import shapes_only
from mmdyt.files import check_out_file, write_json
from mmdyt.preflight.names import check_types


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Count multiply-adds (MACs; papers print them as FLOPs) and parameters of one forward pass. '
        'With sliding windows this is one window, for video one view of a clip; mmdyt.FLOPsHook sums the windows of '
        'real images and the views of real clips.'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), help="default: the backbone's img_size")
    parser.add_argument('--frames', type=int, metavar='T', help="of a view; default: the test pipeline's clip_len")
    parser.add_argument('--rate', type=float, help="activation rate in [0, 1]; default: the config's target_rate")
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the counts, in single multiply-adds')
    preflight.add_method_arguments(parser)
    parser.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings, key=value')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser.parse_args()


def build_host(cfg: Config) -> nn.Module:
    """Build the config's model on the meta device: no weights are read or allocated."""
    import_modules_from_strings(**cfg.get('custom_imports', dict(imports=[])))
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    check_types(dict(model=cfg.model), cfg.get('default_scope', 'mmengine'))
    with shapes_only():
        return find_host(MODELS.build(cfg.model)).eval()


def view_frames(host: nn.Module, cfg: Config, frames: int | None) -> int | None:
    """Frames of a view: what the user said, or what the test pipeline samples; None for a model of images."""
    if not is_recognizer(host):
        if frames is not None:
            raise ValueError(f'--frames must be left out for a model of images, got {frames}.')
        return None
    steps = (cfg.get('test_dataloader') or {}).get('dataset', {}).get('pipeline') or []
    frames = frames or next((step['clip_len'] for step in steps if step.get('clip_len')), None)
    if frames is None:
        raise ValueError('--frames must be set where no step of the test pipeline has a clip_len, got none.')
    return frames


def count(host: nn.Module, shape: tuple[int, int], rate: float, frames: int | None = None) -> dict[str, dict[str, int]]:
    """MACs of every part with patch tokens active at ``rate``, beside dense, and parameters.

    Args:
        host: The model, on the meta device.
        shape: Height and width in pixels.
        rate: Activation rate.
        frames: Of a view; None counts an image.
    """
    backbone = host.backbone
    with torch.no_grad(), complete_model(host):
        channels = backbone.patch_embed.projection.in_channels
        size = (frames, *shape) if frames else shape
        features = backbone(torch.empty(1, channels, *size, device='meta'))
    parts, images = part_macs(host, features), frames or 1
    macs = dict(backbone=round(images * float(backbone.macs_at(*shape, rate))), **parts)
    dense = dict(backbone=round(images * backbone.dense_macs(*shape)), **parts)
    counts = {name: dict(macs=macs[name], dense_macs=dense[name]) for name in macs}
    counts = dict(total=dict(macs=sum(macs.values()), dense_macs=sum(dense.values()))) | counts
    return counts | dict(params=count_parts_parameters(host))


def count_parts_parameters(host: nn.Module) -> dict[str, int]:
    """Parameters: tuned, frozen, adapter, dispatcher, and all of neck and of the head that runs at inference."""
    neck = getattr(host, 'neck', None)
    head = next((m for name in HEADS if (m := getattr(host, name, None)) is not None), None)
    sizes = {name: sum(p.numel() for p in m.parameters()) if m else 0 for name, m in dict(neck=neck, head=head).items()}
    return count_parameters(host) | sizes


def report(counts: dict, shape: tuple[int, int], rate: float, frames: int | None = None) -> str:
    """A table for people."""
    size = f'{shape[0]} x {shape[1]}'
    seen = f'One forward pass of {size}' if frames is None else f'One view of {frames} frames of {size}'
    lines = [f'{seen}, activation rate {rate:.2f}.', '']
    lines += [f'{"part":<10}{"GMACs":>10}{"dense":>10}{"ratio":>8}']
    for name in ('total', 'backbone', 'neck', 'head'):
        macs, dense = counts[name]['macs'], counts[name]['dense_macs']
        ratio = f'{macs / dense:>8.3f}' if dense else f'{"-":>8}'
        lines.append(f'{name:<10}{macs / 1e9:>10.3f}{dense / 1e9:>10.3f}{ratio}')
    params = ', '.join(f'{name} {number / 1e6:.3f}' for name, number in counts['params'].items())
    return '\n'.join([*lines, '', f'Parameters (M): {params}.', 'GMACs are MACs (papers print them as FLOPs).'])


def main() -> None:
    """Check what the user typed, count, print and write."""
    args = parse_args()
    with preflight.clean_exit():
        if args.rate is not None and not 0 <= args.rate <= 1:
            raise ValueError(f'--rate must lie in [0, 1], got {args.rate}. Rates are fractions, not percent.')
        if args.shape and min(args.shape) < 1:
            raise ValueError(f'--shape must hold two positive sizes in pixels, got {args.shape}.')
        if args.json:
            check_out_file('--json', args.json)
        if args.frames is not None and args.frames < 1:
            raise ValueError(f'--frames must be at least 1, got {args.frames}.')
        cfg = preflight.load_config(args)
        host = build_host(cfg)
        shape = tuple(args.shape or host.backbone.img_size)
        dispatched = bool(dynamic_branches(host))
        if args.rate is not None and not dispatched:
            raise ValueError(f'--rate must be left out for a model without dispatchers, got {args.rate}.')
        rate = args.rate if args.rate is not None else getattr(host, 'target_rate', 1.0) if dispatched else 1.0
        frames = view_frames(host, cfg, args.frames)
        counts = count(host, shape, rate, frames)
    print(report(counts, shape, rate, frames))
    if args.json:
        with preflight.clean_exit():
            write_json(args.json, counts)


if __name__ == '__main__':
    main()
