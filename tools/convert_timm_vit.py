"""The former name of tools/convert_vit.py, which reads the layout of timm and others."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for whoever imports this file by its path

from convert_vit import main

if __name__ == '__main__':
    main()
