# Token Compensator (ToCom; Jie et al., arXiv 2408.06798): a model tuned at one degree of merging runs at another.
method = dict(adapter=None, dispatcher=None, parts=[dict(type='mmdyt.ToMe'), dict(type='mmdyt.TokenCompensator')])
