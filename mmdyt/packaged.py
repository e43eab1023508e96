"""Where configs and tools lie: within the package where a wheel was installed, beside it in a clone."""

from pathlib import Path

PACKAGE = Path(__file__).parent
ROOT = PACKAGE / '.mim' if (PACKAGE / '.mim').is_dir() else PACKAGE.parent  # .mim: as OpenMMLab's packages have it
CONFIGS, TOOLS = ROOT / 'configs', ROOT / 'tools'
PREFIX = 'mmdyt::'


def find_config(name: str | Path) -> Path:
    """The file of a config: that of the user, or else the one that comes with this package.

    Args:
        name: A path, or ``mmdyt::`` and a path below ``configs``. A relative path that begins with ``configs`` and is
            not in the working directory is looked for in the package, too.

    Returns:
        The file; where there is none, the path as it was given.
    """
    if str(name).startswith(PREFIX):
        return CONFIGS / str(name).removeprefix(PREFIX)
    own = Path(name)
    packaged = ROOT / own
    if own.is_file() or own.parts[:1] != ('configs',) or not packaged.is_file():
        return own
    return packaged


def known_configs() -> list[str]:
    """Names of all configs, those of the working directory and of the package."""
    folders = (Path('configs'), CONFIGS)
    return sorted({str('configs' / path.relative_to(folder)) for folder in folders for path in folder.rglob('*.py')})
