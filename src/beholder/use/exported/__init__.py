"""Files that `use.export` puts into an exported folder, as they stand: they import torch, Pillow and transformers, and
nothing of this package."""

from pathlib import Path

CODE = Path(__file__).parent
