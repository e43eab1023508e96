"""A share of the samples of any data set, held out for validation."""

import os
from collections import defaultdict
from hashlib import sha1


class HeldOut:
    """Goes before a data set class of mmengine; its ``filter_cfg`` says which samples stay.

    ``filter_cfg=dict(part='train', share=0.2, seed=0)`` keeps all but a fifth of each class, ``part='val'`` that fifth.
    Who is drawn depends on the seed and on the names of files within the data root, not on their order, nor on where
    the root lies. With None all samples stay.
    """

    def filter_data(self) -> list[dict]:
        """The samples of the part."""
        wanted = self.filter_cfg
        if wanted is None:
            return super().filter_data()
        drawn = draw(self.data_list, self.data_root or '.', wanted['share'], wanted['seed'])
        return [sample for i, sample in enumerate(self.data_list) if (i in drawn) == (wanted['part'] == 'val')]


def draw(samples: list[dict], root: str, share: float, seed: int) -> set[int]:
    """Places of a share of the samples: of each label, as far as samples have one, at least one and not all.

    Args:
        samples: With an ``img_path`` or ``filename``, and a ``gt_label`` or ``label``.
        root: What their paths are taken relative to.
        share: In (0, 1).
        seed: Another one draws others.
    """
    by_label = defaultdict(list)
    for i, sample in enumerate(samples):
        path = os.path.relpath(sample.get('img_path') or sample['filename'], root)
        order = sha1(f'{seed} {path}'.encode()).digest()
        by_label[sample.get('gt_label', sample.get('label'))].append((order, i))
    return {i for places in by_label.values() for _, i in sorted(places)[: _number(len(places), share)]}


def _number(samples: int, share: float) -> int:
    return min(max(round(samples * share), 1), samples - 1)
