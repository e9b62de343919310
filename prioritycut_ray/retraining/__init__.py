"""Scheduled retraining: new data → warm start → evaluate → promote or refuse.

``pipeline`` runs the numbered steps with what the other modules give: ``settings`` (the YAML file),
``registry`` (the models folder and the pointer to the current model), ``job`` (the work on one
candidate), ``data_check`` (leaks and shifts), ``comparison``, ``worsening``, ``gate`` and
``rehearsal`` (whether it is promoted), ``notifications`` (the report).
"""
