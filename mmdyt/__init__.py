__version__ = '0.1.0'


def adapt(vit, method='dyt', rate=None, **options):
    """Add a method to a Vision Transformer of timm or Hugging Face: see :func:`mmdyt.adapting.adapt.adapt`."""
    from .adapting.adapt import adapt  # torch is imported when it is needed

    return adapt(vit, method, rate, **options)
