# ETHER (Bini et al., arXiv 2405.20271): a reflection in front of every linear layer.
method = dict(adapter=None, dispatcher=None, parts=[dict(type='mmdyt.ETHER')])
