# A small Vision Transformer for the demo, patch 8; pre-training and tuning share it.
arch = dict(embed_dims=96, num_layers=6, num_heads=3, feedforward_channels=384)
