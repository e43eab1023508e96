"""Draw what a model sees of its data: after the augmentation and the preprocessor, with masks and names of classes.

python tools/browse_data.py CONFIG [--split train|val|test] [--number N] [--out DIR] [--check]
"""

import argparse
import copy
import sys
from pathlib import Path

from mmdyt import compat

compat.install()

import torch.nn as nn
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import set_random_seed
from mmengine.utils import import_modules_from_strings, track_iter_progress

from mmdyt import preflight
from mmdyt.engine.browse import Seen, contact_sheet, count_labels, draw_seen, see, wrong_labels
from mmdyt.engine.finite import file_of
from mmdyt.engine.own_images import spread_places
from mmdyt.engine.pictures import write_picture
from mmdyt.engine.visualize.draw import file_stem
from mmdyt.preflight.check import check_images
from mmdyt.preflight.labels import check_labels
from mmdyt.preflight.refusals import ERRORS
from mmdyt.preflight.work_dir import check_folder

SPLITS = ('train', 'val', 'test')
SHEET = 'contact.png'
BROKEN = 1  # exit code of --check


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Draw what a model sees of its data. See docs/own_data.md.')
    parser.add_argument('config', help='config file')
    parser.add_argument('--split', choices=SPLITS, default='train', help='which data; default: train')
    parser.add_argument('--number', type=int, default=16, help='samples, at equal distances; default: 16')
    parser.add_argument('--out', help=f'folder for pictures and {SHEET}; default: browse in the work dir')
    parser.add_argument('--seed', type=int, default=0, help='of the augmentation')
    parser.add_argument('--check', action='store_true', help='also read every sample, and name the broken ones')
    preflight.add_method_arguments(parser)
    parser.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings, key=value')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[Config, Path]:
    """The checked config, and the folder for pictures; neither weights nor the model are looked at."""
    if args.number < 1:
        raise ValueError(f'--number must be at least 1, got {args.number}.')
    cfg = preflight.load_config(args)
    out = args.out or str(Path(cfg.work_dir) / 'browse')
    check_folder('--out', out)
    with preflight.part('custom_imports', 'be imported'):
        import_modules_from_strings(**cfg.get('custom_imports', dict(imports=[])))
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    check_images(cfg, [f'{args.split}_dataloader'])
    check_labels(cfg, (args.split,))
    return cfg, Path(out)


def build(cfg: Config, split: str) -> tuple[BaseDataset, nn.Module]:
    """The data set, and what the model does with its samples first."""
    with preflight.part(f'{split}_dataloader.dataset'):
        dataset = DATASETS.build(copy.deepcopy(cfg[f'{split}_dataloader'].dataset))
    model = cfg.model
    while model.get('module'):
        model = model['module']
    with preflight.part('model.data_preprocessor'):
        preprocessor = MODELS.build(copy.deepcopy(model.get('data_preprocessor') or dict(type='BaseDataPreprocessor')))
    return dataset, preprocessor


def name_of(dataset: BaseDataset, place: int) -> str:
    """The file of a sample."""
    return file_of(dataset.get_data_info(place)) or f'sample {place}'


def draw(dataset: BaseDataset, preprocessor: nn.Module, args: argparse.Namespace, out: Path) -> Path:
    """Draw some samples, then all of them on one sheet, which is given."""
    out.mkdir(parents=True, exist_ok=True)
    about = dict(classes=dataset.metainfo.get('classes') or (), palette=dataset.metainfo.get('palette') or ())
    seen: list[Seen] = []
    for place in spread_places(len(dataset), args.number):
        name = name_of(dataset, place)
        with preflight.part(name, 'be read'):
            seen.append(see(preprocessor, dataset[place], training=args.split == 'train'))
        picture = draw_seen(seen[-1], Path(name).name, **about)
        write_picture(out / f'{args.split}_{place:06d}_{file_stem(name)}.png', picture)
    sheet = out / f'{args.split}_{SHEET}'
    write_picture(sheet, contact_sheet(seen, **about))
    return sheet


def find_broken(dataset: BaseDataset) -> list[str]:
    """What is wrong with which sample; all are read."""
    broken, classes = [], len(dataset.metainfo.get('classes') or ())
    for place in track_iter_progress(range(len(dataset)), file=sys.stderr):
        try:
            labels = wrong_labels(dataset[place], classes) if classes else []
        except ERRORS as error:
            broken.append(f'{name_of(dataset, place)}: {str(error).strip() or type(error).__name__}')
            continue
        if labels:
            broken.append(f'{name_of(dataset, place)}: its mask has labels {labels[:5]}, there are {classes} classes')
    return broken


def main() -> None:
    """Check what the user typed, then draw, then read all where that is wanted."""
    args = parse_args()
    broken = []
    with preflight.clean_exit():
        cfg, out = load(args)
        set_random_seed(args.seed)
        dataset, preprocessor = build(cfg, args.split)
        print(f'{args.split}: {count_labels(dataset, dataset.metainfo.get("classes") or ())}')
        if args.check:
            broken = find_broken(dataset)
            print('\n'.join([f'\nBroken: {len(broken)} of {len(dataset)}', *broken]))
        if not broken:
            print(f'What the model sees: {draw(dataset, preprocessor, args, out)}')
    if broken:
        sys.exit(BROKEN)


if __name__ == '__main__':
    main()
