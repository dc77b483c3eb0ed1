"""Quantising a stored model: calibrate its parts, measure what int8 costs, and take back what costs too much, until the
loss of AP is within a bound.
"""
