"""What a table of names must say: a family of layouts, and our own words for the tensors of a Vision Transformer.

Words outside the blocks: ``cls_token``, ``pos_embed``, ``reg_token``, ``patch_embed.proj``, ``norm_pre``, ``norm``,
``fc_norm`` (of the mean patch), ``pre_logits.fc``, ``head``, ``proj`` (of CLIP). In ``blocks.<i>.``: ``norm1``,
``attn.qkv`` or ``attn.q``, ``attn.k``, ``attn.v``, ``attn.proj``, ``ls1.gamma``, ``norm2``, ``mlp.fc1``, ``mlp.fc2`` or
``mlp.w12``, ``mlp.w3``, ``ls2.gamma``. They are timm's, where timm has one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

NUMBER = r'(0|[1-9][0-9]{0,3})'  # of a block

IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
HALF = ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))
CLIP = ((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305))


class Kind(NamedTuple):
    """What weights of a layout are, as far as they say it.

    Attributes:
        name: For people.
        pixels: Means and standard deviations of the three channels, of values from 0 to 255; None where weights of
            several origins share the layout.
        eps: Of the layer norms.
        gelu: Whether the MLP is known to have the plain GELU; CLIP comes with two.
        patch_bias: Whether the patch embedding must have a bias.
        heads: Of attention, where all sizes of this kind have as many; None is as their width says.
    """

    name: str
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    eps: float = 1e-6
    gelu: bool = True
    patch_bias: bool = True
    heads: int | None = None


@dataclass(frozen=True)
class Family:
    """A layout, or several that share their names.

    Attributes:
        kind: What it is where no telltale says more.
        blocks: Pattern of what stands in front of the names within a block; its group is the number.
        inside: Names of modules and tensors within a block to our words.
        outside: The same, of the others.
        prefixes: What may stand in front of the whole tower, the likeliest first.
        beside: Names of modules and tensors that stand beside the tower, where that has a prefix, to our words.
        left: What stays behind: patterns of whole names to the reason.
        lifts: Words of tensors that lack a leading dimension here, and how many.
        turned: Words of tensors that are transposed here.
        kinds: Telltales: a pattern that some name must match to a kind, the first that does.
    """

    kind: Kind
    blocks: str
    inside: Mapping[str, str]
    outside: Mapping[str, str]
    prefixes: tuple[str, ...] = ('',)
    beside: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    lifts: Mapping[str, int] = field(default_factory=dict)
    turned: tuple[str, ...] = ()
    kinds: Mapping[str, Kind] = field(default_factory=dict)

    def word(self, name: str, prefix: str) -> str | None:
        """Our word for a name of a file, None where there is none."""
        if not name.startswith(prefix):
            return look_up(self.beside, name)
        rest = name.removeprefix(prefix)
        if found := re.match(self.blocks, rest):
            word = look_up(self.inside, rest[found.end() :])
            return word and f'blocks.{found[1]}.{word}'
        return look_up(self.outside, rest)

    def words(self, names, prefix: str) -> dict[str, str]:
        """Our words for the names that have one."""
        return {name: word for name in names if (word := self.word(name, prefix))}

    def reason_to_leave(self, name: str) -> str | None:
        """Why a tensor stays behind; None where it may not."""
        return next((reason for pattern, reason in self.left.items() if re.search(pattern, name)), None)


def look_up(table: Mapping[str, str], name: str) -> str | None:
    """The word for a tensor, or for a module and its weight or bias."""
    if name in table:
        return table[name]
    module, _, leaf = name.rpartition('.')
    return f'{table[module]}.{leaf}' if module in table and leaf in ('weight', 'bias') else None


def same(*names: str) -> dict[str, str]:
    """A table of names that are our words."""
    return {name: name for name in names}
