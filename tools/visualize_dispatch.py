"""Draw which tokens of images or clips run which branch, and what each sample costs.

python tools/visualize_dispatch.py CONFIG CHECKPOINT [IMAGE | VIDEO | FOLDER ...] --out DIR
"""

import argparse
import copy
from pathlib import Path

from mmdyt import compat

compat.install()

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint
from mmengine.utils import track_iter_progress
from torch.utils.data import DataLoader

from mmdyt import preflight
from mmdyt.core.observe import mapped_branches
from mmdyt.datasets.files import find_files
from mmdyt.engine.host import find_host, is_recognizer
from mmdyt.engine.own_images import name_in_dataset, spread_places
from mmdyt.engine.visualize.collect import NOTHING, Collector
from mmdyt.engine.visualize.draw import draw, numbers
from mmdyt.files import write_json
from mmdyt.preflight.checkpoints import check_exists
from mmdyt.preflight.names import name_of
from mmdyt.preflight.work_dir import check_folder

LOADER = 'test_dataloader'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Draw which tokens run which branch. See docs/dispatch.md.')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('files', nargs='*', help='images, videos or folders of them; default: some of the test data')
    parser.add_argument('--out', required=True, help='folder for pictures and the page, index.html')
    parser.add_argument('--number', type=int, default=32, help='samples of the test data, at equal distances')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    preflight.add_method_arguments(parser)
    parser.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings, key=value')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[Config, torch.nn.Module, dict]:
    """The checked config, the model in inference, and what the checkpoint tells of the data."""
    if args.number < 1:
        raise ValueError(f'--number must be at least 1, got {args.number}.')
    check_folder('--out', args.out)
    cfg = preflight.load_config(args)
    check_exists('checkpoint', args.checkpoint)
    cfg.load_from = args.checkpoint
    preflight.check(cfg, loops=())
    if cfg.get(LOADER) is None:
        raise ValueError(f'config must have a {LOADER}, whose pipeline is used, got none.')
    host = find_host(MODELS.build(cfg.model))
    if not mapped_branches(host):
        raise ValueError(f'{NOTHING} there is nothing to draw.')
    checkpoint = load_checkpoint(host, args.checkpoint, map_location='cpu', logger='silent')
    return cfg, host.to(args.device).eval(), checkpoint.get('meta', {}).get('dataset_meta') or {}


def loader_of(
    cfg: Config, host: torch.nn.Module, files: list[str], number: int, about: dict
) -> tuple[DataLoader, list[int]]:
    """One sample after the other, some of the test data, or the files in the pipeline of the test; and their places."""
    loader = copy.deepcopy(cfg[LOADER]) | dict(batch_size=1, num_workers=0, persistent_workers=False)
    loader.pop('prefetch_factor', None)
    if not files:
        preflight.check_images(cfg, [LOADER])
        whole = Runner.build_dataloader(loader)
        places = spread_places(len(whole.dataset), number)
        return DataLoader(whole.dataset, sampler=places, collate_fn=whole.collate_fn), places
    steps = [step for step in loader['dataset']['pipeline'] if 'LoadAnnotations' not in name_of(step['type'])]
    metainfo = {key: about[key] for key in ('classes', 'palette') if about.get(key) is not None}
    video = is_recognizer(host)
    loader['dataset'] = dict(type='mmdyt.Files', files=find_files(files, video), video=video, pipeline=steps)
    loader['dataset']['metainfo'] = metainfo
    loader = Runner.build_dataloader(loader)
    return loader, list(range(len(loader.dataset)))


def main() -> None:
    """Check everything the user typed, then predict and draw."""
    args = parse_args()
    with preflight.clean_exit():
        cfg, host, about = load(args)
        loader, places = loader_of(cfg, host, args.files, args.number, about)
    about = loader.dataset.metainfo
    samples, name = [], name_in_dataset(loader)
    with Collector(host, about.get('classes'), about.get('palette'), lambda i: name(places[i])) as collector:
        for batch in track_iter_progress((iter(loader), len(loader))):
            with torch.no_grad():
                samples += collector.take(batch, host.test_step(batch))
    page = draw(samples, Path(args.out), Path(args.config).stem)
    write_json(Path(args.out) / 'numbers.json', numbers(samples))
    print(f'\nWhich tokens ran where: {page}')


if __name__ == '__main__':
    main()
