"""One HTML page about one or more runs: curves, final metrics, rates, costs, pictures, differences of configs.

python tools/report.py WORK_DIR [WORK_DIR ...] [--out FILE] [--pictures N]
"""

import argparse
from pathlib import Path

from mmdyt import compat

compat.install()

from mmdyt import preflight
from mmdyt.engine.report import MARK, read_runs, write_report
from mmdyt.files import check_out_file
from mmdyt.preflight.carried import read_values

NAME = 'report.html'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Write one HTML page about runs. See docs/report.md.')
    parser.add_argument(
        'work_dirs', nargs='+', type=Path, metavar='WORK_DIR', help='of a run, or of tools/compare.py: all of its runs'
    )
    parser.add_argument('--out', type=Path, metavar='FILE', help=f'default: {NAME} in the work dir; of several, here')
    parser.add_argument('--pictures', type=int, default=6, metavar='N', help='of each run at most; default: 6')
    return parser.parse_args()


def check_out(file: Path) -> None:
    """Refuse to write over what is no report.

    Raises:
        ValueError: Naming the file.
    """
    check_out_file('--out', file)
    if file.exists() and not file.read_bytes().startswith(MARK.encode()):
        raise ValueError(f'--out must be a new file or an earlier report, got {file}, which is something else.')


def main() -> None:
    """Check, read, write."""
    args = parse_args()
    with preflight.clean_exit():
        if args.pictures < 0:
            raise ValueError(f'--pictures must be at least 0, got {args.pictures}.')
        out = args.out or (args.work_dirs[0] / NAME if len(args.work_dirs) == 1 else Path(NAME))
        runs = read_runs(args.work_dirs, read_values)
        check_out(out)
        write_report(runs, out, args.pictures)
    print(f'{len(runs)} runs: {out}')


if __name__ == '__main__':
    main()
