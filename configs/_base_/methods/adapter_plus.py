# Adapter+ (Steitz and Roth, arXiv 2406.06820): a scaled adapter behind every MLP.
method = dict(adapter=None, dispatcher=None, parts=[dict(type='mmdyt.AdapterPlus')])
