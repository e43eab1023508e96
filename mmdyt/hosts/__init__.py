"""Layers of other libraries, their modules named as :class:`mmdyt.core.block.Block` wants them."""
