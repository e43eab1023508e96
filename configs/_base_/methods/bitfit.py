# BitFit (Ben Zaken et al., arXiv 2106.10199): every bias of the backbone.
method = dict(adapter=None, dispatcher=None, tuned=['parts', r'^(?!.*dynamic).*\bbias$'])
