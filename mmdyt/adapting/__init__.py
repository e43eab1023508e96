"""Vision Transformers of timm and Hugging Face in memory, adapted on torch alone: see docs/adapt.md."""
