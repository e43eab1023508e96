"""Read every clip that a video config's lists name, and say which are broken: before hours of training find out.

python tools/check_clips.py configs/dyt/vitb_k400.py [--workers 8] [--frames 8] [--out FOLDER]
"""

import argparse
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from mmdyt import compat

compat.install()

import numpy as np
from mmengine.config import Config
from mmengine.fileio import list_from_file
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope
from mmengine.utils import import_modules_from_strings

from mmdyt import preflight
from mmdyt.files import write_text
from mmdyt.preflight.check import LOOPS
from mmdyt.preflight.datasets import check_data, head_classes, nested

OPEN, DECODE = 'mmdyt.OpenClip', 'mmdyt.DecodeClip'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Read every clip that the lists of a video config name.')
    parser.add_argument('config', help='config file')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='threads')
    parser.add_argument('--frames', type=int, default=8, help='of each clip, evenly spaced from the first to the last')
    parser.add_argument('--out', type=Path, metavar='FOLDER', help='write the lists without the broken clips there')
    parser.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings, key=value')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    args = parser.parse_args()
    for name in ('workers', 'frames'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1, got {getattr(args, name)}.')
    return args


def find_lists(cfg: Config) -> dict[str, list[tuple[list[str], list[dict]]]]:
    """The lists of the config, their lines checked, each with its clips (file names) and how they are read.

    Loops that share a list may read it in different ways, or from different folders.
    """
    import_modules_from_strings(**cfg.get('custom_imports', dict(imports=[])))
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    lists = {}
    for loop in LOOPS:
        loader = cfg.get(f'{loop}_dataloader') or {}
        for where, dataset in nested(loader.get('dataset'), f'{loop}_dataloader.dataset'):
            if dataset.get('dataset') or dataset.get('datasets'):
                continue  # a wrapper
            steps = [step for step in dataset.get('pipeline') or [] if step['type'] in (OPEN, DECODE)]
            if [step['type'] for step in steps] != [OPEN, DECODE]:
                raise ValueError(f'{where}.pipeline must read clips with {OPEN} and {DECODE}, got {steps}.')
            check_data(dataset, where, head_classes(cfg.model), files=False)  # OpenClip finds those
            data = DATASETS.build({**dataset, 'lazy_init': True})
            clips = [sample['filename'] for sample in data.load_data_list()]
            lines = len(list_from_file(data.ann_file))
            if len(clips) != lines:
                raise ValueError(f'{where}.ann_file must have a line for each of {len(clips)} clips, got {lines}.')
            file = next((file for file in lists if is_same(file, data.ann_file)), data.ann_file)
            readings = lists.setdefault(file, [])
            if (clips, steps) not in readings:
                readings.append((clips, steps))
    return lists


def is_same(file: str | Path, other: str | Path) -> bool:
    """Whether two paths name one file."""
    return str(file) == str(other) or os.path.exists(file) and os.path.exists(other) and os.path.samefile(file, other)


def find_targets(folder: Path, lists: Iterable[str]) -> dict[str, Path]:
    """Where in ``--out`` the new list for each list goes; nothing that is there is overwritten."""
    targets = {file: folder / Path(file).name for file in lists}
    for target in targets.values():
        twins = [file for file in targets if Path(file).name == target.name]
        if len(twins) > 1:
            raise ValueError(f'--out must be given with lists of different names, got {twins}. Rename one of them.')
        if any(is_same(file, target) for file in targets):
            raise ValueError(f'--out must be another folder than that of the lists, got {folder}.')
        if target.exists():
            raise ValueError(
                f'--out must be a folder without {target.name}, got {folder}. Remove that file, or name another folder.'
            )
    return targets


def problem(path: str, steps: list[dict], frames: int) -> str:
    """What is wrong with a clip; nothing, if it can be read."""
    MMLogger.get_current_instance().setLevel('ERROR')  # mmaction2's readers use what mmengine calls deprecated
    open_clip, decode_clip = (TRANSFORMS.build(step) for step in steps)
    try:
        clip = open_clip.transform(dict(filename=path))
        clip['frame_inds'] = np.linspace(0, clip['total_frames'] - 1, frames).astype(int)
        decode_clip.transform(clip)
    except ValueError as error:
        return str(error)
    return ''


def main() -> None:
    """Check what the user typed, read all clips, report, and write the lists of the sound ones."""
    args = parse_args()
    with preflight.clean_exit():
        cfg = preflight.load_config(args)
        lists = find_lists(cfg)
        if args.out:
            targets = find_targets(args.out, lists)
            args.out.mkdir(parents=True, exist_ok=True)
    broken = 0
    with ThreadPoolExecutor(args.workers) as pool:  # the decoders are native code
        for file, readings in lists.items():
            wrong = {}
            for clips, steps in readings:
                results = pool.map(partial(problem, steps=steps, frames=args.frames), clips)
                for line, said in enumerate(results, 1):
                    if said and line not in wrong:
                        wrong[line] = said
                        print(f'{file}, line {line}: {said}', flush=True)
            lines = list_from_file(file)
            print(f'{file}: {len(wrong)} of {len(lines)} clips are broken.', flush=True)
            broken += len(wrong)
            if args.out:
                sound = [f'{text}\n' for line, text in enumerate(lines, 1) if line not in wrong]
                with preflight.clean_exit():
                    write_text(targets[file], ''.join(sound))
    sys.exit(1 if broken else 0)


if __name__ == '__main__':
    main()
