# Scaling and shifting of every feature (SSF; Lian et al., arXiv 2210.08823).
method = dict(adapter=None, dispatcher=None, parts=[dict(type='mmdyt.SSF')])
