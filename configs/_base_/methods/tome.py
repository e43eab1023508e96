# Token Merging (ToMe; Bolya et al., arXiv 2210.09461): nothing is tuned but the head.
method = dict(adapter=None, dispatcher=None, parts=[dict(type='mmdyt.ToMe')])
