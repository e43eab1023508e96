# Linear probe: the backbone stays as it is.
method = dict(adapter=None, dispatcher=None)
