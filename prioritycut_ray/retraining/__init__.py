"""Scheduled retraining: new data → warm start → evaluate → promote or refuse.

``settings`` says what is wanted, ``lease`` keeps two from doing it at once, ``registry`` knows the
models and which is current, ``gate`` decides, ``job`` does the numbered steps, ``notices`` tells.
"""
