"""Decisions on plain data, without torch and without Ray.

`schedule` and `failure` import no other room of this folder; `model` imports `schedule`, whose settings a plan holds.
"""
