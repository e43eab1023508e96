# Visual Prompt Tuning (VPT; Jia et al., arXiv 2203.12119), prompts in front of every layer.
method = dict(adapter=None, dispatcher=None, drop_path_rate=0.0, parts=[dict(type='mmdyt.Prompts', deep=True)])
