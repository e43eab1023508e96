"""Convert Vision Transformer weights with timm's names to mmpretrain's names.

    python tools/convert_timm_vit.py SRC DST [--arch NAME] [--drop-head] [--force]

For plain ViTs: the AugReg family (tiny to large, patch 8, 16 or 32, with or without head, in21k with
`pre_logits`) and DeiT without distillation. DST loads into mmpretrain's `ImageClassifier`, or into a backbone
through `init_cfg=dict(type='Pretrained', checkpoint=DST, prefix='backbone.')`. Weights do not say how images
were normalised: AugReg wants mean = std = 127.5, DeiT the ImageNet statistics.
"""

import argparse
import io
import os
from pathlib import Path

import torch

from mmdyt.files import whole_file
from mmdyt.timm_weights import ARCHS, choose_arch, convert, unwrap


def report(converted, sizes, left_out, arch, dst):
    """Say what was found, what was left out, and the configuration that loads DST."""
    img_size = sizes.grid * sizes.patch_size
    head = converted.get('head.layers.head.weight')
    hidden = converted.get('head.layers.pre_logits.weight')
    lines = [
        f'found: embed_dims {sizes.embed_dims}, depth {sizes.num_layers}, hidden {sizes.hidden}, '
        f'heads unknown (weights do not tell), patch {sizes.patch_size}, image {img_size}, '
        f'classes {"none" if head is None else len(head)}'
    ]
    lines += [f'left out: {name} ({reason})' for name, reason in left_out.items()]
    channels = '' if sizes.in_channels == 3 else f'in_channels={sizes.in_channels}, '
    lines.append(
        f"backbone=dict(type='mmpretrain.VisionTransformer', arch={arch}, img_size={img_size}, "
        f"patch_size={sizes.patch_size}, {channels}norm_cfg=dict(type='LN', eps=1e-6), init_cfg="
        f"dict(type='Pretrained', checkpoint={str(dst)!r}, prefix='backbone.'))"
    )
    if head is not None:
        width = '' if hidden is None else f', hidden_dim={len(hidden)}'
        lines.append(
            f"head=dict(type='mmpretrain.VisionTransformerClsHead', num_classes={len(head)}, "
            f'in_channels={sizes.embed_dims}{width})'
        )
    return '\n'.join(lines)


def check_paths(src, dst, force=False):
    """Refuse paths that cannot be read, or must not be written."""
    if not src.is_file():
        raise ValueError(f'SRC must be a file, got {str(src)!r}, which is none.')
    if src.suffix not in ('.pth', '.pt', '.bin', '.safetensors'):
        raise ValueError(f'SRC must end in .pth, .pt, .bin or .safetensors, got {src.name!r}.')
    if dst.suffix not in ('.pth', '.pt'):
        raise ValueError(f'DST must end in .pth or .pt, got {dst.name!r}. It is written by torch.save.')
    if dst.exists() and dst.samefile(src):
        raise ValueError(f'DST must differ from SRC, got {str(dst)!r} for both.')
    if dst.is_dir() or (os.path.lexists(dst) and not force):
        raise ValueError(
            f'DST must not exist yet, got {str(dst)!r}. '
            + ('It is a folder.' if dst.is_dir() else '--force overwrites it.')
        )


def read(src):
    """Load SRC without running any code that it may hold."""
    try:
        if src.suffix == '.safetensors':
            from safetensors.torch import load_file

            return load_file(src)
        return torch.load(src, map_location='cpu', weights_only=True)
    except ImportError as error:
        raise ValueError(
            f'SRC must be readable, got {src.name!r} without the package safetensors. Run pip install safetensors.'
        ) from error
    except Exception as error:  # damaged files raise almost anything
        raise ValueError(
            f'SRC must hold tensors only, got {src.name!r}, which does not load safely '
            f'({type(error).__name__}). Pickled objects can run code, so they are refused: ask '
            'its publisher for the bare state_dict, or fetch a damaged file again.'
        ) from error


def write(checkpoint, dst):
    """Write beside DST, then rename: DST is whole or absent."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as whole, whole_file(dst, 'wb') as file:  # torch does not say why it could not write a file
        torch.save(checkpoint, whole)
        file.write(whole.getbuffer())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', type=Path, help='timm weights: .pth, .pt, .bin or .safetensors')
    parser.add_argument('dst', metavar='DST', type=Path, help='file to write: .pth or .pt')
    parser.add_argument('--arch', choices=ARCHS, help='refuse weights that are not of this arch')
    parser.add_argument('--drop-head', action='store_true', help='convert the backbone only')
    parser.add_argument('--force', action='store_true', help='overwrite DST')
    args = parser.parse_args(argv)
    try:
        check_paths(args.src, args.dst, args.force)
        state, beside = unwrap(read(args.src))
        converted, sizes, left_out = convert(state, args.drop_head)
        arch = choose_arch(sizes, args.arch)
        write(dict(state_dict=converted, meta=dict(source=args.src.name, **sizes._asdict())), args.dst)
    except (ValueError, OSError) as error:
        raise SystemExit(f'error: {error}') from error
    print(report(converted, sizes, beside | left_out, arch, args.dst))


if __name__ == '__main__':
    main()
