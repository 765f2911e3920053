"""The pictures of the course, each drawn by one file of this folder from arrays that minunet computed.

    python -m docs.figures                              all of them, into docs/pictures; some minutes
    python -m docs.figures conv2d loss_surface          some of them
    python -m docs.figures --tiny --out /tmp/pictures   all, from networks and data too small to mean anything: seconds

``NAME.py`` draws ``NAME.png``, some also ``NAME.gif``, and writes the figures (numbers) that it shows to
``NAME.txt``: what a page quotes stands there. Its function ``build(out, tiny)`` does all that; what computes comes
first in the file, what draws after. Everything is drawn from synthetic patients or from small arrays written out in
the file, and from fixed seeds.
"""
