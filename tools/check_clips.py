"""Read every clip that a video config's lists name, and say which are broken: before hours of training find out.

python tools/check_clips.py configs/dyt/vitb_k400.py [--workers 8] [--frames 8] [--out FOLDER]
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from mmdyt import compat

compat.install()

import numpy as np  # noqa: E402
from mmengine.config import Config, DictAction  # noqa: E402
from mmengine.fileio import list_from_file  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope  # noqa: E402
from mmengine.utils import import_modules_from_strings  # noqa: E402

from mmdyt.engine import preflight  # noqa: E402
from mmdyt.engine.datasets import check_data, head_classes  # noqa: E402

OPEN, DECODE = 'mmdyt.OpenClip', 'mmdyt.DecodeClip'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Read every clip that the lists of a video config name.')
    parser.add_argument('config', help='config file')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='threads')
    parser.add_argument('--frames', type=int, default=8, help='of each clip, evenly spaced from the first to the last')
    parser.add_argument('--out', type=Path, metavar='FOLDER', help='write the lists without the broken clips there')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings, key=value')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    args = parser.parse_args()
    for name in ('workers', 'frames'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1, got {getattr(args, name)}.')
    return args


def find_lists(cfg: Config) -> dict[str, tuple[list[str], list[dict]]]:
    """The clips (file names) of each list of the config, its lines checked, and how they are read."""
    import_modules_from_strings(**cfg.get('custom_imports', dict(imports=[])))
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    lists = {}
    for loop in preflight.LOOPS:
        where = f'{loop}_dataloader.dataset'
        dataset = (cfg.get(f'{loop}_dataloader') or {}).get('dataset')
        if not dataset:
            continue
        steps = [step for step in dataset.get('pipeline') or [] if step['type'] in (OPEN, DECODE)]
        if [step['type'] for step in steps] != [OPEN, DECODE]:
            raise ValueError(f'{where}.pipeline must read clips with {OPEN} and {DECODE}, got {steps}.')
        check_data(dataset, where, head_classes(cfg.model))
        data = DATASETS.build(dataset)
        lists[data.ann_file] = [data.get_data_info(i)['filename'] for i in range(len(data))], steps
    return lists


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
            args.out.mkdir(parents=True, exist_ok=True)
            for file in lists:
                if Path(file).resolve() == (args.out / Path(file).name).resolve():
                    raise ValueError(f'--out must be another folder than that of the lists, got {args.out}.')
    broken = 0
    with ThreadPoolExecutor(args.workers) as pool:  # the decoders are native code
        for file, (clips, steps) in lists.items():
            results = pool.map(partial(problem, steps=steps, frames=args.frames), clips)
            wrong = {}
            for line, said in enumerate(results, 1):
                if said:
                    wrong[line] = said
                    print(f'{file}, line {line}: {said}', flush=True)
            print(f'{file}: {len(wrong)} of {len(clips)} clips are broken.', flush=True)
            broken += len(wrong)
            if args.out:
                sound = [text for line, text in enumerate(list_from_file(file), 1) if line not in wrong]
                (args.out / Path(file).name).write_text('\n'.join(sound) + '\n')
    sys.exit(1 if broken else 0)


if __name__ == '__main__':
    main()
