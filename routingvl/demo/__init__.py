"""The embedded demo: every routing function trained and compared on a small made-up data set, in minutes on a CPU.

``main.run`` is the way in (``routingvl demo`` calls it). It uses the library as an outsider would: files in public
formats, backbones loaded by folder, ``train`` and ``evaluate``.
"""
