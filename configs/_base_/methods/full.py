# Full tuning; its learning rate is a tenth (Dynamic Tuning, arXiv 2403.11808, appendix).
method = dict(adapter=None, dispatcher=None, tuned='all')
method_lr = 0.1
