# LoRA (Hu et al., arXiv 2106.09685) on queries and values.
method = dict(adapter=None, dispatcher=None, parts=[dict(type='mmdyt.LoRA', on='attn.qkv', rows='qv', rank=8)])
