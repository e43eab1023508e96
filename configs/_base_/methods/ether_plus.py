# ETHER+ (Bini et al., arXiv 2405.20271): every linear layer turned on both sides.
method = dict(adapter=None, dispatcher=None, parts=[dict(type='mmdyt.ETHERPlus')])
