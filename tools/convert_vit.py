"""Convert weights of a Vision Transformer that people have to mmpretrain's names, and print the config that loads them.

    python tools/convert_vit.py SRC DST [--act NAME] [--num-heads N] [--arch NAME] [--drop-head] [--force]

SRC is a file of timm, DINO, DINOv2 (with registers, too), MAE, CLIP or OpenCLIP, DeiT, DeiT III, MoCo v3, torchvision
or Hugging Face (ViT, Dinov2, CLIP): .pth, .pt, .bin, .pth.tar, .safetensors, or the .index.json of shards. Which one is
found out. DST loads into mmpretrain's `ImageClassifier`, or into a backbone through the `init_cfg` that is printed.
Nothing is written if a tensor does not fit. docs/weights.md says more.
"""

import argparse
import io
import os
from pathlib import Path

import torch

from mmdyt.files import whole_file
from mmdyt.weights.beside import GELU, look_beside, settle
from mmdyt.weights.convert import convert
from mmdyt.weights.reading import check_source, read, unwrap
from mmdyt.weights.show import ARCHS, backbone, report


def check_paths(src, dst, force=False):
    """Refuse paths that cannot be read, or must not be written."""
    check_source(src)
    if dst.suffix not in ('.pth', '.pt'):
        raise ValueError(f'DST must end in .pth or .pt, got {dst.name!r}. It is written by torch.save.')
    if dst.exists() and dst.samefile(src):
        raise ValueError(f'DST must differ from SRC, got {str(dst)!r} for both.')
    if dst.is_dir() or (os.path.lexists(dst) and not force):
        raise ValueError(
            f'DST must not exist yet, got {str(dst)!r}. '
            + ('It is a folder.' if dst.is_dir() else '--force overwrites it.')
        )


def write(checkpoint, dst):
    """Write beside DST, then rename: DST is whole or absent."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as whole, whole_file(dst, 'wb') as file:  # torch does not say why it could not write a file
        torch.save(checkpoint, whole)
        file.write(whole.getbuffer())


def positive(text):
    """A number of heads."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f'must be a positive integer, got {text!r}')
    return int(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', type=Path, help='weights, or the .index.json of shards')
    parser.add_argument('dst', metavar='DST', type=Path, help='file to write: .pth or .pt')
    parser.add_argument('--act', choices=GELU, help='activation of the MLP: CLIP came with gelu and quick_gelu')
    parser.add_argument('--num-heads', type=positive, help='of attention, where it is not as published for the width')
    parser.add_argument('--arch', choices=ARCHS, help='refuse weights that are not of this arch')
    parser.add_argument('--drop-head', action='store_true', help='convert the backbone only')
    parser.add_argument('--force', action='store_true', help='overwrite DST')
    args = parser.parse_args(argv)
    try:
        check_paths(args.src, args.dst, args.force)
        state, beside = unwrap(read(args.src))
        found = convert(state, args.drop_head)
        hints = settle(look_beside(args.src, found.sizes), found.kind, args.act, args.num_heads)
        config = backbone(found, hints, args.dst, args.arch)
        meta = dict(source=args.src.name, layout=found.kind.name, **found.sizes._asdict())
        write(dict(state_dict=found.tensors, meta=meta), args.dst)
    except (ValueError, OSError) as error:
        raise SystemExit(f'error: {error}') from error
    print(report(found, hints, config, beside))


if __name__ == '__main__':
    main()
